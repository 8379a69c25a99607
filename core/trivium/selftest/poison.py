"""NaN, infinities and 1e30 in a loss or a gradient of real runs: they never reach weights or optimizer."""

from __future__ import annotations

import math
import random
import re
from itertools import product
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from trivium.selftest.harness import (
    Bench,
    Broken,
    Row,
    checkpoints,
    ensure,
    ensure_equal,
    one_sentence,
    rows_of,
    step_of,
    stop_when,
    tally,
)
from trivium.selftest.kills import identity
from trivium.selftest.plugin import PLACES

VALUES = ("nan", "inf", "-inf", "1e30")
POLICIES = ("stop", "skip", "rollback")
SETTINGS = ("trainer.max_steps=30", "checkpoint.every_steps=3", "checkpoint.keep=99", "objective=poisoned")


def finite(run: Path) -> None:
    """Every number in every checkpoint of a run."""
    for path in run.rglob("checkpoints/step-*/*.safetensors"):
        for name, values in load_file(path).items():
            ensure(np.isfinite(values).all(), f"{path}: {name} is not finite")


def survive(bench: Bench, cases: list[tuple[str, str, str]] | None = None) -> Row:
    """Every value in every place under every policy."""
    cases = cases or list(product(VALUES, PLACES, POLICIES))

    def plant(case: tuple[str, str, str]) -> int:
        try:
            return _planted(bench, *case)
        except (Broken, TimeoutError) as error:
            raise Broken(f"{' '.join(case)}: {error}") from error

    found = bench.each(plant, cases)
    return tally("bad numbers", found, lambda good: f"all weights finite; {sum(good)} bad steps met")


def _planted(bench: Bench, value: str, place: str, policy: str) -> int:
    run = bench.place("poison")
    process = bench.fork(*_command(bench, run, value, place, policy)).done()
    finite(run)
    bad = salt_of(bench)[1]
    ensure(checkpoints(run), "nothing was saved before the bad step")
    if policy == "stop":
        said = one_sentence(process)
        ensure(f"step {bad}: " in said and "The step was not taken; the last checkpoint is sound" in said, said)
        return 1
    ensure(process.returncode == 0, process.err)
    rows = rows_of(run)
    ensure([r["step"] for r in rows] == list(range(1, 31)), "steps are missing")
    ensure(all(r["train/loss"] is None or math.isfinite(r["train/loss"]) for r in rows), "a loss is not finite")
    skipped = [r["step"] for r in rows if "skipped" in r]
    if policy == "skip":
        ensure(bad in skipped and f"step {bad}: loss or gradient not usable" in process.out.replace("\n", " "), skipped)
        return len(skipped)
    said = " ".join(process.out.split())
    ensure(not skipped and re.search(rf"step {bad}: loss [^;]+; back to step-\d+", said), process.out)
    return said.count("; back to step-")


def resume(bench: Bench, policies: tuple[str, ...] = ("skip", "rollback"), kills: int = 3, seed: int = 0) -> Row:
    """Bad steps and kill -9 in one run: what is joined is the run that was never killed."""

    def kill(policy: str) -> int:

        def undisturbed(path: Path) -> None:
            bench.finish(_command(bench, path, "nan", "loss", policy))

        whole = bench.once(f"poisoned/{policy}", undisturbed)
        run, draw = bench.place("poison-killed"), random.Random(seed)
        command = _command(bench, run, "nan", "loss", policy)
        for number in range(kills):
            written = identity(run)
            process = bench.fork(*command)
            step = max(step_of(run) + 1, int(26 * (number + draw.random()) / kills))
            stop_when(
                process, lambda old=written, step=step: identity(run) != old and step_of(run) >= step, f"step {step}"
            )
            ensure(step_of(run) < 30, "killed too late")
            process.kill()
        bench.finish(command)
        ensure_equal(run, whole)
        return kills

    found = bench.each(kill, policies)
    row = tally("bad numbers and kill -9", found, lambda _: "0 steps differ")
    row.tried, row.survived = row.tried * kills, row.survived * kills
    return row


def _command(bench: Bench, run: Path, value: str, place: str, policy: str, salt: int | None = None) -> list[str]:
    salt = salt_of(bench)[0] if salt is None else salt
    planted = (f"objective.value='{value}'", f"objective.place={place}", f"objective.salt={salt}")
    return bench.command("pretrain", run, *SETTINGS, *planted, f"guard.policy={policy}")


def salt_of(bench: Bench) -> tuple[int, int]:
    """A salt whose first bad step comes after a checkpoint, and that step."""

    def make(path: Path) -> None:
        path.mkdir()
        for salt in range(12):
            process = bench.fork(*_command(bench, path / f"{salt}", "nan", "loss", "stop", salt)).done()
            step = process.err.partition("step ")[2].partition(":")[0]
            if process.returncode == 1 and step.isdigit() and 5 <= int(step) <= 24:
                (path / "salt").write_text(f"{salt} {step}")
                return
        raise Broken("no salt plants a bad number after the first checkpoint")

    salt, step = (bench.once("salts", make) / "salt").read_text().split()
    return int(salt), int(step)
