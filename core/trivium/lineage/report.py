"""One page and one table that tell what a run did: figures, curves, samples, chat, lineage, config, next commands.

Reads only the files a run leaves behind (`MANIFEST.json`, `metrics.jsonl`, `samples.jsonl`), so it works on a run that
is still going, on one copied from elsewhere, and without the plugins that made it. What is missing is not shown.
The page is one file: no scripts, no links, pictures inline.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from io import StringIO
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from trivium.errors import DataError

MAX_PROMPTS = 24  # rows of the side-by-side table; the rest stays in samples.jsonl
MAX_TURNS = 60  # bubbles of one chat
MAX_POINTS = 800  # of a curve: more than a screen can show, and few enough for a small page

# The curves are drawn in these colours, then each is exchanged for a CSS variable so they follow light and dark mode.
AXIS, TRAIN, VALIDATION, SPEED = "#7f8791", "#3b6fd5", "#cf6a21", "#2f8f83"
CSS_COLOURS = {AXIS: "--axis", TRAIN: "--train", VALIDATION: "--val", SPEED: "--speed"}


def write_report(folder: Path) -> Path:
    """Write `folder/report.html` (the old one stays until the new one is whole) and return its path."""
    folder = Path(folder)
    html = _template().render(page_context(load_run(folder)))
    target, partial = folder / "report.html", folder / f".report.html.{os.getpid()}.tmp"
    try:
        # a model may emit half of a surrogate pair, which UTF-8 cannot hold
        partial.write_bytes(html.encode("utf-8", "replace"))
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return target


def summary_table(folder: Path) -> Table:
    """The figures of every trained stage for the terminal; columns without any value are left out."""
    headings, rows = figures(load_run(Path(folder)))
    # ten columns have to fit into 80 characters: no frame, headings broken at spaces, intervals on their own line
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=0)
    texts = [[f"{cell.text}\n{cell.interval}".strip() if cell else "" for cell in cells] for _, cells in rows]
    for heading, column in zip(headings, zip(*texts, strict=True), strict=True):
        if heading in ("stage", "phase"):
            table.add_column(
                heading, overflow="fold"
            )  # where it is still too narrow, names fold and numbers stay whole
        else:
            width = max(map(len, [*heading.split(), *"\n".join(column).split("\n")]))
            table.add_column(heading, justify="right", width=width)
    for line in texts:
        table.add_row(*map(Text, line))
    return table


# --- reading ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """One run folder; its files are read when asked for."""

    name: str
    phase: str
    folder: Path
    of: str | None
    manifest: dict[str, Any]

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """One record a step, in order; lines of the same step are merged."""
        steps: dict[int, dict[str, Any]] = {}
        for line in read_jsonl(self.folder / "metrics.jsonl"):
            step = line.get("step")
            if isinstance(step, int):
                # a resumed run takes some steps again: the later line is of the step that the weights took
                steps.setdefault(step, {}).update(line)
        return [steps[step] for step in sorted(steps)]

    @cached_property
    def samples(self) -> list[dict[str, Any]]:
        """The lines of samples.jsonl that hold a prompt and a completion."""
        lines = read_jsonl(self.folder / "samples.jsonl")
        return [x for x in lines if isinstance(x.get("prompt"), str) and isinstance(x.get("completion"), str)]

    def curve(self, key: str) -> list[tuple[int, float]]:
        """(step, value) wherever `key` was measured and is finite."""
        found = ((record["step"], _number(record.get(key))) for record in self.metrics)
        return [(step, value) for step, value in found if value is not None]

    def last(self, key: str) -> float | None:
        """The last finite value of a metric, or None."""
        curve = self.curve(key)
        return curve[-1][1] if curve else None

    @property
    def status(self) -> str:
        return str(self.manifest.get("status") or ("running" if self.manifest or self.metrics else "waiting"))

    @property
    def seconds(self) -> float | None:
        steps = self.curve("step_seconds")
        return _first(_number(self.manifest.get("seconds")), sum(s for _, s in steps) if steps else None)

    @property
    def results(self) -> dict[str, Interval]:
        """What an evaluation measured; entries that are not estimates are left out."""
        found = {name: Interval.read(entry) for name, entry in _dict(self.manifest.get("results")).items()}
        return {name: interval for name, interval in found.items() if interval}


@dataclass(frozen=True)
class Run:
    """A run folder: one stage, or a pipeline of them."""

    name: str
    folder: Path
    manifest: dict[str, Any]
    stages: list[Stage]

    @property
    def is_pipeline(self) -> bool:
        return isinstance(self.manifest.get("stages"), list)

    @property
    def models(self) -> list[Stage]:
        """The stages that trained, in order: those with a loss, or that an evaluation is of."""
        measured = {s.of for s in self.stages if s.phase == "evaluate" and s.results}
        return [s for s in self.stages if s.curve("train/loss") or s.name in measured]

    def of(self, stage: Stage, phase: str) -> list[Stage]:
        """The stages of `phase` that ran on what `stage` made."""
        return [s for s in self.stages if s.phase == phase and s.of == stage.name]

    def alone(self, phase: str) -> list[Stage]:
        """The stages of `phase` whose model was not trained here."""
        names = {model.name for model in self.models}
        return [s for s in self.stages if s.phase == phase and s.of not in names]


def load_run(folder: Path) -> Run:
    """The run in `folder`; raises DataError when there is none."""
    if not any((folder / name).is_file() for name in ("MANIFEST.json", "metrics.jsonl", "samples.jsonl")):
        raise DataError(f"no run in {folder}: it holds no MANIFEST.json. Give a run's own folder, such as runs/NAME")
    manifest = read_manifest(folder)
    name = str(manifest.get("name") or folder.resolve().name)
    entries = manifest.get("stages")
    if not isinstance(entries, list):
        return Run(name, folder, manifest, [_stage(folder, {"name": name})])
    stages = [_stage(folder / str(e.get("path", e["name"])), e) for e in map(_dict, entries) if e.get("name")]
    return Run(name, folder, manifest, stages)


def _stage(folder: Path, entry: dict[str, Any]) -> Stage:
    manifest = read_manifest(folder)
    phase = entry.get("phase") or manifest.get("phase") or ""
    return Stage(str(entry["name"]), str(phase), folder, entry.get("of") or manifest.get("of"), manifest)


def read_manifest(folder: Path) -> dict[str, Any]:
    """MANIFEST.json, or {} while it is missing or half-written."""
    try:
        return _dict(json.loads((folder / "MANIFEST.json").read_bytes()))
    except (OSError, ValueError):
        return {}


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; a missing file has none, and a line that was cut off is skipped."""
    objects = []
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError:
        return []
    for line in lines:
        try:
            objects.append(json.loads(line))
        except ValueError:  # cut off by a crash, even amid a character, or being written now
            continue
    return [x for x in objects if isinstance(x, dict)]


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> float | None:
    """A finite number, or None for anything else (json reads NaN and Infinity too)."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if good else None


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


# --- figures ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Interval:
    """An estimate and the interval around it; without one, low and high are None."""

    value: float
    low: float | None = None
    high: float | None = None

    @classmethod
    def read(cls, entry: Any) -> Interval | None:
        """From {"value", "low", "high"}; None when there is no value."""
        value, low, high = (_number(_dict(entry).get(key)) for key in ("value", "low", "high"))
        return None if value is None else cls(value, low, high)

    def overlaps(self, other: Interval) -> bool:
        """Whether both have intervals and these share a point."""
        if self.low is None or self.high is None or other.low is None or other.high is None:
            return False
        return self.low <= other.high and other.low <= self.high


@dataclass(frozen=True)
class Change:
    """What a stage gained or cost against an earlier one; not `clear` when the intervals overlap."""

    word: str
    amount: str
    versus: str
    clear: bool


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

    digits: int
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
        low, high = interval.low, interval.high
        bounds = "" if low is None or high is None else f"{self.show(low)}–{self.show(high)}"
        return Cell(self.show(interval.value) + self.sign, bounds, change, interval)

    def change(self, now: Interval, before: Interval, versus: str) -> Change:
        """`now` against `before`, the sign said in words."""
        gain = round(self.better * self.scale * (now.value - before.value), self.digits)
        if gain == 0:
            return Change("no change", "", versus, clear=False)
        amount = f"{abs(gain):.{self.digits}f}{self.unit}"
        return Change("gained" if gain > 0 else "cost", amount, versus, clear=not now.overlaps(before))


BITS = Measure(3, better=-1)
ACCURACY = Measure(1, scale=100, sign="%", unit=" points")
OTHER = Measure(3)
COMPARED = {"bits_per_byte": BITS, "accuracy": ACCURACY}


@dataclass(frozen=True)
class Row:
    """A stage with the evaluation of it, and what changed since the last stage that was measured."""

    stage: Stage
    results: dict[str, Interval]
    changes: dict[str, Change] = field(default_factory=dict)


def stage_rows(run: Run) -> list[Row]:
    """A row for each trained stage and each evaluation of a model trained elsewhere; else for what there is."""
    rows: list[Row] = []
    before: dict[str, tuple[str, Interval]] = {}
    for stage in run.models:
        results = {name: value for e in run.of(stage, "evaluate") for name, value in e.results.items()}
        changes = {}
        for name in COMPARED.keys() & results.keys():
            if name in before:
                versus, old = before[name]
                changes[name] = COMPARED[name].change(results[name], old, versus)
            before[name] = (stage.name, results[name])
        rows.append(Row(stage, results, changes))
    rows += [Row(stage, stage.results) for stage in run.alone("evaluate")]
    return rows or [Row(stage, {}) for stage in run.stages if stage.manifest]


def _text(show: Callable[[float], str], value: Any) -> Cell | None:
    number = _number(value)
    return None if number is None else Cell(show(number))


def _tokens_per_second(stage: Stage) -> float | None:
    # the median step: the first ones warm up and some save a checkpoint
    speeds = [speed for _, speed in stage.curve("tokens_per_second")]
    return median(speeds) if speeds else None


def _steps(stage: Stage) -> float | None:
    return _first(_number(stage.manifest.get("steps")), stage.metrics[-1]["step"] if stage.metrics else None)


def _tokens(stage: Stage) -> float | None:
    return _first(_number(stage.manifest.get("tokens_seen")), stage.last("tokens"))  # both count from the first step


def _loss(stage: Stage, key: str) -> float | None:
    return _first(stage.last(key), _number(_dict(stage.manifest.get("results")).get(key)))


def _loss_text(value: float) -> str:
    return f"{value:.3f}"


COLUMNS: dict[str, Callable[[Row], Cell | None]] = {
    "stage": lambda row: Cell(row.stage.name),
    "phase": lambda row: Cell(row.stage.phase) if row.stage.phase else None,
    "steps": lambda row: _text(_whole, _steps(row.stage)),
    "tokens": lambda row: _text(count_text, _tokens(row.stage)),
    "time": lambda row: _text(time_text, row.stage.seconds),
    "tokens/s": lambda row: _text(_whole, _tokens_per_second(row.stage)),
    "train loss": lambda row: _text(_loss_text, _loss(row.stage, "train/loss")),
    "val loss": lambda row: _text(_loss_text, _loss(row.stage, "val/loss")),
    "bits per byte": lambda row: BITS.cell(row.results.get("bits_per_byte"), row.changes.get("bits_per_byte")),
    "mean accuracy": lambda row: ACCURACY.cell(row.results.get("accuracy"), row.changes.get("accuracy")),
}


def figures(run: Run) -> tuple[list[str], list[tuple[Row, list[Cell | None]]]]:
    """The headings of the columns that have a value in some row, and each row's cells under them."""
    rows = stage_rows(run)
    made = {heading: [cell(row) for row in rows] for heading, cell in COLUMNS.items()}
    made = {heading: cells for heading, cells in made.items() if any(cells)}
    return list(made), [(row, [cells[i] for cells in made.values()]) for i, row in enumerate(rows)]


