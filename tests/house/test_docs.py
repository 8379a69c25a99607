"""Every command in README and docs is run, in the order in which a reader meets it, in one folder a page.

Runs are cut short by settings appended here; the main job at its full length is run by `.ci/run` itself.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
from tests.helpers import smollm2_path
from tests.inference.encoders import minilm

from trivium.data.config import FilesConfig
from trivium.data.files import Files
from trivium.data.schemas import COLUMNS
from trivium.data.source import form_of
from trivium.inference.feedback import FeedbackStore, Limits, Record
from trivium.schema import TRAINING_PHASES
from trivium.selftest.harness import Forker

ROOT = Path(__file__).parents[2]
SHORT = {
    "training": "trainer.max_steps=4 batch.size=4 batch.micro_size=4 batch.length=128 validation.max_rows=4",
    "real": "trainer.max_steps=2 batch.size=2 batch.micro_size=2 validation.max_rows=2",  # 135 M parameters
    "rollout": "rollout.prompts=4",
    "primer": "data.num_tasks=300 data.num_definitions=100 data.num_chats=100 data.num_pairs=100",
    "evaluate": "evaluation.max_texts=2 evaluation.max_tasks=6 evaluation.max_pairs=6 evaluation.resamples=10",
}
TINY_MODEL = "model=primer model.dim=32 model.layers=2 model.heads=2 model.kv_heads=1 model.ffn_dim=32"
PAGES = ["README.md", *sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "docs").glob("*.md"))]


def commands(page: str) -> list[str]:
    """The `python launch.py` and curl lines of a page's bash blocks."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(), flags=re.S)
    lines = [line.split("   #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line.split("&& ")[-1] for line in lines if "python launch.py" in line or line.startswith("curl ")]


def shortened(command: str) -> list[str]:
    words = shlex.split(command)
    verb = words[2] if len(words) > 2 else ""
    if verb in ("plugins", "explain", "report", "watch") or "--help" in words or "--cfg" in words:
        return words
    phase = next((w.removeprefix("phase=") for w in words if w.startswith("phase=")), "pipeline")
    extra = []
    if phase in (*TRAINING_PHASES, "pipeline"):
        extra += SHORT["real" if "model=smollm2_135m" in words else "training"].split()
    if phase in ("rlhf", "pipeline"):
        extra += SHORT["rollout"].split()
    if phase in (*TRAINING_PHASES, "pipeline") and not any(w.startswith(("domain=", "dataset=")) for w in words):
        extra += SHORT["primer"].split()
    if (
        "model=primer" in words
        or (phase == "pretrain" and "model.size" not in command)
        or (phase == "pipeline" and "init_from" not in command)
    ):
        extra += TINY_MODEL.split()
    if phase == "serve":
        extra += ["server.port=0"]
    if phase in ("evaluate", "pipeline"):
        extra += SHORT["evaluate"].split()
    given = {w.split("=")[0] for w in words}
    return words + [e for e in extra if e.split("=")[0] not in given or e.startswith("trainer.max_steps")]


def example_rows() -> dict[str, dict]:
    """The rows that docs/data.md shows, by the heading over each."""
    text = (ROOT / "docs/data.md").read_text()
    parts = re.findall(r"^##+ ([^\n]+)\n(.*?)(?=^##|\Z)", text, flags=re.M | re.S)
    found = ((heading, re.search(r"```json\n(.*?)```", body, flags=re.S)) for heading, body in parts)
    return {heading: json.loads(row.group(1)) for heading, row in found if row}


@pytest.fixture
def reader(tmp_path):
    """A reader's folder, one a page: their files, and launch.py as if the clone were here."""
    place = tmp_path
    (place / "launch.py").write_text(
        f"import runpy\nrunpy.run_path({str(ROOT / 'launch.py')!r}, run_name='__main__')\n"
    )
    turn = [{"role": "user", "content": "What is a heron?"}, {"role": "assistant", "content": "A long-legged bird."}]
    rows = [{"messages": [{**turn[0], "content": f"What is heron {i}?"}, turn[1]]} for i in range(300)]
    pairs = [
        {"prompt": f"Which bird is heron {i}?", "chosen": "A long-legged bird.", "rejected": "A fish."}
        for i in range(300)
    ]
    (place / "mine").mkdir()
    for folder, name, what in ((place, "my.jsonl", rows), (place / "mine", "chats.jsonl", rows),
                               (place / "mine", "pairs.jsonl", pairs)):  # fmt: skip
        (folder / name).write_text("".join(json.dumps(r) + "\n" for r in what))
    sums = [{"question": f"How much is {i} + 1?", "answer": f"#### {i + 1}"} for i in range(69)]
    (place / "tree").mkdir()
    for i in range(60):
        (place / f"tree/module_{i}.py").write_text(f"def heron_{i}(pond):\n    return pond[{i}]  # waits\n" * 20)
    (place / "mirror/gsm8k/main").mkdir(parents=True)
    card = "---\nconfigs:\n- config_name: main\n  data_files:\n" + "".join(
        f"  - split: {split}\n    path: main/{split}.jsonl\n" for split in ("train", "test")
    )
    (place / "mirror/gsm8k/README.md").write_text(f"{card}---\n")
    tools = json.dumps(example_rows()["Tools"])
    calls = [json.loads(tools.replace("Rain in Ulm?", f"Rain in Ulm, day {i}?")) for i in range(60)]
    more = {"sums": sums[:60], "tools": calls, "dirty": [*rows, {"messages": 1}]}
    more |= {"mirror/gsm8k/main/train": sums[:60], "mirror/gsm8k/main/test": sums[60:]}
    for name, what in ((f"{name}.jsonl", what) for name, what in more.items()):
        (place / name).write_text("".join(json.dumps(r) + "\n" for r in what))
    for block in re.findall(r"```yaml\n(name: mine\n.*?)```", (ROOT / "docs/improve.md").read_text(), flags=re.S):
        (place / "mine.yaml").write_text(block)
    store = FeedbackStore(place / "feedback.sqlite", Limits(per_minute=1000))
    for i in range(80):
        record = Record(turn[:1], "A fish.", [1], [2], [True], [-1.0], "m", "t", user=f"user{i // 2}", id=f"r{i}")
        store.add(replace(record, messages=[{**turn[0], "content": f"What is heron {i}?"}]))
        store.give(f"r{i}", "edit", "A long-legged bird.")
    store.close()
    text = "The heron stood in the river and waited, as herons do, for number {} to pass by.\n\n"
    (place / "docs").mkdir()
    for name in ("doctor.md", "feedback.md"):
        shutil.copy(ROOT / "docs" / name, place / "docs")
    for path in (place / "my.txt", place / "mine/text.txt"):
        path.write_text("".join(text.format(i) for i in range(2000)))
    return place


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("docs-cache")


@pytest.fixture(scope="module")
def fork(cache, tmp_path_factory):
    forker = Forker(tmp_path_factory.mktemp("forked"), cache)
    yield forker.fork
    forker.close()


@pytest.fixture
def serve(fork):
    """Starts a page's server, which answers until the page ends, and then ends well."""
    started = []

    def serve(*words, **how):
        started.append(fork(*words, **how))
        return started[-1]

    yield serve
    for server in started:
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 143 and not server.err, server.err


def address_of(server):
    """Where a server that was started says it is."""
    end = time.monotonic() + 120
    while not (found := re.search(r"answers at (http://\S+)/v1", server.out)):
        assert server.poll() is None and time.monotonic() < end, server.out + server.err
        time.sleep(0.05)
    return found[1]


def ask(command, server):
    """Run a page's curl line on the page's server, which listens elsewhere than the page says."""
    words = shlex.split(command.replace("http://127.0.0.1:8000", address_of(server)))
    run = subprocess.run([*words, "--silent", "--fail-with-body"], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, f"{command}\n{run.stdout}{run.stderr}"


@pytest.mark.parametrize("page", PAGES)
def test_commands_of_page_run(page, reader, cache, fork, serve, tmp_path):
    """The main job as a reader starts it, and sweeps, which start others; the rest in processes that need no imports.

    What README has is run there only; a page whose later commands needed it would fail.
    """
    (tmp_path / "said").write_text("What is a heron?\n")
    if "smollm2" in (ROOT / page).read_text():  # fetched once for all tests
        shutil.copytree(smollm2_path().parents[1], cache / "fetched", dirs_exist_ok=True)
    searches = any(what in " ".join(commands(page)) for what in ("phase=search", "inference=encoder"))
    if has_encoders := all(map(find_spec, ("sentence_transformers", "faiss"))) and searches:
        shutil.copytree(minilm().parents[1], cache / "fetched", dirs_exist_ok=True)
    elsewhere = commands("README.md") if page != "README.md" else []
    serving = None
    for command in (c for c in commands(page) if c not in elsewhere):
        if command.startswith("curl "):
            ask(command, serving)
            continue
        if "format=gguf" in command and find_spec("xllamacpp") is None:
            warnings.warn(f"NOT RUN without xllamacpp: {command}", stacklevel=1)
            continue
        if ("phase=search" in command or "inference=encoder" in command) and not has_encoders:
            warnings.warn(f"NOT RUN without sentence-transformers and faiss: {command}", stacklevel=1)
            continue
        words = shortened(command)[1:]
        if "phase=serve" in words:
            serving = serve(*words[1:], home=str(reader))
            address_of(serving)
            continue
        if words == shortened("python launch.py")[1:] or "-m" in words:
            run = subprocess.run(
                [sys.executable, *words], cwd=reader, env={**os.environ, "TRIVIUM_CACHE": str(cache)},
                input="What is a heron?\n", capture_output=True, text=True, timeout=300,
            )  # fmt: skip
            code, out, err = run.returncode, run.stdout, run.stderr
        else:
            run = fork(*words[1:], home=str(reader), input=str(tmp_path / "said")).done()
            code, out, err = run.returncode, run.out, run.err
        assert code == 0, f"{command}\n{out[-2000:]}\n{err[-2000:]}"
        assert "Traceback" not in err


def test_rows_of_the_data_page_are_what_their_headings_say(tmp_path, monkeypatch):
    monkeypatch.setenv("TRIVIUM_CACHE", str(tmp_path / "cache"))
    shown = example_rows()
    named = {heading.split(": ")[0] for heading in shown if ": " in heading}
    assert named == set(COLUMNS) and "Tools" in shown
    for heading, row in shown.items():
        schema, _, form = heading.partition(": ")
        path = tmp_path / "a.jsonl"
        path.write_text(json.dumps(row))
        source = Files(FilesConfig(path=str(path), validation_share=0.0))
        assert (source._tables[0].schema, form_of(source[0])) == ((schema, form) if form else ("messages", "chat"))


def test_pages_have_commands():
    """The test above must not pass by finding nothing."""
    assert len(commands("README.md")) >= 3
    assert len(commands("docs/quickstart.md")) >= 15


def test_quickstart_names_every_phase():
    from trivium.schema import PHASES

    text = (ROOT / "docs/quickstart.md").read_text()
    assert [p for p in PHASES if f"phase={p}" not in text] == []


def test_readme_tree_names_every_module():
    """One clause a file: a module that the tree does not name is a module nobody was told of."""
    tree = (ROOT / "README.md").read_text()
    modules = [p for p in (ROOT / "core/trivium").rglob("*.py") if p.name != "__init__.py"]
    assert [p.relative_to(ROOT).as_posix() for p in modules if p.name not in tree] == []
