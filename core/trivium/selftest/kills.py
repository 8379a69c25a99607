"""kill -9 at random moments of real runs: the joined run is bit for bit the undisturbed one."""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from trivium.selftest.harness import (
    Bench,
    Process,
    Row,
    checkpoints,
    continued_from,
    ensure,
    ensure_equal,
    rows_of,
    step_of,
    stop_when,
    tally,
)
from trivium.selftest.recipes import RECIPES

EARLY, SAVE, EPOCH = "before the first checkpoint", "in a save", "at an epoch's end"
ANY, START = "anywhere", "in start-up"
PRETRAINING = (
    (EARLY, SAVE, EPOCH, ANY, ANY),
    (EARLY, SAVE, ANY, EPOCH, ANY),
    (EARLY, SAVE, ANY, ANY, START),
    (ANY, SAVE, EPOCH, ANY, START),
    (ANY, ANY, SAVE, ANY, ANY),
)
"""Chains of five kills, one after the other on one run: 25, of which 5 in a save, 3 at epoch ends, 3 early, 2 in
start-up."""
OTHERS = {name: ((ANY, SAVE, ANY, ANY, SAVE, ANY),) for name in RECIPES if name != "pretrain"}
QUICK = {
    "pretrain": ((EARLY, SAVE, EPOCH),),
    **{name: ((SAVE,),) for name in ("sft", "kto", "distill")},
    **{name: ((ANY,),) for name in ("preference", "reward", "rlhf")},
}
"""A part of them, for every objective that has state or companions of its own."""


def lengths(steps: int, every: int) -> tuple[str, ...]:
    """Overrides: how long, and how often a checkpoint."""
    return f"trainer.max_steps={steps}", f"checkpoint.every_steps={every}"


def survive(
    bench: Bench, recipe: str, chains: Sequence[Sequence[str]], steps: int, every: int, seed: int,
    environment: dict[str, str] | None = None, title: str = "",
) -> Row:  # fmt: skip
    """Kill runs of a recipe in chains; each kill is one that was tried."""
    changes = lengths(steps, every)
    whole = bench.unbroken(recipe, *changes)
    learns(recipe, whole)
    draw = random.Random(seed)
    seeds = [(chain, draw.getrandbits(32)) for chain in chains]

    def chain(item: tuple[Sequence[str], int]) -> list[int]:
        kinds, own = item
        run = bench.place(f"kills-{recipe}")
        return killed(bench, bench.command(recipe, run, *changes), run, whole, kinds, every, random.Random(own),
                      RECIPES[recipe].updates, environment or {})  # fmt: skip

    found = bench.each(chain, seeds)
    row = tally(title or f"kill -9, {recipe}", found, lambda _: "0 steps differ")
    row.tried = sum(map(len, chains))
    row.survived = sum(len(kinds) for kinds, f in zip(chains, found, strict=True) if not isinstance(f, Exception))
    return row


def killed(
    bench: Bench, command: list[str], run: Path, whole: Path, kinds: Sequence[str], every: int, draw: random.Random,
    updates: int, environment: dict[str, str],
) -> list[int]:  # fmt: skip
    """One run, killed once for each kind, then finished and compared; returns the steps it was killed at."""
    steps, at, ends = len(rows_of(whole)), [], epoch_ends(whole)
    share = steps / (len(kinds) + 1)
    for number, kind in enumerate(kinds):
        low, high = (every + 1 if number else 1), steps - 2
        step = min(high, max(low, int(share * number + draw.uniform(0.3, 1.0) * share)))
        if kind == START:
            process = bench.spawn(*command, environment=environment)
            before = step_of(run)
            time.sleep(draw.uniform(0.1, 1.5))
            ensure(step_of(run) == before and not process.out, "the start was over before the kill")
        else:
            written = identity(run)
            process = bench.fork(*command, environment=environment)
            moment, what = _moment(kind, process, run, step, every, ends, draw, updates)
            # the figures that are there at first are those of the process before
            stop_when(process, lambda old=written, due=moment: identity(run) != old and due(), what)
        reached = step_of(run)
        ensure(reached < steps, f"too late: step {reached} of {steps}")
        saved = [int(p.name[5:]) for p in checkpoints(run)]
        process.kill()
        if at and kind != START:
            ensure(continued_from(process) in at[-1][1], f"continued from {continued_from(process)}, not {at[-1][1]}")
        # a kill between a checkpoint's rename and this look at the folder cannot be: the process was frozen
        at.append((reached, saved[-1:] or [0]))
        _half_a_line(run)
    last = bench.fork(*command, environment=environment).done()
    ensure(last.returncode == 0, last.err)
    ensure(continued_from(last) in at[-1][1], f"continued from {continued_from(last)}, not {at[-1][1]}")
    ensure_equal(run, whole)
    return [step for step, _ in at]


