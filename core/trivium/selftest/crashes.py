"""The checkpoint writer, killed before, in the midst of and after every call it makes on the file system."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trivium.selftest.harness import Bench, Row, checkpoints, ensure, ensure_equal, sound, tally

STEPS, EVERY, SAVE = 12, 4, 8
SETTINGS = (
    *(f"trainer.max_steps={STEPS}", f"checkpoint.every_steps={EVERY}"),
    *("checkpoint.keep=1", "validation.every_steps=6"),
)


def calls_of_a_save(bench: Bench) -> list[list[Any]]:
    """Every call of the save of step 8, which also removes that of step 4: [function, path, number]."""
    record = bench.folder / "calls.jsonl"

    def make(run: Path) -> None:
        record.unlink(missing_ok=True)
        faults = {"root": str(run), "record": str(record)}
        done = bench.fork(*bench.command("pretrain", run, *SETTINGS), faults=faults).done()
        ensure(done.returncode == 0, done.err)

    bench.once("recorded", make)
    calls = [json.loads(line) for line in record.read_text().splitlines()]
    calls = [c for c in calls if c[1].startswith("checkpoints") and c[0] != "read"]
    first, following = (calls.index(["mkdir", f"checkpoints/step-{s}.tmp", 1]) for s in (SAVE, SAVE + EVERY))
    return calls[first:following]


def points(bench: Bench) -> list[list[Any]]:
    """Every place to die in: before and after each call, and half way through each write."""
    found = []
    for call in calls_of_a_save(bench):
        found += [[*call, when, "kill"] for when in ("before", "half", "after") if when != "half" or call[0] == "write"]
    return found


def survive(bench: Bench, chosen: Callable[[list], list] = list) -> Row:
    """Die at each of the chosen points; then what is there must be sound, and the same command must go on bitwise."""
    every = points(bench)
    whole = bench.unbroken("pretrain", *SETTINGS)

    def die(point: list[Any]) -> str:
        name = f"{point[3]} {point[0]} of {point[1]}"
        run = bench.place("crashes")
        command = bench.command("pretrain", run, *SETTINGS)
        process = bench.fork(*command, faults={"root": str(run), "point": point}).done()
        ensure(process.returncode == -signal.SIGKILL, f"{name}: never came ({process.returncode})", process.err)
        left = [p.name for p in checkpoints(run)]
        ensure(left and set(left) <= {"step-4", "step-8"}, f"{name}: left {left}")
        for checkpoint in checkpoints(run):
            sound(checkpoint)
        again = bench.finish(command)
        ensure(f"continues from {run}/checkpoints/{left[-1]}" in again.out.replace("\n", ""), f"{name}: {again.out}")
        ensure_equal(run, whole)
        return name

    named = len({tuple(p[:2]) for p in every})
    found = bench.each(die, chosen(every))
    return tally("crash points of the writer", found, lambda _: f"{len(every)} points, {named} calls; 0 steps differ")
