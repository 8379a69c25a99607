"""The figures of a run: what each stage took, what it reached, and what it gained or cost against where it began."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from trivium.lineage.runs import Interval, Run, Stage, as_dict, finite, first


@dataclass(frozen=True)
class Change:
    """What a stage gained or cost against `versus`.

    above: whether that is the row above in the table of results. clear: false when the intervals overlap.
    """

    word: str
    amount: str
    unit: str
    versus: str
    above: bool
    clear: bool

    @property
    def tone(self) -> str:
        """gained, cost, or faint for what may be chance."""
        return self.word if self.clear else "faint"


@dataclass(frozen=True)
class Cell:
    """One figure as text."""

    text: str
    interval: str = ""
    change: Change | None = None
    value: Interval | None = None


@dataclass(frozen=True)
class Measure:
    """How an evaluation's figure is written, which way is better (+1 higher, -1 lower), and what a change counts in."""

    heading: str = ""
    digits: int = 3
    better: int = +1
    scale: float = 1.0
    sign: str = ""
    unit: str = ""

    def show(self, value: float) -> str:
        """The value at the measure's scale, without its sign."""
        return f"{self.scale * value:.{self.digits}f}"

    def cell(self, interval: Interval | None, change: Change | None = None) -> Cell | None:
        """The figure with its interval, or None when it was not measured."""
        if interval is None:
            return None
        low, high, bounds = interval.low, interval.high, ""
        if low is not None and high is not None:
            bounds = f"{self.show(low)}{'–' if low >= 0 else ' to '}{self.show(high)}"  # a dash before a minus misleads
        return Cell(self.show(interval.value) + self.sign, bounds, change, interval)

    def change(self, now: Interval, before: Interval, versus: str, above: bool = True) -> Change:
        """`now` against `before`, the sign said in words."""
        gain = round(self.better * self.scale * (now.value - before.value), self.digits)
        if gain == 0:
            return Change("no change", "", "", versus, above, clear=False)
        word, amount = "gained" if gain > 0 else "cost", f"{abs(gain):.{self.digits}f}"
        return Change(word, amount, self.unit, versus, above, clear=not now.overlaps(before))


_SHARE: dict[str, Any] = {"digits": 1, "scale": 100, "sign": "%", "unit": " points"}
MEASURES = {
    "bits_per_byte": Measure("bits per byte", better=-1),
    "answer_bits_per_byte": Measure("bits per byte of answers", better=-1),
    "accuracy": Measure("accuracy", **_SHARE),
    "preference": Measure("chosen over rejected", **_SHARE),
    "reward": Measure("reward"),
    "kl_to_teacher": Measure("KL to teacher", better=-1),
}
BY_TASK = ("accuracy", "preference")
"""Measures that an evaluation splits by task, as accuracy/TASK."""


@dataclass(frozen=True)
class Row:
    """A stage with the evaluation of it, and what changed since the stage it is compared with."""

    stage: Stage
    results: dict[str, Interval]
    changes: dict[str, Change] = field(default_factory=dict)


def stage_rows(run: Run) -> list[Row]:
    """A row for each trained stage and each evaluation of a model trained elsewhere; else for what there is."""
    measured = {m.name: {k: v for e in run.of(m, "evaluate") for k, v in e.results.items()} for m in run.models}
    rows: list[Row] = []
    above = ""
    for stage in run.models:
        results, changes = measured[stage.name], {}
        for name in MEASURES.keys() & results.keys():
            # an ancestor that was not measured in this is stepped over
            others = [s.name for s in run.compared(stage) if name in measured.get(s.name, {})]
            if others:
                before = measured[others[0]][name]
                changes[name] = MEASURES[name].change(results[name], before, others[0], others[0] == above)
        rows.append(Row(stage, results, changes))
        above = stage.name if MEASURES.keys() & results.keys() else above
    rows += [Row(stage, stage.results) for stage in run.alone("evaluate")]
    return rows or [Row(stage, {}) for stage in run.stages if stage.manifest]


def _tokens_per_second(stage: Stage) -> float | None:
    # the median step: the first ones warm up and some save a checkpoint
    speeds = [speed for _, speed in stage.curve("tokens_per_second")]
    return median(speeds) if speeds else None


def _mfu(stage: Stage) -> float | None:
    shares = [share for _, share in stage.curve("mfu")]
    return median(shares) if shares else None


def _steps(stage: Stage) -> float | None:
    return first(finite(stage.manifest.get("steps")), stage.metrics[-1]["step"] if stage.metrics else None)


def tokens_seen(stage: Stage) -> float | None:
    """Tokens trained on, from the first step on."""
    return first(finite(stage.manifest.get("tokens_seen")), stage.last("tokens"))