def _moment(
    kind: str, process: Process, run: Path, step: int, every: int, ends: list[int], draw: random.Random, updates: int
) -> tuple[Callable[[], bool], str]:
    """When to kill, and its name."""
    if kind == SAVE:

        def saving() -> bool:
            folder = run / "checkpoints"
            names = os.listdir(folder) if folder.is_dir() else []
            own = [n for n in names if re.fullmatch(rf"step-(\d+)\.tmp-{process.pid}\S*", n)]
            return any(int(n[5 : n.index(".")]) >= step - every and n[: n.index(".")] not in names for n in own)

        return saving, f"a save after step {step - every}"
    if kind == EARLY:
        step = draw.randint(1, every - 2)
        return lambda: step_of(run) >= step and not checkpoints(run), f"step {step}, before a checkpoint"
    if kind == EPOCH:
        end = draw.choice([e for e in ends if e >= step - every] or ends[-1:])
        return lambda: abs(step_of(run) - end) <= 1, f"the epoch's end at step {end}"
    remainder = draw.randrange(updates)
    return lambda: (s := step_of(run)) >= step and s % updates == remainder, f"step {step}"


def epoch_ends(whole: Path) -> list[int]:
    """The steps at which all data has been read once, twice, ...: tokens seen against tokens of the data."""
    found = re.search(r"epochs of ([\d.]+) ?([kM]?)", (whole / "log.txt").read_text())
    rows = rows_of(whole)
    if not found or rows[-1].get("tokens", 0) == 0:
        return []
    size = float(found[1]) * {"": 1, "k": 1e3, "M": 1e6}[found[2]]
    pairs = zip(rows, rows[1:], strict=False)
    return [b["step"] for a, b in pairs if a["tokens"] // size != b["tokens"] // size]


def learns(recipe: str, whole: Path) -> None:
    """A run whose weights stand still, or whose loss is always the same, would be equal however it is resumed."""
    rows = rows_of(whole)
    ensure(len({r["train/loss"] for r in rows}) > 0.8 * len(rows), f"{recipe}: the loss stands still")
    ensure(all(r["grad_norm"] > 0 for r in rows), f"{recipe}: nothing is learned")
    if recipe == "rlhf":  # some groups differ in their rewards, so there is something to learn from the samples
        ensure(sum(r["rollout/idle_groups"] < 1 for r in rows) > len(rows) / 2, "rlhf: all rewards are equal")


def identity(run: Path) -> int:
    """Of metrics.jsonl as a file: every start of a run writes it anew."""
    path = run / "metrics.jsonl"
    return path.stat().st_ino if path.is_file() else 0


def _half_a_line(run: Path) -> None:
    """What a kill inside the write of a line would have left."""
    if (run / "metrics.jsonl").is_file():
        with open(run / "metrics.jsonl", "a") as log, open(run / "metrics.csv", "a") as table:
            log.write('{"step": 999, "train/lo')
            table.write("999,0.1")