def results_table(rows: Sequence[Row], names: Sequence[str], measure: Measure) -> dict[str, Any] | None:
    """One line per measure and one column per stage that was evaluated, or None when none of `names` was measured."""
    rows = [row for row in rows if any(name in row.results for name in names)]
    lines = [(name, [measure.cell(row.results.get(name)) for row in rows]) for name in names]
    return {"stages": [row.stage.name for row in rows], "lines": lines} if rows else None


def _accuracy_names(rows: Sequence[Row]) -> list[str]:
    names = sorted({n for row in rows for n in row.results if n.startswith("accuracy/")})
    return [*names, "accuracy"] if names else []  # the mean alone stands in the table of figures already


def _other_names(rows: Sequence[Row]) -> list[str]:
    return sorted({n for row in rows for n in row.results if n not in COMPARED and not n.startswith("accuracy/")})


def count_text(number: float) -> str:
    """A count as people say it.

    >>> count_text(4096), count_text(24_300), count_text(2_570_304)
    ('4,096', '24.3k', '2.57M')
    """
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e4, "k")):
        if number >= size:
            return f"{number / 1e3:.1f}k" if letter == "k" else f"{number / size:.2f}{letter}"
    return _whole(number)


def time_text(seconds: float) -> str:
    """A duration as people say it.

    >>> time_text(8.25), time_text(120.3), time_text(3900)
    ('8.2s', '2m 00s', '1h 05m')
    """
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m {rest:02d}s" if minutes < 60 else f"{minutes // 60}h {minutes % 60:02d}m"


def _whole(number: float) -> str:
    return f"{number:,.0f}"


# --- curves -----------------------------------------------------------------------------------------------------------


def smooth(values: Sequence[float]) -> list[float]:
    """Mean over a window of about a twentieth of the curve, centred so that a falling loss is not shown late.

    At the ends the window shrinks on both sides alike, so there the mean leans to neither.

    >>> smooth([8.0] * 39 + [3.0, 1.0])[-3:]
    [6.333333333333333, 4.0, 1.0]
    """
    sums = [0.0, *accumulate(values)]
    last, reach = len(values) - 1, len(values) // 40
    sides = (min(reach, i, last - i) for i in range(len(values)))
    return [(sums[i + side + 1] - sums[i - side]) / (2 * side + 1) for i, side in enumerate(sides)]


def _thin(points: Sequence[Any]) -> list[Any]:
    stride = math.ceil(len(points) / MAX_POINTS)
    return [*points[:-1:stride], points[-1]]


def draw_curves(stage: Stage) -> str:
    """Loss, and below it tokens/s, as one inline SVG; empty when the stage has no losses."""
    train, validation, speed = (stage.curve(k) for k in ("train/loss", "val/loss", "tokens_per_second"))
    if not train:
        return ""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    # text stays text (small, and in the page's font); the salt makes equal curves give equal bytes
    style: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": stage.name, "font.size": 11}
    colours = dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "text.color"), AXIS)
    with rc_context({**style, **colours}):
        figure = Figure(figsize=(5, 3.6 if speed else 2.7), layout="constrained")
        heights = {"height_ratios": (3, 1)} if speed else {}
        axes = figure.subplots(2 if speed else 1, sharex=True, squeeze=False, gridspec_kw=heights)[:, 0]
        _draw_loss(axes[0], train, validation)
        if speed:
            _draw_line(axes[1], speed, color=SPEED, linewidth=1)
            axes[1].set_ylim(bottom=0)
            axes[1].set_ylabel("tokens/s")
            axes[1].yaxis.set_major_formatter(EngFormatter(sep=""))
        for ax in axes:
            ax.spines[["top", "right"]].set_visible(False)
            ax.grid(axis="y", color=AXIS, alpha=0.25, linewidth=0.6)
            ax.locator_params(axis="y", nbins=5 if ax is axes[0] else 2)
        axes[-1].set_xlabel("step")
        return _inline_svg(figure)


