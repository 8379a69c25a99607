"""Ways to start Trivium as a person does, tiny settings, and throw-away plugins."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from trivium.selftest.harness import Forker
from trivium.selftest.recipes import overridden

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: tests share the cores, small models need one

ROOT = Path(__file__).parents[1]
TINY_MODEL = ("model.dim=32", "model.layers=2", "model.heads=2", "model.kv_heads=1", "model.ffn_dim=64")
TINY_RUN = (
    *("tokenizer.vocab_size=320", "batch.size=4", "batch.micro_size=4", "batch.length=64"),
    *("validation.every_steps=0", "validation.max_rows=8", "samples.every_steps=0", "trainer.max_steps=6"),
    "precision=fp32",  # as everywhere, and so on a machine that would choose bf16
)
TINY = (*TINY_MODEL, *TINY_RUN)


@pytest.fixture(scope="session", name="overridden")
def overridden_fixture():
    """overridden((...), (...)) -> overrides in order, each key once, for test modules."""
    return overridden


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """TRIVIUM_CACHE of everything these tests start: a tokenizer is trained once a session."""
    return tmp_path_factory.mktemp("trivium-cache")


@pytest.fixture(scope="session")
def spawn(cache):
    """spawn("phase=pretrain", ..., path=[folders for PYTHONPATH]) -> a running `launch.py`."""
    started = []

    def spawn(*args, path=(), **environment):
        paths = os.pathsep.join([*map(str, path), *filter(None, [os.environ.get("PYTHONPATH")])])
        env = {**os.environ, "TRIVIUM_CACHE": str(cache), "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, **environment}
        process = subprocess.Popen(
            [sys.executable, "launch.py", *map(str, args)],
            cwd=ROOT, env=env, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        started.append(process)
        return process

    yield spawn
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait()


@pytest.fixture(scope="session")
def launch(spawn):
    """launch("phase=pretrain", ...) -> CompletedProcess of a real `python launch.py ...`."""

    def launch(*args, timeout=120, **how):
        process = spawn(*args, **how)
        out, err = process.communicate(timeout=timeout)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    return launch


@pytest.fixture(scope="session")
def fork(cache, tmp_path_factory):
    """fork("phase=pretrain", ...) -> a running Process, at once: a real one to kill, without seconds of imports."""
    forker = Forker(tmp_path_factory.mktemp("forked"), cache, home=ROOT)
    yield forker.fork
    forker.close()


@pytest.fixture
def main(cache, monkeypatch, capsys):
    """main("phase=pretrain", ...) -> code, out, err of the same command line, in this process (no 3 s of imports)."""
    monkeypatch.setenv("TRIVIUM_CACHE", str(cache))
    monkeypatch.chdir(ROOT)

    def main(*args):
        from trivium.cli import main as entry

        capsys.readouterr()
        code = entry([str(a) for a in args])
        said = capsys.readouterr()
        return SimpleNamespace(code=code, out=said.out, err=said.err)

    return main


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A text file of 230 kB in a made language of 200 words: 58 documents, quickly tokenised."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 6))) for _ in range(200)]
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text("\n\n".join(" ".join(draw.choices(words, k=80)) for _ in range(600)))
    return path


@pytest.fixture(scope="session")
def pretraining(corpus):
    """pretraining(runs, name, *changes) -> the overrides of a tiny pretraining run on the corpus."""

    def overrides(runs, name, *changes):
        fixed = ("phase=pretrain", "domain=files", f"data.path={corpus}", "data.validation_share=0.2")
        fixed += ("tokenizer.rules=gguf",)  # so that what is trained can leave in every form
        return overridden(fixed, TINY, (f"runs={runs}", f"name={name}"), changes)

    return overrides


@pytest.fixture(scope="session")
def tuning():
    """tuning(runs, name, *changes) -> the overrides of a tiny, packed tuning run on primer tasks."""

    def overrides(runs, name, *changes):
        fixed = ("phase=sft", "model=primer", "data.parts=[tasks]", "data.num_tasks=400")
        return overridden(fixed, TINY, (f"runs={runs}", f"name={name}"), changes)

    return overrides


@pytest.fixture(scope="session")
def tuned(fork, tuning, tmp_path_factory):
    """A finished run of 120 steps, checkpoints 100 and 120, on a task whose answer is one digit. Never to be changed.

    Its answers are right now and then, so that some samples of a prompt are and others are not.
    """
    runs = tmp_path_factory.mktemp("tuned")
    length = ("trainer.max_steps=120", "checkpoint.every_steps=100")
    done = fork(*tuning(runs, "tuned", "data.tasks=[count]", "optim.lr=1e-2", "model.dropout=0.1", *length)).done()
    assert done.returncode == 0, done.err
    return runs / "tuned"


def tiny(phase, *own):
    """The fixture of a phase that learns on `data.tasks=[count]`: (runs, name, *changes) -> overrides."""

    def overrides(runs, name, *changes):
        fixed = (f"phase={phase}", "data.tasks=[count]", *TINY_RUN, *own)
        return overridden(fixed, (f"runs={runs}", f"name={name}"), changes)

    return overrides


@pytest.fixture(scope="session")
def preferring(tuned):
    """preferring(runs, name, *changes) -> the overrides of a tiny DPO run; `tuned` is start and reference."""
    plain = ("batch.length=128",)
    return tiny("preference", f"init_from={tuned}", "data.num_pairs=200", *plain)


@pytest.fixture(scope="session")
def rewarding(tuned):
    """rewarding(runs, name, *changes) -> the overrides of a tiny reward model on the pairs of `preferring`."""
    return tiny("reward", f"init_from={tuned}", "data.num_pairs=200", "batch.length=128")


@pytest.fixture(scope="session")
def rolling(tuned):
    """rolling(runs, name, *changes) -> the overrides of a tiny GRPO run, two steps on each rollout."""
    rollout = ("rollout.prompts=4", "rollout.samples=4", "rollout.updates=2", "inference.sampling.max_tokens=4")
    return tiny("rlhf", f"init_from={tuned}", "data.num_tasks=200", *rollout)


@pytest.fixture(scope="session")
def distilling(tuned):
    """distilling(runs, name, *changes) -> the overrides of a student half as wide with `tuned` as its teacher."""
    small = ("model.dim=16", "model.layers=1", "model.heads=2", "model.kv_heads=1", "model.ffn_dim=32")
    return tiny("distill", f"teacher.init_from={tuned}", "data.parts=[tasks]", "data.num_tasks=400", *small)


@pytest.fixture(scope="session")
def verdicts(tmp_path_factory):
    """A file of 80 labelled answers, half of them undesirable."""
    path = tmp_path_factory.mktemp("verdicts") / "verdicts.jsonl"
    draw, rows = random.Random(0), []
    for i in range(80):
        asked = {"role": "user", "content": f"How many letters: {' '.join(draw.choices('abcdef', k=3 + i % 5))}"}
        said = {"role": "assistant", "content": str(3 + i % 5 + i % 2)}
        rows.append({"messages": [asked, said], "label": i % 2 == 0})
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.fixture(scope="session")
def judging(tuned, verdicts):
    """judging(runs, name, *changes) -> the overrides of a tiny KTO run on the verdicts."""

    def overrides(runs, name, *changes):
        fixed = ("phase=preference", "objective=kto", "domain=files", f"data.path={verdicts}", f"init_from={tuned}")
        length = ("batch.length=128", "data.validation_share=0.2")
        return overridden(fixed, TINY_RUN, length, (f"runs={runs}", f"name={name}"), changes)

    return overrides


@pytest.fixture(scope="session")
def trained(fork, pretraining, tmp_path_factory):
    """A finished pretraining run of 6 steps with checkpoints 4 and 6, never to be changed."""
    runs = tmp_path_factory.mktemp("trained")
    done = fork(*pretraining(runs, "base", "checkpoint.every_steps=4")).done()
    assert done.returncode == 0, done.err
    return runs / "base"


@pytest.fixture
def plugin_folder(tmp_path):
    """plugin_folder(name, {relative path: text}) -> a folder for PYTHONPATH with the package `name` and its metadata.

    The metadata announce the entry point `name = name:plugin`, as an installer would have written it.
    """

    def make(name, files, *, folder="site", entry=None):
        site = tmp_path / folder
        info = site / f"{name}-1.0.dist-info"
        entry = entry or f"{name}:plugin"
        files = {
            f"{info.name}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
            f"{info.name}/entry_points.txt": f"[trivium.plugins]\n{name} = {entry}\n",
            **{f"{name}/{path}": text for path, text in files.items()},
        }
        for path, text in files.items():
            (site / path).parent.mkdir(parents=True, exist_ok=True)
            (site / path).write_text(text)
        return site

    return make


@pytest.fixture(scope="session", autouse=True)
def freed_memory_goes_back():
    """A run in this process would let the C library keep what is freed, for good, and hide from later tests what they
    allocate; tests/training/test_keep_freed.py sees to it in a process of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trivium.training.trainer.keep_freed", lambda: None)
        yield
