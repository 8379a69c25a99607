"""kill -9 and SIGTERM at random steps of real runs: the joined run is bit for bit the unbroken one."""

import csv
import hashlib
import json
import random
import re
import signal
import time

import pytest

STEPS = 60
EVERY = 7
LONG = (f"trainer.max_steps={STEPS}", f"checkpoint.every_steps={EVERY}")
DROPOUT = "model.dropout=0.1"
RECIPES = {
    "pretrain": ("pretraining", (*LONG, DROPOUT, "validation.every_steps=20")),
    "muon": ("pretraining", (*LONG, DROPOUT, "optim=muon")),
    "schedule_free": ("pretraining", (*LONG, DROPOUT, "optim=schedule_free", "schedule=constant")),
    "sft": ("tuning", (*LONG, DROPOUT)),
    "preference": ("preferring", (*LONG, "validation.every_steps=20")),
    "kto": ("judging", (*LONG, "validation.every_steps=20")),
    "reward": ("rewarding", (*LONG, "validation.every_steps=20")),
    "rlhf": ("rolling", (*LONG, "optim.lr=3e-3")),
    "distill": ("distilling", (*LONG, DROPOUT, "validation.every_steps=20")),
}
"""By name, the fixture of a phase and its settings. What has no dropout here starts from a model that has it."""
UPDATES = {"rlhf": 2}
"""Optimizer steps an item of the loader serves, where it is more than one: checkpoints fall between items."""


def rows_of(run):
    """The complete lines of metrics.jsonl; a line that is still being written is left out."""
    path = run / "metrics.jsonl"
    text = path.read_text() if path.is_file() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def curve(run):
    """Each step with its figures as hex floats: equal means equal in every bit."""
    names = ("train/loss", "val/loss", "grad_norm", "rollout/reward", "rollout/length", "reward/margin")
    return [(r["step"], *(float(r.get(name, 0.0)).hex() for name in names)) for r in rows_of(run)]


def digest(run):
    """One SHA-256 over the final weights (the average too, where one is kept) and optimizer state."""
    files = sorted((run / "checkpoints" / f"step-{STEPS}").glob("*.safetensors"))
    assert {"model.safetensors", "optimizer.safetensors"} <= {f.name for f in files}
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()


def stop_at(process, run, step, number, *, remainder=None):
    """Send a signal when metrics.jsonl has reached `step`; returns the last step it held then.

    The process must be alive and in the middle of its run, or the test proves nothing: it is frozen first, looked at,
    and gets the signal as it stands. remainder: of the last step done, by 2. A rollout serves two steps: after an even
    one (0) the next answers are drawn and first learnt from, after an odd one (1) learnt from for the second time.
    """
    deadline = time.monotonic() + 90
    while True:
        while not (rows := rows_of(run)) or rows[-1]["step"] < step:
            assert process.poll() is None, f"ended before step {step} with {process.returncode}"
            assert time.monotonic() < deadline, f"step {step} was not reached"
            time.sleep(0.001)
        process.send_signal(signal.SIGSTOP)
        frozen = time.monotonic() + 5
        while state_of(process.pid) not in "TtZ":  # a stop takes effect at the kernel's leisure
            assert time.monotonic() < frozen
        reached = rows_of(run)[-1]["step"]
        if remainder in (None, reached % 2):
            break
        process.send_signal(signal.SIGCONT)
        step = reached + 1
    assert process.poll() is None and state_of(process.pid) in "Tt"
    assert step <= reached < STEPS, f"too late: step {reached} of {STEPS}"
    process.send_signal(number)
    process.send_signal(signal.SIGCONT)
    process.wait(timeout=60)
    assert number != signal.SIGKILL or process.returncode == -signal.SIGKILL
    return reached


def state_of(pid):
    """The state letter of a process; needs Linux's /proc."""
    with open(f"/proc/{pid}/stat") as f:
        return f.read().rpartition(")")[2].split()[0]


def restarted_from(out):
    return int(re.search(r"continues from \S*step-(\d+)", out.replace("\n", ""))[1])