def _draw_loss(ax: Any, train: list[tuple[int, float]], validation: list[tuple[int, float]]) -> None:
    smoothed = list(zip((step for step, _ in train), smooth([loss for _, loss in train]), strict=True))
    _draw_line(ax, train, color=TRAIN, linewidth=0.7, alpha=0.35)
    _draw_line(ax, smoothed, color=TRAIN, linewidth=1.8, label="train")
    if validation:
        _draw_line(ax, validation, color=VALIDATION, linewidth=1.2, marker="o", markersize=4, label="validation")
    ax.set_ylabel("loss")
    ax.legend(frameon=False)


def _draw_line(ax: Any, points: list[tuple[int, float]], **style: Any) -> None:
    ax.plot(*zip(*_thin(points), strict=True), **style)


def _inline_svg(figure: Any) -> str:
    buffer = StringIO()
    figure.savefig(
        buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
    )
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]  # the XML declaration and DOCTYPE have no place inside HTML
    for colour, variable in CSS_COLOURS.items():
        svg = svg.replace(colour, f"var({variable}, {colour})")
    return svg


# --- samples ----------------------------------------------------------------------------------------------------------


def side_by_side(columns: dict[str, list[dict[str, Any]]]) -> dict[str, Any] | None:
    """Rows are prompts, columns what each stage (or step) answered; None when nobody answered."""
    columns = {name: samples for name, samples in columns.items() if samples}
    prompts = list(dict.fromkeys(sample["prompt"] for samples in columns.values() for sample in samples))
    if not prompts:
        return None

    def answers(prompt: str) -> list[list[str]]:
        return [[s["completion"].strip() for s in samples if s["prompt"] == prompt] for samples in columns.values()]

    rows = [(prompt, answers(prompt)) for prompt in prompts[:MAX_PROMPTS]]
    return {"columns": list(columns), "rows": rows, "left_out": len(prompts) - len(rows)}


