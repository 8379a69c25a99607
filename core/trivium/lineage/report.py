"""One page and two tables that tell what a run did: figures, curves, samples, chat, lineage, config, next commands.

Reads only the files a run leaves behind (`MANIFEST.json`, `metrics.jsonl`, `samples.jsonl`), so it works on a run that
is still going, on one copied from elsewhere, and without the plugins that made it. What is missing is not shown.
The page is one file: no scripts, no links, pictures inline.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from trivium.disk import replace_file
from trivium.lineage.curves import draw_curves
from trivium.lineage.figures import (
    BY_TASK,
    MEASURES,
    RESULTS,
    TRAINING,
    Cell,
    Change,
    Figures,
    Row,
    count_text,
    figures,
    other_table,
    stage_rows,
    task_table,
    time_text,
    tokens_seen,
)
from trivium.lineage.runs import Run, Stage, as_dict, finite, first, load_run

MAX_PROMPTS = 24  # shown with their answers; the rest stays in samples.jsonl
MAX_TURNS = 60  # bubbles of one chat
TONES = {"gained": "green", "cost": "red", "faint": "dim"}


def write_report(folder: Path) -> Path:
    """Write `folder/report.html` (the old one stays until the new one is whole) and return its path."""
    folder = Path(folder)
    html = _template().render(page_context(load_run(folder)))
    target = folder / "report.html"
    replace_file(target, html.encode("utf-8", "replace"))  # a model may emit half a surrogate pair, not held by UTF-8
    return target


# --- the terminal -----------------------------------------------------------------------------------------------------


def summary_table(folder: Path) -> Group:
    """What every trained stage took, and what it reached, as two tables; one without any value is left out."""
    rows = stage_rows(load_run(Path(folder)))
    tables = [_terminal_table(made) for columns in (TRAINING, RESULTS) if (made := figures(rows, columns)).rows]
    return Group(*[part for table in tables for part in (table, Text())][:-1])


def _terminal_table(made: Figures) -> Table:
    # all columns have to fit into 80 characters: no frame, headings broken at spaces, intervals on their own line
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=0)
    table.add_column("stage", overflow="fold")  # where it is still too narrow, names fold and numbers stay whole
    lines = [[_cell_text(cell) for cell in cells] for _, cells in made.rows]
    for heading, column in zip(made.headings, zip(*lines, strict=True), strict=True):
        parts = [*heading.split(), *(part for cell in column for part in cell.plain.split("\n"))]
        table.add_column(heading, justify="right", width=max(map(len, parts)))
    for (row, cells), texts in zip(made.rows, lines, strict=True):
        changes = [cell.change for cell in cells if cell and cell.change]
        others = dict.fromkeys(change.versus for change in changes if not change.above)
        versus = f"\nvs {', '.join(others)}" if others else ""
        table.add_row(Text.assemble(row.stage.name, (versus, "dim")), *texts)
    return table


def _cell_text(cell: Cell | None) -> Text:
    if cell is None:
        return Text()
    lines = [Text(cell.text)]
    if cell.interval:
        lines.append(Text(cell.interval, "dim"))
    if cell.change:
        lines.append(Text(f"{cell.change.word} {cell.change.amount}".strip(), TONES[cell.change.tone]))
    return Text("\n").join(lines)


# --- samples ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """What one stage (or step) said to a prompt. unchanged: the very words of the one it is compared with."""

    by: str
    texts: list[str]
    unchanged: bool


def side_by_side(columns: Mapping[str, list[dict[str, Any]]], before: Mapping[str, str]) -> dict[str, Any] | None:
    """Each prompt with what every stage (or step) answered; None when nobody did.

    before: the stage that each is compared with.
    """
    prompts = list(dict.fromkeys(sample["prompt"] for samples in columns.values() for sample in samples))
    if not prompts:
        return None

    def answers(prompt: str) -> list[Answer]:
        said = {by: [s["completion"].strip() for s in some if s["prompt"] == prompt] for by, some in columns.items()}
        said = {by: texts for by, texts in said.items() if texts}
        return [Answer(by, texts, texts == said.get(before.get(by, ""))) for by, texts in said.items()]

    shown = [(prompt, answers(prompt)) for prompt in prompts[:MAX_PROMPTS]]
    same = any(answer.unchanged for _, said in shown for answer in said)
    return {"prompts": shown, "left_out": len(prompts) - len(shown), "compares": same}


def stage_samples(run: Run) -> dict[str, Any] | None:
    """The same prompts after each stage; a stage without a generate stage shows the last samples of its training."""
    columns, before = {}, {}
    for model in run.models:
        generated = [sample for stage in run.of(model, "generate") for sample in stage.samples]
        said = generated or next(reversed(_samples_by_step(model).values()), [])
        other = next((s.name for s in run.compared(model) if columns.get(s.name)), None)
        columns[model.name] = said
        if other:
            before[model.name] = other
    columns |= {stage.name: stage.samples for stage in run.alone("generate")}
    return side_by_side(columns, before) if run.is_pipeline or run.alone("generate") else None


def training_samples(stage: Stage, most: int = 4) -> dict[str, Any] | None:
    """The same prompts at up to `most` steps of one training run, evenly spread from the first to the last."""
    by_step = _samples_by_step(stage)
    steps = list(by_step)
    if len(steps) > most:
        steps = [steps[round(i * (len(steps) - 1) / (most - 1))] for i in range(most)]
    return side_by_side({f"step {step:,}": by_step[step] for step in steps}, {})


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
        made_from = [(parent, run.before(stage, parent.get("path"))) for parent in stage.parents]
        inside = [found.name for _, found in made_from if found]
        begun = run.parent(stage)
        above = next((name for name in (begun and begun.name, stage.of, *inside) if name in nodes), None)
        node = Node(stage, [_origin(*pair) for pair in made_from] + _hashes(stage))
        (nodes[above].children if above else roots).append(node)
        nodes[stage.name] = node
    return roots


def _origin(parent: dict[str, Any], found: Stage | None) -> Origin:
    name = found.name if found else str(parent.get("path") or "")
    return Origin(str(parent.get("role") or "parent"), name, str(parent.get("sha256") or "")[:10])


def _hashes(stage: Stage) -> list[Origin]:
    """Data and tokenizer that are named by hash alone, unless a parent is that very thing."""
    known = {p.get("sha256") for p in stage.parents}
    named = {f"{split} data": sha for split, sha in as_dict(stage.manifest.get("data")).items()}
    if stage.phase != "tokenizer":  # there it is what was made
        named["tokenizer"] = stage.manifest.get("tokenizer")
    return [Origin(role, "", sha[:10]) for role, sha in named.items() if isinstance(sha, str) and sha not in known]


# --- the page ---------------------------------------------------------------------------------------------------------


def _template() -> Any:
    loader = FileSystemLoader(Path(__file__).parent)
    # autoescape: prompts and completions are whatever people and models wrote
    env = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    pretty = {"pretty": lambda x: json.dumps(x, indent=2, ensure_ascii=False, default=str)}
    env.filters |= {"time": time_text, "count": count_text, **pretty}
    return env.get_template("report.html.j2")


def page_context(run: Run) -> dict[str, Any]:
    """Everything the template shows, by name."""
    rows = stage_rows(run)
    configs = [("pipeline", run.manifest.get("config"))] if run.is_pipeline else []
    configs += [(stage.name, stage.manifest.get("config")) for stage in run.stages]
    progress = [(stage, training_samples(stage)) for stage in run.models]
    return {
        "run": run,
        "header": _header(run),
        # the stages that follow each training stage are named where they say something
        "path": [s for s in run.stages if s.phase not in ("evaluate", "generate") or s.status != "done"],
        "failures": [(s.name, str(s.manifest["error"])) for s in run.stages if s.manifest.get("error")],
        "tiles": _tiles(run, rows),
        "student": _student(run, rows),
        "results": figures(rows, RESULTS),
        "has_changes": any(row.changes for row in rows),
        "training": figures(rows, TRAINING),
        "tasks": [(MEASURES[name].heading, table) for name in BY_TASK if (table := task_table(rows, name))],
        "others": other_table(rows),
        "curves": [drawing for stage in run.models if (drawing := draw_curves(stage))],
        "examined": [(s, told) for s in run.stages if (told := _examined(s))],
        "samples": stage_samples(run),
        "progress": [(stage, table) for stage, table in progress if table],
        "chats": [(s, s.samples[:MAX_TURNS]) for s in run.stages if s.phase in ("chat", "search") and s.samples],
        "lineage": lineage_tree(run),
        "configs": [(name, config) for name, config in configs if config],
        "commands": [str(command) for command in run.manifest.get("next_commands") or []],
        "versions": next((v for m in reversed(_manifests(run)) if (v := as_dict(m.get("versions")))), {}),
    }


def _examined(stage: Stage) -> dict[str, Any] | None:
    """What the doctor said before a stage trained, and some examples as it learnt them; None where it did not."""
    told = as_dict(stage.manifest.get("doctor"))
    return {**told, "shown": [as_dict(s) for s in told["shown"]]} if isinstance(told.get("shown"), list) else None


def _header(run: Run) -> dict[str, Any]:
    manifests = _manifests(run)
    phases = [stage.phase for stage in _main_line(run) or run.stages if stage.phase]
    started = first(*(m.get("started") for m in manifests))
    return {
        "what": " → ".join(phases),
        "domain": first(*(m.get("domain") for m in manifests)),
        "model": first(*(as_dict(m.get("model")).get("name") for m in manifests)),
        "status": str(run.manifest.get("status") or "running"),
        "started": _moment(started) if started else None,
        "seconds": _total_seconds(run),
    }


def _manifests(run: Run) -> list[dict[str, Any]]:
    return [run.manifest, *(stage.manifest for stage in run.stages)]


def _main_line(run: Run) -> list[Stage]:
    """The stages that trained the model which stands for the run, in order."""
    return [stage for stage in reversed(run.line(run.result)) if stage in run.models]


def _total_seconds(run: Run) -> float | None:
    stages = [s.seconds for s in run.stages if s.seconds is not None]
    return first(finite(run.manifest.get("seconds")), sum(stages) if stages else None)


@dataclass(frozen=True)
class Tile:
    """One of the few numbers to see first."""

    label: str
    text: str
    change: Change | None = None


def _tiles(run: Run, rows: Sequence[Row]) -> list[Tile]:
    """Sizes, and each measure from its first to its last value on the way to the run's result."""
    line = _main_line(run)
    sizes = [stage.parameters for stage in line or run.stages if stage.parameters]
    tokens = [number for stage in line if (number := tokens_seen(stage))]
    tiles = [Tile("parameters", count_text(sizes[-1]))] if sizes else []
    tiles += [Tile("tokens trained on", count_text(sum(tokens)))] if tokens else []
    return tiles + _from_first_to_last([row for row in rows if row.stage in line] or rows)