def saved_before(step, updates=1):
    """The newest checkpoint that is on disk once `step` is done: every 7 steps, put off to the end of an item."""
    return max(s for s in (-(-due // updates) * updates for due in range(0, STEPS, EVERY)) if s <= step)


def killed_twice(fork, overrides, run, remainders):
    """Two kill -9 at random steps, then the run's end. Returns [(killed at, continued from)]."""
    kills, starts = [], []
    for low, high, remainder in ((8, 24, remainders[0]), (32, 48, remainders[1])):
        process = fork(*overrides)
        kills.append(stop_at(process, run, random.randint(low, high), signal.SIGKILL, remainder=remainder))
        if len(kills) == 2:
            starts.append(restarted_from(process.out))
        else:
            with open(run / "metrics.jsonl", "a") as log, open(run / "metrics.csv", "a") as table:
                log.write('{"step": 999, "train/lo')  # what a kill inside the write would have left
                table.write("999,0.1")
    last = fork(*overrides).done()
    assert last.returncode == 0, last.err
    starts.append(restarted_from(last.out))
    return list(zip(kills, starts, strict=True))


@pytest.fixture(scope="module")
def recipe(request):
    """recipe(name, runs, run, *changes) -> the overrides of that recipe."""

    def overrides(name, runs, run, *changes):
        fixture, settings = RECIPES[name]
        return request.getfixturevalue(fixture)(runs, run, *settings, *changes)

    return overrides


@pytest.fixture(scope="module")
def unbroken(fork, recipe, tmp_path_factory):
    """unbroken(name) -> the folder of a run that nobody stops; it starts at once and is waited for by `finished`."""
    runs, started = tmp_path_factory.mktemp("unbroken"), {}

    def start(name):
        if name not in started:
            started[name] = fork(*recipe(name, runs, name))

        def finished():
            assert started[name].done().returncode == 0, started[name].err
            return runs / name

        return finished

    return start


@pytest.mark.parametrize("name", RECIPES)
def test_run_killed_twice_equals_the_unbroken_one(name, unbroken, recipe, fork, tmp_path):
    """Every figure of all steps, weights and optimizer state; dropout on, packed rows, sampled answers.

    Of rlhf the first kill falls in the drawing of answers or the first step on them, the second between the two steps.
    """
    finished, run = unbroken(name), tmp_path / "killed"
    updates = UPDATES.get(name, 1)
    tried = killed_twice(fork, recipe(name, tmp_path, "killed"), run, (0, 1) if updates > 1 else (None, None))
    whole = finished()
    print(f"{name}: killed at and continued from {tried}")
    for killed, start in tried:  # the newest checkpoint; the kill may fall between a step's line and its checkpoint
        assert start in (saved_before(killed, updates), saved_before(killed - 1, updates))
    assert curve(run) == curve(whole)
    assert [r["step"] for r in rows_of(run)] == list(range(1, STEPS + 1))
    assert digest(run) == digest(whole)
    if "validation" in str(RECIPES[name]):
        assert [r["step"] for r in rows_of(run) if "val/loss" in r] == [20, 40, 60]
    for folder in (run, whole):
        with open(folder / "metrics.csv") as f:
            table = [(int(r["step"]), float(r["train/loss"]).hex()) for r in csv.DictReader(f)]
        assert table == [step[:2] for step in curve(folder)]


@pytest.mark.parametrize("name", RECIPES)
def test_what_is_killed_learns(name, unbroken):
    """A run whose weights stand still, or whose loss is always the same, would be equal however it is resumed."""
    run = unbroken(name)()
    model = json.loads((run / f"checkpoints/step-{STEPS}/model.json").read_text())
    assert model["config"]["dropout"] == 0.1
    rows = rows_of(run)
    assert len({r["train/loss"] for r in rows}) > 50
    assert all(r["grad_norm"] > 0 for r in rows)
    if name == "rlhf":  # some groups differ in their rewards, so there is something to learn from the samples
        assert sum(r["rollout/idle_groups"] < 1 for r in rows) > 30
        assert len({r["rollout/reward"] for r in rows}) > 3


def test_sigterm_saves_the_step_it_stopped_at_and_continues_bitwise(unbroken, spawn, launch, recipe, tmp_path):
    """143, a checkpoint off the schedule, the same command goes on; the curve is the unbroken run's."""
    finished, overrides = unbroken("pretrain"), recipe("pretrain", tmp_path, "stopped", "checkpoint.every_steps=1000")
    process = spawn(*overrides)
    run = tmp_path / "stopped"
    stop_at(process, run, random.randint(10, 48), signal.SIGTERM)
    reached = rows_of(run)[-1]["step"]
    assert process.returncode == 143
    out, err = process.communicate()
    assert f"stopped by signal 15 after step {reached}, saved" in out and not err
    assert [p.name for p in (run / "checkpoints").glob("step-*")] == [f"step-{reached}"]
    assert json.loads((run / "MANIFEST.json").read_text())["status"] == "stopped"
    rest = launch(*overrides)
    assert rest.returncode == 0, rest.stderr
    assert restarted_from(rest.stdout) == reached
    assert curve(run) == curve(finished()) and len(curve(run)) == STEPS
    assert digest(run) == digest(finished())
    assert json.loads((run / "MANIFEST.json").read_text())["status"] == "done"


def test_sigterm_in_the_midst_of_a_rollout_saves_at_its_end(unbroken, fork, recipe, tmp_path):
    """The signal comes in the first step of two: the second is still taken, then it saves, once, and ends."""
    finished, overrides = unbroken("rlhf"), recipe("rlhf", tmp_path, "stopped", "checkpoint.every_steps=1000")
    run = tmp_path / "stopped"
    process = fork(*overrides)
    reached = stop_at(process, run, random.randint(10, 48), signal.SIGTERM, remainder=0)
    assert process.returncode == 143 and not process.err
    saved = rows_of(run)[-1]["step"]
    assert saved in (reached, reached + 2)  # the first of them if it came right before the save of that step
    assert f"stopped by signal 15 after step {saved}, saved" in process.out
    assert [p.name for p in (run / "checkpoints").glob("step-*")] == [f"step-{saved}"]
    assert json.loads((run / "MANIFEST.json").read_text())["status"] == "stopped"
    rest = fork(*overrides).done()
    assert rest.returncode == 0, rest.err
    assert restarted_from(rest.out) == saved
    assert curve(run) == curve(finished()) and len(curve(run)) == STEPS
    assert digest(run) == digest(finished())