def stage_samples(run: Run) -> dict[str, Any] | None:
    """The same prompts after each stage; a stage without a generate stage shows the last samples of its training."""
    columns = {}
    for model in run.models:
        generated = [sample for stage in run.of(model, "generate") for sample in stage.samples]
        columns[model.name] = generated or next(reversed(_samples_by_step(model).values()), [])
    columns |= {stage.name: stage.samples for stage in run.alone("generate")}
    return side_by_side(columns) if run.is_pipeline or run.alone("generate") else None


def training_samples(stage: Stage, most: int = 4) -> dict[str, Any] | None:
    """The same prompts at up to `most` steps of one training run, evenly spread from the first to the last."""
    by_step = _samples_by_step(stage)
    steps = list(by_step)
    if len(steps) > most:
        steps = [steps[round(i * (len(steps) - 1) / (most - 1))] for i in range(most)]
    return side_by_side({f"step {step:,}": by_step[step] for step in steps})


def _samples_by_step(stage: Stage) -> dict[int, list[dict[str, Any]]]:
    latest = {(s["step"], s["prompt"]): s for s in stage.samples if isinstance(s.get("step"), int)}
    by_step: dict[int, list[dict[str, Any]]] = {}
    for (step, _), sample in latest.items():
        by_step.setdefault(step, []).append(sample)
    return dict(sorted(by_step.items()))


