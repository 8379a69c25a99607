"""kill -9 and SIGTERM at random steps of real runs: the joined run is bit for bit the unbroken one."""

import csv
import hashlib
import json
import random
import re
import signal
import time

import pytest

STEPS = 120
LONG = (f"trainer.max_steps={STEPS}", "checkpoint.every_steps=7", "model.dropout=0.1")
PRETRAIN = (*LONG, "validation.every_steps=20")


def rows_of(run):
    """The complete lines of metrics.jsonl; a line that is still being written is left out."""
    path = run / "metrics.jsonl"
    text = path.read_text() if path.is_file() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def curve(run):
    """Each step with its losses as hex floats: equal means equal in every bit."""
    return [(r["step"], r["train/loss"].hex(), r.get("val/loss", 0.0).hex()) for r in rows_of(run)]


def digest(run):
    """One SHA-256 over the final weights and optimizer state."""
    final = run / "checkpoints" / f"step-{STEPS}"
    files = [final / "model.safetensors", final / "optimizer.safetensors"]
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()


def stop_at(process, run, step, number):
    """Send a signal when metrics.jsonl has reached `step`; returns the last step it holds afterwards.

    The process must be alive and in the middle of its run, or the test proves nothing.
    """
    deadline = time.monotonic() + 90
    while not (rows := rows_of(run)) or rows[-1]["step"] < step:
        assert process.poll() is None, f"ended before step {step}: {process.communicate()}"
        assert time.monotonic() < deadline, f"step {step} was not reached"
        time.sleep(0.001)
    assert process.poll() is None
    process.send_signal(number)
    process.wait(timeout=60)
    reached = rows_of(run)[-1]["step"]
    assert step <= reached < STEPS, f"the signal came after the run: step {reached} of {STEPS}"
    return reached


def restarted_from(out):
    return int(re.search(r"continues from \S*step-(\d+)", out.replace("\n", ""))[1])


def killed_twice(spawn, launch, overrides, run):
    """Two kill -9 at random steps, then the run's end. Returns [(killed at, continued from)]."""
    first, second = random.randint(10, 45), random.randint(60, 95)
    kills = [stop_at(spawn(*overrides), run, first, signal.SIGKILL)]
    with open(run / "metrics.jsonl", "a") as log, open(run / "metrics.csv", "a") as table:
        log.write('{"step": 999, "train/lo')  # what a kill inside the write would have left
        table.write("999,0.1")
    process = spawn(*overrides)
    while not re.search(r"step-\d+", out := process.stdout.readline()):
        assert out, f"ended at once: {process.stderr.read()}"
    starts = [restarted_from("continues from " + out.split()[-1])]
    kills.append(stop_at(process, run, second, signal.SIGKILL))
    assert process.returncode == -signal.SIGKILL
    last = launch(*overrides)
    assert last.returncode == 0, last.stderr
    starts.append(restarted_from(last.stdout))
    return list(zip(kills, starts, strict=True))


@pytest.fixture(scope="module")
def unbroken(spawn, pretraining, tuning, tmp_path_factory):
    """unbroken(phase) -> the folder of a run that nobody stops; it starts at once and is waited for by `finished`."""
    runs, started = tmp_path_factory.mktemp("unbroken"), {}

    def start(phase):
        if phase not in started:
            overrides = {"pretrain": pretraining(runs, phase, *PRETRAIN), "sft": tuning(runs, phase, *LONG)}
            started[phase] = spawn(*overrides[phase])

        def finished():
            _, err = started[phase].communicate(timeout=120) if started[phase].returncode is None else ("", "")
            assert started[phase].returncode == 0, err
            return runs / phase

        return finished

    return start


@pytest.mark.parametrize("phase", ["pretrain", "sft"])
def test_run_killed_twice_equals_the_unbroken_one(phase, unbroken, spawn, launch, pretraining, tuning, tmp_path):
    """Losses of all steps, validation losses, weights and optimizer state; dropout on, packed rows."""
    overrides, settings = (pretraining, PRETRAIN) if phase == "pretrain" else (tuning, LONG)
    finished, run = unbroken(phase), tmp_path / "killed"
    tried = killed_twice(spawn, launch, overrides(tmp_path, "killed", *settings), run)
    whole = finished()
    print(f"{phase}: killed at and continued from {tried}")
    for killed, start in tried:  # the newest checkpoint; the kill may fall between a step's line and its checkpoint
        assert start in (killed // 7 * 7, (killed - 1) // 7 * 7)
    assert curve(run) == curve(whole)
    assert [r["step"] for r in rows_of(run)] == list(range(1, STEPS + 1))
    assert digest(run) == digest(whole)
    if phase == "pretrain":
        assert [r["step"] for r in rows_of(run) if "val/loss" in r] == list(range(20, 121, 20))
    for folder in (run, whole):
        with open(folder / "metrics.csv") as f:
            table = [(int(r["step"]), float(r["train/loss"]).hex()) for r in csv.DictReader(f)]
        assert table == [(step, loss) for step, loss, _ in curve(folder)]


def test_sigterm_saves_the_step_it_stopped_at_and_continues_bitwise(unbroken, spawn, launch, pretraining, tmp_path):
    """143, a checkpoint off the schedule, the same command goes on; the curve is the unbroken run's."""
    finished, settings = unbroken("pretrain"), (*PRETRAIN, "checkpoint.every_steps=1000")
    process = spawn(*pretraining(tmp_path, "stopped", *settings))
    run = tmp_path / "stopped"
    reached = stop_at(process, run, random.randint(10, 80), signal.SIGTERM)
    assert process.returncode == 143
    out, err = process.communicate()
    assert f"stopped by signal 15 after step {reached}, saved" in out and not err
    assert [p.name for p in (run / "checkpoints").glob("step-*")] == [f"step-{reached}"]
    assert json.loads((run / "MANIFEST.json").read_text())["status"] == "stopped"
    rest = launch(*pretraining(tmp_path, "stopped", *settings))
    assert rest.returncode == 0, rest.stderr
    assert restarted_from(rest.stdout) == reached
    assert curve(run) == curve(finished()) and len(curve(run)) == STEPS
    assert digest(run) == digest(finished())
    assert json.loads((run / "MANIFEST.json").read_text())["status"] == "done"