def _from_first_to_last(rows: Sequence[Row]) -> list[Tile]:
    tiles = []
    for name, measure in MEASURES.items():
        found = [row for row in rows if name in row.results]
        if found:
            ends = [found[0], found[-1]][: len(found)]
            text = " → ".join(measure.show(row.results[name].value) + measure.sign for row in ends)
            now, before = (row.results[name] for row in (ends[-1], ends[0]))
            change = measure.change(now, before, ends[0].stage.name) if len(ends) > 1 else None
            tiles.append(Tile(measure.heading, text, change))
    return tiles


def _student(run: Run, rows: Sequence[Row]) -> dict[str, Any] | None:
    """A distilled model against its teacher in size, and against the same model untaught in what both measured."""
    taught = next((row for row in reversed(rows) if row.stage.phase == "distill" and run.is_pipeline), None)
    if taught is None:
        return None
    alone = next((row for row in rows if row.stage.name == taught.stage.versus), None)
    teacher = run.parent(taught.stage, "teacher")
    sizes = [stage.parameters for stage in (taught.stage, teacher) if stage and stage.parameters]
    measured = [row for row in (alone, taught) if row and row.results]
    tiles = [tile for tile in _from_first_to_last(measured) if alone is None or tile.change]
    share = f"{sizes[0] / sizes[1]:.0%}" if len(sizes) > 1 else None
    return {"stage": taught.stage, "alone": alone and alone.stage, "teacher": teacher, "share": share, "tiles": tiles}


def _moment(started: Any) -> str:
    try:
        moment = datetime.fromisoformat(str(started))
    except ValueError:
        return str(started)
    return f"{moment.astimezone(UTC) if moment.tzinfo else moment:%Y-%m-%d %H:%M} UTC"