# --- lineage ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Origin:
    """Something a stage was made from."""

    role: str
    name: str
    short_hash: str


@dataclass
class Node:
    """A stage in the tree of what came from what."""

    stage: Stage
    origins: list[Origin]
    children: list[Node] = field(default_factory=list)


def lineage_tree(run: Run) -> list[Node]:
    """The stages that exist, each below the one it continues (init_from, else what it is `of`, else any parent)."""
    nodes: dict[str, Node] = {}
    roots: list[Node] = []
    for stage in run.stages:
        if not (stage.manifest or stage.metrics):
            continue
        parents = [_dict(p) for p in stage.manifest.get("parents") or []]
        # only earlier stages are known here, so the tree cannot close into a ring
        inside = {str(p.get("role")): name for p in parents if (name := _stage_at(p.get("path"), nodes))}
        above = _first(inside.get("init_from"), stage.of if stage.of in nodes else None, *inside.values())
        node = Node(stage, [_origin(p, nodes) for p in parents] + _hashes(stage, parents))
        (nodes[above].children if above else roots).append(node)
        nodes[stage.name] = node
    return roots


def _stage_at(path: Any, nodes: dict[str, Node]) -> str | None:
    """The stage whose folder holds `path`; run and stage name decide, so that a run may be moved."""
    places = [Path(str(path)), *Path(str(path)).parents] if path else []
    for name, node in nodes.items():
        if any(place.parts[-2:] == node.stage.folder.resolve().parts[-2:] for place in places):
            return name
    return None


def _origin(parent: dict[str, Any], nodes: dict[str, Node]) -> Origin:
    name = _stage_at(parent.get("path"), nodes) or str(parent.get("path") or "")
    return Origin(str(parent.get("role") or "parent"), name, str(parent.get("sha256") or "")[:10])


