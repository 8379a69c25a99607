"""Data workers: the same batches whatever their number, and no fault of theirs that hangs, hides or leaves a process.

Real runs; their workers are killed, stopped, made to raise or to sleep, and so are the runs themselves.
"""

import io
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from trivium.data.datamodule import StepDataset
from trivium.data.loader import StepLoader
from trivium.data.table import TokenTable
from trivium.data.transfer import share
from trivium.errors import ConfigError, DataError
from trivium.schema import RunConfig, TrainerConfig
from trivium.types import PreferenceBatch

STEPS = 90
SETTINGS = (f"trainer.max_steps={STEPS}", "checkpoint.every_steps=7", "model.dropout=0.1", "trainer.workers=2")
FAULT = """
import os, time
from trivium.data.datamodule import StepDataset
real = StepDataset.__getitem__
def faulty(self, item):
    if item == 12:
        if os.environ["FAULT"] == "raise":
            raise ValueError("bytes 4 to 7 of the example are no number")
        if os.environ["FAULT"] == "sleep":
            time.sleep(600)
        os._exit(3)
    return real(self, item)
StepDataset.__getitem__ = faulty
"""
"""Item 12 of the data cannot be made; every process of the run imports this before anything else."""


def table(group=1, least=3, **columns):
    """300 documents of `least` to 60 tokens."""
    draw = np.random.default_rng(0)
    lengths = draw.integers(least, 61, 300)
    offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
    tokens = draw.integers(4, 300, offsets[-1]).astype(np.int32)
    made = {name: draw.random(300).astype(np.float32) for name in columns}
    ids = [f"document {i}" for i in range(300)]
    return TokenTable(tokens, draw.random(offsets[-1]) < 0.7, offsets, ids, group=group, columns=made)


def steps_of(table, **more):
    return StepDataset(table, **{"size": 6, "micro_size": 2, "length": 128, "pad_id": 0, "seed": 3, **more})


def bits(item):
    """Every field of every batch of an item: type, shape and bytes of tensors, anything else as it is."""
    return [
        (type(batch), *((n, v.dtype, v.shape, v.numpy().tobytes()) if isinstance(v, torch.Tensor) else (n, v)
         for n, v in vars(batch).items()))
        for batch in item
    ]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def own_cache(cache):
    """The file that workers share lies in the cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRIVIUM_CACHE", str(cache))
        yield


# ---- the loader


@pytest.mark.parametrize("workers", [1, 3])
def test_items_are_the_same_whatever_the_number_of_workers(workers):
    """Rows with padding, rows without (no segments), pairs with a reference's column; more workers than items too."""
    pairs = steps_of(table(group=2, reference=1), batch=PreferenceBatch)
    alone = steps_of(table(least=60), size=2, micro_size=1, length=60)
    for steps, items in ((pairs, range(5, 25)), (alone, range(2)), (steps_of(table()), range(7, 9))):
        here = [bits(item) for item in StepLoader(steps, items)]
        loader = StepLoader(steps, items, workers=workers)
        assert len(loader) == len(items)
        assert [bits(item) for item in loader] == here
    assert bits(pairs[0])[0][0] is PreferenceBatch
    assert pairs[0][0].reference is not None and alone[0][0].segments is None


@pytest.mark.parametrize("here", [1, 4, 5, 9])
def test_items_are_the_same_however_many_are_made_while_workers_start(here, monkeypatch):
    steps, made = steps_of(table()), []
    expected = [bits(steps[item]) for item in range(3, 8)]
    monkeypatch.setattr(StepDataset, "__getitem__", lambda self, n, real=StepDataset.__getitem__: (
        made.append(n), real(self, n))[1])  # fmt: skip
    assert [bits(item) for item in StepLoader(steps, range(3, 8), workers=2, here=here)] == expected
    assert made == list(range(3, min(3 + here, 8)))  # the others elsewhere


