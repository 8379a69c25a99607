"""`selftest faults`: the promises of docs/reliability.md, put to the test on the file system at hand."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from trivium.disk import make_folder
from trivium.errors import ConfigError
from trivium.selftest import crashes, disk, flips, kills, poison, refusals, signals
from trivium.selftest.harness import Bench, Broken, Row

USAGE = "write `selftest faults [--quick] [--runs=FOLDER] [--seed=N]`"


def selftest(args: list[str]) -> int:
    """The verb: run the faults, print the table; 1 if a promise was not kept."""
    options = {name: value for name, _, value in (a.partition("=") for a in args[1:])}
    if args[:1] != ["faults"] or options.keys() - {"--quick", "--runs", "--seed"}:
        raise ConfigError(USAGE)
    if not options.get("--seed", "0").isdigit():
        raise ConfigError(f"--seed={options['--seed']} is not a whole number; {USAGE}")
    console, quick = Console(soft_wrap=True), "--quick" in options
    seed = int(options.get("--seed", 0))
    place = make_folder(Path(options.get("--runs", ".")))
    folder = Path(tempfile.mkdtemp(prefix="selftest-", dir=place))
    console.print(f"faults on the file system of {folder}{' (a quick part of them)' if quick else ''}", highlight=False)
    bench = Bench(folder, workers=max(1, min(4, (os.cpu_count() or 2) // 2)))
    try:
        rows = [_row(console, part, bench) for part in parts(quick, seed).values()]
    finally:
        bench.close()
    console.print(table(rows))
    broken = [r for r in rows if not r.ok]
    for row in broken:
        for fault in row.faults:
            console.print(f"{row.name}: {fault}", highlight=False, markup=False)
    if broken:
        console.print(f"what is left of them: {folder}", highlight=False)
        return 1
    shutil.rmtree(folder)
    return 0


def parts(quick: bool, seed: int) -> dict[str, Callable[[Bench], Row]]:
    """What is run, by name and in order: the whole, or a part of every kind."""
    draw = random.Random(seed)

    def some(count: int) -> Callable[[list], list]:
        return lambda items: draw.sample(items, count) if quick else items

    def killing(name: str) -> Callable[[Bench], Row]:
        steps = 36 if quick else 200 if name == "pretrain" else 60
        return lambda bench: kills.survive(bench, name, chains[name], steps, 9, seed)

    chains = kills.QUICK if quick else {"pretrain": kills.PRETRAINING, **kills.OTHERS}
    cases = [(phase, signals.NUMBERS[i % 3]) for i, phase in enumerate(signals.PHASES)] if quick else None
    planted = [("nan", "loss", "stop"), ("inf", "gradient", "skip"), ("1e30", "micro_batch", "rollback")]
    return {
        **{f"kills-{name}": killing(name) for name in chains},
        "kills-elsewhere": lambda bench: elsewhere(bench, 2 if quick else 12, seed),
        "crashes": lambda bench: crashes.survive(bench, some(4)),
        "crashes-async": lambda bench: crashes.survive(
            bench, lambda items: draw.sample(items, 2 if quick else 40), "checkpoint.async_save=true"
        ),
        "disk": lambda bench: disk.survive(bench, some(3)),
        "flips": lambda bench: flips.notice(bench, 40 if quick else 200, 3 if quick else 20, seed),
        "flips-cache": lambda bench: flips.make_anew(bench, 1 if quick else 10, seed),
        "signals": lambda bench: signals.survive(bench, cases, seed),
        "signals-rollout": lambda bench: signals.in_a_rollout(bench, 1 if quick else 4, seed),
        "signals-double": lambda bench: signals.double(bench, 1 if quick else 3),
        "signals-stuck": lambda bench: signals.stuck(bench, 2 if quick else 6),
        "refusals": lambda bench: refusals.refuse(bench, *([3] if quick else [])),
        "poison": lambda bench: poison.survive(bench, planted if quick else None),
        "poison-kills": lambda bench: poison.resume(
            bench, ("rollback",) if quick else ("skip", "rollback"), 1 if quick else 3, seed
        ),
    }


def elsewhere(bench: Bench, count: int, seed: int) -> Row:
    """kill -9 with $TMPDIR on another file system than the run's."""
    name = "kill -9, $TMPDIR elsewhere"
    there = next((p for p in (Path("/dev/shm"), Path("/tmp"), Path("/var/tmp")) if _apart(p, bench.folder)), None)
    if there is None:
        return Row(name, 0, 0, "skipped: no second file system here", [], skipped=True)
    temporary = tempfile.mkdtemp(prefix="selftest-", dir=there)
    try:
        kinds = (kills.SAVE, kills.ANY, kills.SAVE) if count > 2 else (kills.SAVE, kills.ANY)
        chains = [kinds] * max(1, count // 3)
        return kills.survive(bench, "pretrain", chains, 60 if count > 2 else 36, 9, seed, {"TMPDIR": temporary}, name)
    finally:
        shutil.rmtree(temporary)


def _apart(path: Path, folder: Path) -> bool:
    return path.is_dir() and os.access(path, os.W_OK) and path.stat().st_dev != folder.stat().st_dev


def _row(console: Console, part: Callable[[Bench], Row], bench: Bench) -> Row:
    began = time.monotonic()
    try:
        row = part(bench)
    except (Broken, TimeoutError) as error:
        row = Row("what is compared with", 1, 0, "-", [str(error)])
    console.print(f"  {row} ({time.monotonic() - began:.0f} s)", highlight=False, markup=False)
    return row


def table(rows: list[Row]) -> Table:
    """One line for each promise."""
    shown = Table("promise", "tried", "survived", "worst figure")
    for row in rows:
        colour = "yellow" if row.skipped else "green" if row.ok else "red"
        shown.add_row(row.name, f"{row.tried:,}", f"[{colour}]{row.survived:,}[/]", row.worst)
    return shown