def _loss(stage: Stage, key: str) -> float | None:
    if stage.curve("rollout/reward"):
        return None  # a policy gradient's loss is no measure of anything
    return first(stage.last(key), finite(as_dict(stage.manifest.get("results")).get(key)))


def _figure(read: Callable[[Stage], Any], show: Callable[[float], str]) -> Callable[[Row], Cell | None]:
    return lambda row: None if (number := finite(read(row.stage))) is None else Cell(show(number))


def _result(name: str) -> Callable[[Row], Cell | None]:
    return lambda row: MEASURES[name].cell(row.results.get(name), row.changes.get(name))


CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""C0, C1 and delete, but for newline and tab: what terminals obey."""


def safe_text(text: str) -> str:
    """Somebody's text as a terminal may be given it: control characters as the escapes that name them.

    >>> safe_text("a\x1b[2J\\tb")
    'a\\\\x1b[2J\\tb'
    """
    return CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def count_text(number: float) -> str:
    """A count as people say it.

    >>> count_text(4096), count_text(24_300), count_text(2_570_304)
    ('4,096', '24.3k', '2.57M')
    """
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e4, "k")):
        if number >= size:
            return f"{number / 1e3:.1f}k" if letter == "k" else f"{number / size:.2f}{letter}"
    return whole_text(number)


def time_text(seconds: float) -> str:
    """A duration as people say it.

    >>> time_text(8.25), time_text(120.3), time_text(3900)
    ('8.2s', '2m 00s', '1h 05m')
    """
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m {rest:02d}s" if minutes < 60 else f"{minutes // 60}h {minutes % 60:02d}m"


def memory_text(number: float) -> str:
    """Bytes as people say them.

    >>> memory_text(1_234_567_890), memory_text(45_600_000)
    ('1.2 GB', '46 MB')
    """
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.0f} MB"


def whole_text(number: float) -> str:
    """A whole number with its thousands apart."""
    return f"{number:,.0f}"


def _loss_text(value: float) -> str:
    return f"{value:.3f}"


Columns = dict[str, Callable[[Row], Cell | None]]
TRAINING: Columns = {
    "parameters": _figure(lambda stage: stage.parameters, count_text),
    "steps": _figure(_steps, whole_text),
    "tokens": _figure(tokens_seen, count_text),
    "time": _figure(lambda stage: stage.seconds, time_text),
    "tokens/s": _figure(_tokens_per_second, whole_text),
    "MFU": _figure(_mfu, lambda share: f"{100 * share:.1f}%"),
    "memory": _figure(lambda stage: stage.manifest.get("peak_memory"), memory_text),
    "train loss": _figure(lambda stage: _loss(stage, "train/loss"), _loss_text),
    "val loss": _figure(lambda stage: _loss(stage, "val/loss"), _loss_text),
}
RESULTS: Columns = {measure.heading: _result(name) for name, measure in MEASURES.items()}


@dataclass(frozen=True)
class Figures:
    """A table: headings beside "stage", and each row's cells under them."""

    headings: list[str]
    rows: list[tuple[Row, list[Cell | None]]]


def figures(rows: Sequence[Row], columns: Columns) -> Figures:
    """The columns that have a value in some row, and the rows that have one in some column."""
    made = {heading: [cell(row) for row in rows] for heading, cell in columns.items()}
    made = {heading: cells for heading, cells in made.items() if any(cells)}
    lines = [(row, [cells[i] for cells in made.values()]) for i, row in enumerate(rows)]
    return Figures(list(made), [(row, cells) for row, cells in lines if any(cells)])


def results_table(rows: Sequence[Row], names: Sequence[str], measure: Measure) -> dict[str, Any] | None:
    """One line per measure and one column per stage that was evaluated, or None when none of `names` was measured."""
    rows = [row for row in rows if any(name in row.results for name in names)]
    lines = [(name, [measure.cell(row.results.get(name)) for row in rows]) for name in names]
    return {"stages": [row.stage.name for row in rows], "lines": lines} if rows else None


def task_table(rows: Sequence[Row], name: str) -> dict[str, Any] | None:
    """A measure's value in each task, and the mean."""
    tasks = sorted({n for row in rows for n in row.results if n.startswith(f"{name}/")})
    return results_table(rows, [*tasks, name], MEASURES[name]) if tasks else None  # the mean alone stands elsewhere


def other_table(rows: Sequence[Row]) -> dict[str, Any] | None:
    """What an evaluation measured beside what we know of."""
    by_task = tuple(f"{name}/" for name in BY_TASK)
    names = {n for row in rows for n in row.results if n not in MEASURES and not n.startswith(by_task)}
    return results_table(rows, sorted(names), Measure())