def _hashes(stage: Stage, parents: Iterable[dict[str, Any]]) -> list[Origin]:
    """Data and tokenizer that are named by hash alone, unless a parent is that very thing."""
    known = {p.get("sha256") for p in parents}
    named = {f"{split} data": sha for split, sha in _dict(stage.manifest.get("data")).items()}
    if stage.phase != "tokenizer":  # there it is what was made
        named["tokenizer"] = stage.manifest.get("tokenizer")
    return [Origin(role, "", sha[:10]) for role, sha in named.items() if isinstance(sha, str) and sha not in known]


# --- the page ---------------------------------------------------------------------------------------------------------


def _template() -> Any:
    loader = FileSystemLoader(Path(__file__).parent)
    # autoescape: prompts and completions are whatever people and models wrote
    env = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    env.filters |= {"time": time_text, "pretty": lambda x: json.dumps(x, indent=2, ensure_ascii=False, default=str)}
    return env.get_template("report.html.j2")


def page_context(run: Run) -> dict[str, Any]:
    """Everything the template shows, by name."""
    headings, rows = figures(run)
    made = [row for row, _ in rows]
    configs = [("pipeline", run.manifest.get("config"))] if run.is_pipeline else []
    configs += [(stage.name, stage.manifest.get("config")) for stage in run.stages]
    progress = [(stage, training_samples(stage)) for stage in run.models]
    return {
        "run": run,
        "header": _header(run),
        "tiles": _tiles(run, made),
        "headings": headings,
        "rows": rows,
        "has_changes": any(row.changes for row in made),
        "accuracies": results_table(made, _accuracy_names(made), ACCURACY),
        "others": results_table(made, _other_names(made), OTHER),
        "curves": [(stage, svg) for stage in run.models if (svg := draw_curves(stage))],
        "samples": stage_samples(run),
        "progress": [(stage, table) for stage, table in progress if table],
        "chats": [(s, s.samples[:MAX_TURNS]) for s in run.stages if s.phase == "chat" and s.samples],
        "lineage": lineage_tree(run),
        "configs": [(name, config) for name, config in configs if config],
        "commands": [str(command) for command in run.manifest.get("next_commands") or []],
        "versions": next((v for m in reversed(_manifests(run)) if (v := _dict(m.get("versions")))), {}),
    }


def _header(run: Run) -> dict[str, Any]:
    manifests = _manifests(run)
    phases = [stage.phase for stage in run.models or run.stages if stage.phase]
    started = _first(*(m.get("started") for m in manifests))
    return {
        "what": " → ".join(phases),
        "domain": _first(*(m.get("domain") for m in manifests)),
        "model": _first(*(_dict(m.get("model")).get("name") for m in manifests)),
        "status": str(run.manifest.get("status") or "running"),
        "started": _moment(started) if started else None,
        "seconds": _total_seconds(run),
    }


def _manifests(run: Run) -> list[dict[str, Any]]:
    return [run.manifest, *(stage.manifest for stage in run.stages)]


def _total_seconds(run: Run) -> float | None:
    stages = [s.seconds for s in run.stages if s.seconds is not None]
    return _first(_number(run.manifest.get("seconds")), sum(stages) if stages else None)


def _tiles(run: Run, rows: Sequence[Row]) -> list[tuple[str, str]]:
    """The few numbers to see first; a measure taken more than once is shown from its first to its last value."""
    tokens = [t for stage in run.models if (t := _tokens(stage))]
    sizes = [n for s in run.stages if (n := _number(_dict(s.manifest.get("model")).get("parameters")))]
    tiles = {
        "parameters": [count_text(size) for size in dict.fromkeys(sizes)],
        "tokens trained on": [count_text(sum(tokens))] if tokens else [],
    }
    for name, label in (("bits_per_byte", "bits per byte"), ("accuracy", "mean accuracy")):
        measure = COMPARED[name]
        tiles[label] = [measure.show(r.results[name].value) + measure.sign for r in rows if name in r.results]
    return [(label, " → ".join((v[0], v[-1])[: len(v)])) for label, v in tiles.items() if v]


def _moment(started: Any) -> str:
    try:
        moment = datetime.fromisoformat(str(started))
    except ValueError:
        return str(started)
    return f"{moment.astimezone(UTC) if moment.tzinfo else moment:%Y-%m-%d %H:%M} UTC"