def test_workers_end_with_the_iteration():
    loader = StepLoader(steps_of(table()), range(100), workers=2)
    found = iter(loader)
    next(found)
    pids = [w.process.pid for w in loader._fleet]
    assert len(pids) == 2 and all(Path(f"/proc/{pid}").exists() for pid in pids)
    loader.close()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_items_are_made_before_they_are_asked_for():
    """While training holds one, the next of each worker comes by itself: a step waits for what is there already."""
    loader = StepLoader(steps_of(table()), range(12), workers=2)
    found = iter(loader)
    for item in range(12):
        if item > 1:  # the first of each worker is waited for
            channel = loader._fleet[item % 2].channel
            assert select.select([channel], [], [], 60)[0], f"item {item} is only made when somebody asks"
        next(found)
    loader.close()


def test_data_is_shared_not_copied():
    """A table of 6 MB, its plan and its ids: what is sent to a worker is some kB, what it maps is the arrays, once."""
    draw = np.random.default_rng(0)
    lengths = draw.integers(3, 60, 40_000)
    offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
    tokens = draw.integers(4, 300, offsets[-1]).astype(np.int32)
    ids = [f"a long name of document {i}" for i in range(40_000)]
    steps = steps_of(TokenTable(tokens, np.ones(len(tokens), bool), offsets, ids))
    shared = io.BytesIO()
    data = share(steps, shared)
    arrays = tokens.nbytes + len(tokens) + offsets.nbytes + 8 * (40_000 + len(steps.rows) + 1)
    print(f"{len(data):,} bytes are sent, {len(shared.getvalue()):,} shared, of which {arrays:,} are arrays")
    assert len(data) < 8_000
    assert arrays <= len(shared.getvalue()) < arrays + 5 * 64
    assert len(steps.table.ids) == 40_000, "the run's own keeps its ids"


class Odd(StepDataset):
    """Lives in a module that no worker can import."""


def test_data_set_that_workers_cannot_import_is_told_at_once():
    with pytest.raises(DataError, match="cannot be made by data worker"):
        next(iter(StepLoader(Odd(table(), size=2, micro_size=2, length=60, pad_id=0, seed=0), range(3), workers=1)))


def test_settings_out_of_range_are_told():
    with pytest.raises(ConfigError, match="trainer.workers=-1"):
        TrainerConfig(workers=-1)
    with pytest.raises(ConfigError, match="trainer.prefetch=0"):
        TrainerConfig(prefetch=0)
    with pytest.raises(ConfigError, match="trainer.loader_timeout=0"):
        TrainerConfig(loader_timeout=0)
    with pytest.raises(ConfigError, match="trainer.workers=2 has nothing to do in phase=rlhf"):
        RunConfig(phase="rlhf", data=object(), trainer=TrainerConfig(workers=2))


@pytest.mark.gpu
def test_pinned_items_are_the_same():
    steps = steps_of(table())
    for workers in (0, 2):
        found = list(StepLoader(steps, range(6), workers=workers, pin=True))
        assert [bits(item) for item in found] == [bits(steps[k]) for k in range(6)]
        assert all(batch.tokens.is_pinned() and batch.labels.is_pinned() for item in found for batch in item)


# ---- real runs


def rows_of(run):
    path = run / "metrics.jsonl"
    text = path.read_text() if path.is_file() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def curve(run):
    return [(r["step"], float(r["train/loss"]).hex(), float(r["grad_norm"]).hex()) for r in rows_of(run)]


def saved(run):
    return max((int(p.name[5:]) for p in run.glob("checkpoints/step-*") if p.name[5:].isdigit()), default=0)


def workers_of(pid):
    """The pids of a process's data workers; needs Linux's /proc."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            command = (path / "cmdline").read_bytes()
        except OSError:
            continue
        if parent == pid and b"trivium.data.worker" in command:
            found.append(int(path.name))
    return found


def runs(pid):
    """Whether a process is there and no mere entry of one that has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def under_way(process, run, step):
    """Wait until a run has done `step` steps; returns its workers' pids. It must be in the midst of them."""
    deadline = time.monotonic() + 400
    while not (rows := rows_of(run)) or rows[-1]["step"] < step:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.001)
    pids = workers_of(process.pid)
    assert len(pids) == 2 and rows[-1]["step"] < STEPS and process.poll() is None
    return pids


