"""SIGTERM, SIGINT and SIGUSR1 at every phase of a run, twice in a row, and while the data never comes.

Promised: 143 if every step that was done is in a checkpoint; where none was done yet the signal may end the process
itself (as nothing is lost); never a stack trace; and the same command goes on, bit for bit.
"""

from __future__ import annotations

import os
import random
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

from trivium.selftest.harness import (
    Bench,
    Broken,
    Row,
    checkpoints,
    ensure,
    ensure_equal,
    one_sentence,
    step_of,
    stop_when,
    tally,
)

NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
PHASES = (
    *("start-up", "data preparation", "before the first step"),
    *("in a step", "in validation", "in a save", "at the end"),
)
STEPS, EVERY = 30, 10
SETTINGS = (f"trainer.max_steps={STEPS}", f"checkpoint.every_steps={EVERY}", "validation.every_steps=5")
TRACES = ("Traceback", "KeyboardInterrupt", "Exception ignored")


def survive(bench: Bench, cases: list[tuple[str, signal.Signals]] | None = None, seed: int = 0) -> Row:
    """One signal to a live process in the given phases, then the same command."""
    whole = bench.unbroken("pretrain", *SETTINGS)
    draw = random.Random(seed)
    cases = cases or [(phase, number) for phase in PHASES for number in NUMBERS]

    def send(case: tuple[str, signal.Signals]) -> float:
        phase, number = case
        try:
            return _sent(bench, whole, phase, number, draw.random())
        except (Broken, TimeoutError) as error:
            raise Broken(f"{number.name} {phase}: {error}") from error

    found = bench.each(send, cases)
    return tally("signals", found, lambda good: f"ended {max(good):.1f} s after the signal; 0 steps differ")


def _sent(bench: Bench, whole: Path, phase: str, number: signal.Signals, chance: float) -> float:
    run = bench.place("signals")
    command = bench.command("pretrain", run, *SETTINGS)
    start = bench.spawn if phase == "start-up" else bench.fork
    process = start(*command, **_planned(bench, phase, run))
    if phase == "start-up":
        time.sleep(2 * chance)
        ensure(process.freeze() and not process.out, "the start was over before the signal")
    else:
        stop_when(process, _moments(run, chance)[phase], phase)
    process.send_signal(number)
    process.thaw()
    began = time.monotonic()
    process.wait()
    took = time.monotonic() - began
    said = process.out + process.err
    ensure(not any(trace in said for trace in TRACES), f"a stack trace: {said}")
    done = step_of(run)
    saved = [int(p.name[5:]) for p in checkpoints(run)]
    if phase in PHASES[3:]:
        ensure(process.returncode in (143, 0) and done, f"exit code {process.returncode} after step {done}: {said}")
        ensure(saved and saved[-1] == done, f"step {done} was done, {saved} are saved")
        ensure(process.returncode == 143 or done == STEPS, f"exit code 0 at step {done}")
        ensure(not process.err, process.err)
        if process.returncode == 143:
            ensure(re.search(rf"stopped by signal {int(number)} after step {done}, saved", said), said)
    else:
        ensure(process.returncode in (143, -number), f"exit code {process.returncode}: {said}")
        ensure(process.returncode == 143 or not done, f"died of the signal after step {done}")
        ensure(not done or saved[-1:] == [done], f"step {done} was done, {saved} are saved")
    bench.finish(command)
    ensure_equal(run, whole)
    return took


def _planned(bench: Bench, phase: str, run: Path) -> dict:
    """A cache of its own where the data is to be prepared anew, and marks of what the process is at."""
    if phase == "data preparation":
        return {"environment": {"TRIVIUM_CACHE": str(run.parent / f"{run.name}-cache")}}
    marks = {method: f"{run}-{method}" for method in ("take_step", "validation_loss")}
    return {"faults": {"root": str(run), "marks": marks}} if phase in PHASES[3:5] else {}


def _moments(run: Path, chance: float) -> dict[str, Callable[[], bool]]:
    """By phase, when a live process is in it."""
    log, folder = run / "log.txt", run / "checkpoints"
    step = 2 + int(chance * (STEPS - 10))
    at_work, validating = Path(f"{run}-take_step"), Path(f"{run}-validation_loss")

    def saving() -> bool:
        return folder.is_dir() and any(".tmp-" in name for name in os.listdir(folder))

    return {
        "data preparation": lambda: (run / ".lock").is_file() and not (log.is_file() and "memory" in log.read_text()),
        "before the first step": lambda: log.is_file() and "memory" in log.read_text() and not step_of(run),
        "in a step": lambda: step <= step_of(run) and at_work.exists(),
        "in validation": lambda: step <= step_of(run) and validating.exists(),
        "in a save": saving,
        "at the end": lambda: step_of(run) >= STEPS - 1,
    }


