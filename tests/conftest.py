"""Ways to start Trivium as a person does, tiny settings, and throw-away plugins."""

import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[1]
TINY = (
    *("model.dim=32", "model.layers=2", "model.heads=2", "model.kv_heads=1", "model.ffn_dim=64"),
    *("tokenizer.vocab_size=320", "batch.size=4", "batch.micro_size=4", "batch.length=64"),
    *("validation.every_steps=0", "validation.max_rows=8", "samples.every_steps=0", "trainer.max_steps=6"),
)


def overridden(*groups):
    """Overrides in order, each key once: a later one replaces an earlier one."""
    return list({o.partition("=")[0]: o for group in groups for o in group}.values())


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
def trained(launch, pretraining, tmp_path_factory):
    """A finished pretraining run of 6 steps with checkpoints 4 and 6, never to be changed."""
    runs = tmp_path_factory.mktemp("trained")
    done = launch(*pretraining(runs, "base", "checkpoint.every_steps=4"))
    assert done.returncode == 0, done.stderr
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