def ended(process, began, more=0.0):
    """What it said, once it has ended; the first line of stderr comes within 5 seconds (and `more`) of `began`.

    The interpreter's own end, a second of computing, is not in that: on a busy machine it takes any time.
    """
    first = process.stderr.readline()
    took = time.monotonic() - began
    print(f"said after {took:.2f} s: {first.strip()}")
    out, err = process.communicate(timeout=200)
    assert took < 5 + more or not first
    return out, first + err


@pytest.fixture(scope="module")
def unbroken(fork, pretraining, tmp_path_factory):
    """The run without workers that nobody disturbs."""
    folder = tmp_path_factory.mktemp("unbroken")
    done = fork(*pretraining(folder, "a", *SETTINGS[:-1])).done(timeout=500)
    assert done.returncode == 0, done.err
    return folder / "a"


@pytest.fixture
def faulty(tmp_path):
    """A folder for PYTHONPATH with which item 12 cannot be made."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(FAULT)
    return tmp_path / "site"


@pytest.fixture
def overrides(pretraining, tmp_path):
    return pretraining(tmp_path, "a", *SETTINGS)


@pytest.fixture
def run(tmp_path):
    return tmp_path / "a"


@pytest.mark.parametrize("workers", [1, 3])
def test_runs_are_bitwise_equal_whatever_the_number_of_workers(workers, fork, pretraining, unbroken, run, tmp_path):
    done = fork(*pretraining(tmp_path, "a", *SETTINGS, f"trainer.workers={workers}")).done(timeout=500)
    assert done.returncode == 0, done.err
    assert curve(run) == curve(unbroken) and len(curve(run)) == STEPS
    for name in ("model.safetensors", "optimizer.safetensors"):
        last = f"checkpoints/step-{STEPS}/{name}"
        assert (run / last).read_bytes() == (unbroken / last).read_bytes()


def test_killed_worker_ends_the_run_which_then_continues(spawn, fork, overrides, unbroken, run):
    """kill -9, as the kernel does when memory runs out. The rest is trained with another number of workers."""
    process = spawn(*overrides)
    pids = under_way(process, run, 20)
    began = time.monotonic()
    os.kill(pids[1], signal.SIGKILL)
    _, err = ended(process, began)
    assert process.returncode == 1
    assert re.fullmatch(
        rf"error: data worker \d \(process {pids[1]}\) was killed by signal 9 \(is there enough memory\? each worker "
        r"takes some\) at data item \d+ \(its first sample is \S+text\.txt:\d+\); the same command continues\n", err
    ), err  # fmt: skip
    assert not any(map(runs, pids))
    before = saved(run)
    assert 0 < before < STEPS
    rest = fork(*(o for o in overrides if "workers" not in o), "trainer.workers=1").done(timeout=500)
    assert rest.returncode == 0, rest.err
    assert f"continues from {run}/checkpoints/step-{before}" in rest.out.replace("\n", "")
    assert curve(run) == curve(unbroken)


def test_stopped_worker_ends_the_run_within_the_timeout(spawn, overrides, run):
    process = spawn(*overrides, "trainer.loader_timeout=1.5")
    pids = under_way(process, run, 20)
    began = time.monotonic()
    os.kill(pids[0], signal.SIGSTOP)
    _, err = ended(process, began, more=1.5)
    assert process.returncode == 1 and time.monotonic() - began > 1.5
    assert re.fullmatch(
        r"error: data item \d+ \(its first sample is \S+\) was not there after 1\.5 s \(trainer\.loader_timeout\); "
        rf"data worker \d \(process {pids[0]}\) hangs; the same command continues\n", err
    ), err  # fmt: skip
    assert not any(map(runs, pids))


@pytest.mark.parametrize(
    ("fault", "workers", "said"),
    [
        ("raise", 0, r"{item} cannot be made: ValueError: bytes 4 to 7 of the example are no number"),
        ("raise", 2, r"{item} cannot be made by data worker 0: ValueError: bytes 4 to 7 of the example are no number"),
        ("exit", 2, r"data worker 0 \(process \d+\) ended with exit code 3 at {item}; the same command continues"),
        ("sleep", 2, r"{item} was not there after 1 s \(trainer.loader_timeout\); data worker 0 .* hangs; the same .*"),
    ],
)
def test_item_that_cannot_be_made_is_named(fault, workers, said, spawn, fork, overrides, unbroken, faulty, run):
    """The thirteenth step's data is bad: twelve are done, fewer if the worker that died was ahead of training.

    Once that is mended the same command goes on.
    """
    process = spawn(*overrides, f"trainer.workers={workers}", "trainer.loader_timeout=1", path=[faulty], FAULT=fault)
    out, err = process.communicate(timeout=400)
    assert process.returncode == 1, out + err
    item = r"data item 12 \(its first sample is \S+text\.txt:\d+\)"
    assert re.fullmatch(f"error: {said.replace('{item}', item)}\n", err), err
    assert workers_of(process.pid) == []
    done, newest = [r["step"] for r in rows_of(run)], saved(run)
    assert done == list(range(1, len(done) + 1)) and len(done) in (range(13) if fault == "exit" else (11, 12))
    assert newest == (7 if len(done) >= 7 else 0)
    rest = fork(*overrides).done(timeout=500)
    assert rest.returncode == 0 and ("step-7" in rest.out) == (newest == 7), rest.err
    assert curve(run) == curve(unbroken)


@pytest.mark.parametrize("fault", ["none", "sleep"])
def test_no_worker_outlives_a_killed_run(fault, spawn, overrides, faulty, run):
    """Workers that wait to hand over, and one that hangs inside the data set."""
    path = [faulty] if fault == "sleep" else []
    process = spawn(*overrides, path=path, FAULT=fault)
    pids = under_way(process, run, 11 if fault == "sleep" else 20)
    process.send_signal(signal.SIGKILL)
    began = time.monotonic()
    process.wait(timeout=10)
    assert process.returncode == -signal.SIGKILL
    while any(map(runs, pids)):
        assert time.monotonic() - began < 5, "orphans"
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_to_the_whole_group_saves_and_continues_bitwise(number, fork, overrides, unbroken, cache, run):
    """As Ctrl-C in a terminal, or a scheduler: workers get it too, and must not break the save by dying of it."""
    environment = {**os.environ, "TRIVIUM_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "launch.py", *map(str, overrides)], cwd=Path(__file__).parents[2], env=environment, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    pids = under_way(process, run, 20)
    began = time.monotonic()
    os.killpg(process.pid, number)
    out, err = ended(process, began)
    assert process.returncode == 143 and not err, err
    reached = rows_of(run)[-1]["step"]
    assert f"stopped by signal {int(number)} after step {reached}, saved" in out and saved(run) == reached < STEPS
    assert not any(map(runs, pids))
    rest = fork(*overrides).done(timeout=500)
    assert rest.returncode == 0 and f"step-{reached}" in rest.out.replace("\n", ""), rest.err
    assert curve(run) == curve(unbroken)


def test_stuck_loader_does_not_block_a_signal(spawn, fork, overrides, unbroken, faulty, run):
    """The data of step 13 never comes: the twelve steps before it are saved, and the exit is clean."""
    process = spawn(*overrides, path=[faulty], FAULT="sleep")
    under_way(process, run, 11)
    time.sleep(1)  # steps are much faster: it waits for the thirteenth's data now
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    out, err = ended(process, began)
    assert process.returncode == 143 and not err
    assert "stopped by signal 15 after step 12, saved" in out and saved(run) == 12
    rest = fork(*overrides).done(timeout=500)
    assert rest.returncode == 0 and "step-12" in rest.out.replace("\n", ""), rest.err
    assert curve(run) == curve(unbroken)