def in_a_rollout(bench: Bench, count: int, seed: int) -> Row:
    """The signal comes in the first of two steps on one rollout: the second is still taken, then it saves and ends."""
    settings = (f"trainer.max_steps={STEPS}", "checkpoint.every_steps=1000")
    whole, draw = bench.unbroken("rlhf", *settings), random.Random(seed)

    def send(step: int) -> int:
        run = bench.place("rollouts")
        command = bench.command("rlhf", run, *settings)
        process = bench.fork(*command)
        stop_when(process, lambda: step_of(run) >= step and step_of(run) % 2 == 0, f"an even step after {step}")
        reached = step_of(run)
        process.send_signal(signal.SIGTERM)
        process.thaw()
        ensure(process.wait() == 143 and not process.err, f"exit code {process.returncode}: {process.err}")
        saved = step_of(run)
        # the figures of a step are read one step late, and the stop may come right before the save of that step
        ensure(saved % 2 == 0 and reached <= saved <= reached + 4, f"reached {reached}, saved {saved}")
        ensure([p.name for p in checkpoints(run)] == [f"step-{saved}"], f"step {saved} done, {checkpoints(run)} saved")
        bench.finish(command)
        ensure_equal(run, whole)
        return saved - reached

    found = bench.each(send, [draw.randint(6, STEPS - 16) for _ in range(count)])
    return tally("signal in a rollout", found, lambda good: f"saved up to {max(good)} steps later; 0 steps differ")


def double(bench: Bench, count: int) -> Row:
    """A second signal right after the first: the process is gone at once, the newest checkpoint is sound."""
    whole = bench.unbroken("pretrain", *SETTINGS)

    def send(number: int) -> float:
        run = bench.place("double")
        command = bench.command("pretrain", run, *SETTINGS)
        stalled = run.parent / f"{run.name}-stalled"
        process = bench.fork(
            *command, faults={"root": str(run), "stall": ["data", 15]}, environment={"STALLED": str(stalled)}
        )
        stop_when(process, stalled.exists, "the data to stand still")
        process.thaw()
        process.send_signal(NUMBERS[number % 3])
        time.sleep(0.3)
        ensure(process.poll() is None, f"ended at the first signal with {process.returncode}")
        began = time.monotonic()
        process.send_signal(NUMBERS[(number + 1) % 3])
        process.wait(30)
        took = time.monotonic() - began
        ensure(process.returncode == 1 and "at once by a second signal" in process.err, process.err)
        ensure(process.err.count("\n") == 1 and took < 5, f"took {took:.1f} s: {process.err}")
        bench.finish(command)
        ensure_equal(run, whole)
        return took

    found = bench.each(send, range(count))
    return tally("second signal", found, lambda good: f"gone after {max(good):.2f} s")


def stuck(bench: Bench, count: int) -> Row:
    """Data that never comes, or a step that never ends: gone after stop.deadline, and saved where that can be."""
    whole, deadline = bench.unbroken("pretrain", *SETTINGS), 2

    def send(number: int) -> float:
        run, what = bench.place("stuck"), ("data", "step")[number % 2]
        command = bench.command("pretrain", run, *SETTINGS, f"stop.deadline={deadline}")
        stalled, step = run.parent / f"{run.name}-stalled", 13 + number % 6
        faults = {"root": str(run), "stall": [what, step]}
        process = bench.fork(*command, faults=faults, environment={"STALLED": str(stalled)})
        stop_when(process, stalled.exists, f"the {what} to stand still")
        process.thaw()
        began = time.monotonic()
        process.send_signal(NUMBERS[number % 3])
        process.wait()
        took = time.monotonic() - began
        saved = int(checkpoints(run)[-1].name[5:])
        if what == "data":
            ensure(process.returncode == 143, f"exit code {process.returncode}: {process.err}")
            ensure(f"and {deadline} s (stop.deadline); every step that was done is saved" in process.out, process.out)
            ensure(saved == step == step_of(run), f"step {step} was done, {saved} is saved, {step_of(run)} recorded")
        else:
            said = one_sentence(process)
            ensure(saved == 10 and f"step {step + 1} takes longer; the newest checkpoint has step 10" in said, said)
        bench.finish(command)
        ensure_equal(run, whole)
        return took

    found = bench.each(send, range(count))
    return tally(
        "stuck data, stuck step", found, lambda good: f"ended {max(good):.1f} s after the signal, of {deadline} s"
    )
