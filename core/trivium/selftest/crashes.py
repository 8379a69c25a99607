"""The checkpoint writer, killed before, in the midst of and after every call it makes on the file system."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trivium.selftest.harness import Bench, Row, checkpoints, ensure, ensure_equal, sound, tally

STEPS, EVERY, SAVE = 12, 3, 9
SETTINGS = (f"trainer.max_steps={STEPS}", f"checkpoint.every_steps={EVERY}", "validation.every_steps=6")


def calls_of_a_save(bench: Bench) -> list[list[Any]]:
    """Every call of the save of step 9, which also removes that of step 3: [function, path, number]."""
    record = bench.folder / "calls.jsonl"

    def make(run: Path) -> None:
        record.unlink(missing_ok=True)
        faults = {"root": str(run), "record": str(record)}
        done = bench.fork(*bench.command("pretrain", run, *SETTINGS), faults=faults).done()
        ensure(done.returncode == 0, done.err)

    bench.once("recorded", make)
    calls = [json.loads(line) for line in record.read_text().splitlines()]
    calls = [c for c in calls if c[1].startswith("checkpoints") or c[0] == "fsync"]
    calls = [c for c in calls if c[0] != "read"]
    first, following = (calls.index(["mkdir", f"checkpoints/step-{s}.tmp", 1]) for s in (SAVE, SAVE + EVERY))
    return calls[first:following]


def points(bench: Bench) -> list[list[Any]]:
    """Every place to die in: before and after each call, and half way through each write.

    Of many writes to one file the first, the one in the middle and the last stand for all.
    """
    calls, found = calls_of_a_save(bench), []
    for function, path, number in calls:
        same = [n for f, p, n in calls if (f, p) == (function, path)]
        if number in (same[0], same[len(same) // 2], same[-1]):
            times = ("before", "half", "after") if function == "write" else ("before", "after")
            found += [[function, path, number, when, "kill"] for when in times]
    return found


def survive(bench: Bench, chosen: Callable[[list], list] = list, *more: str) -> Row:
    """Die at each of the chosen points; then what is there must be sound, and the same command must go on bitwise.

    more: overrides, such as of how checkpoints are written.
    """
    every = points(bench)
    whole = bench.unbroken("pretrain", *SETTINGS)

    def die(point: list[Any]) -> str:
        name = f"{point[3]} {point[0]} {point[2]} of {point[1]}"
        run = bench.place("crashes")
        command = bench.command("pretrain", run, *SETTINGS, *more)
        process = bench.fork(*command, faults={"root": str(run), "point": point}).done()
        ensure(process.returncode == -signal.SIGKILL, f"{name}: never came ({process.returncode})", process.err)
        left = [p.name for p in checkpoints(run)]
        ensure(left and set(left) <= {"step-3", "step-6", "step-9"}, f"{name}: left {left}")
        for checkpoint in checkpoints(run):
            sound(checkpoint)
        again = bench.finish(command)
        ensure(f"continues from {run}/checkpoints/{left[-1]}" in again.out.replace("\n", ""), f"{name}: {again.out}")
        ensure_equal(run, whole)
        return name

    named = len({tuple(p[:2]) for p in every})
    found = bench.each(die, chosen(every))
    title = f"crash points of the writer{', ' + ' '.join(more) if more else ''}"
    return tally(title, found, lambda _: f"of {len(every)} points in {named} calls; 0 steps differ")
