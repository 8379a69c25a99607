"""What a run left on disk, read leniently: it may still be going, be copied from elsewhere, or be cut off mid-line."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from trivium.errors import DataError
from trivium.lineage.manifest import read as read_manifest


@dataclass(frozen=True)
class Interval:
    """An estimate and the interval around it; without one, low and high are None."""

    value: float
    low: float | None = None
    high: float | None = None

    @classmethod
    def read(cls, entry: Any) -> Interval | None:
        """From {"value", "low", "high"}; None when there is no value."""
        value, low, high = (finite(as_dict(entry).get(key)) for key in ("value", "low", "high"))
        return None if value is None else cls(value, low, high)

    def overlaps(self, other: Interval) -> bool:
        """Whether both have intervals and these share a point."""
        if self.low is None or self.high is None or other.low is None or other.high is None:
            return False
        return self.low <= other.high and other.low <= self.high


@dataclass(frozen=True)
class Stage:
    """One run folder; its files are read when asked for. versus: the stage to compare with instead of the parent."""

    name: str
    phase: str
    folder: Path
    of: str | None = None
    versus: str | None = None
    manifest: dict[str, Any] = field(default_factory=dict)

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
        found = ((record["step"], finite(record.get(key))) for record in self.metrics)
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
        return first(finite(self.manifest.get("seconds")), sum(s for _, s in steps) if steps else None)

    @property
    def parameters(self) -> float | None:
        return finite(as_dict(self.manifest.get("model")).get("parameters"))

    @property
    def parents(self) -> list[dict[str, Any]]:
        """What it was made from: {"role", "path", "sha256"} each."""
        found = self.manifest.get("parents")
        return [as_dict(parent) for parent in found] if isinstance(found, list) else []

    @property
    def results(self) -> dict[str, Interval]:
        """What an evaluation measured; entries that are not estimates are left out."""
        found = {name: Interval.read(entry) for name, entry in as_dict(self.manifest.get("results")).items()}
        return {name: interval for name, interval in found.items() if interval}

    @cached_property
    def places(self) -> set[tuple[str, ...]]:
        """Run and stage folder, now and when it ran: they name a stage in a run that was moved or renamed too."""
        return {self.folder.resolve().parts[-2:], Path(str(self.manifest.get("name") or self.name)).parts[-2:]}


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

    @cached_property
    def models(self) -> list[Stage]:
        """The stages that trained, in order: those with a loss, or that an evaluation is of."""
        measured = {s.of for s in self.stages if s.phase == "evaluate" and s.results}
        return [s for s in self.stages if s.curve("train/loss") or s.name in measured]

    @property
    def result(self) -> Stage | None:
        """The stage whose model stands for the run; until it trained, the newest language model."""
        named = [s for s in self.models if s.name == self.manifest.get("result")]
        speaking = [s for s in self.models if s.phase != "reward"]
        return (named or speaking or self.models or [None])[-1]

    @property
    def left_out(self) -> list[dict[str, Any]]:
        """Stages that a pipeline could not run: {"name", "phase", "why"} each."""
        found = self.manifest.get("left_out")
        return [entry for entry in map(as_dict, found) if entry.get("name")] if isinstance(found, list) else []

    def of(self, stage: Stage, phase: str) -> list[Stage]:
        """The stages of `phase` that ran on what `stage` made."""
        return [s for s in self.stages if s.phase == phase and s.of == stage.name]

    def alone(self, phase: str) -> list[Stage]:
        """The stages of `phase` whose model was not trained here."""
        names = {model.name for model in self.models}
        return [s for s in self.stages if s.phase == phase and s.of not in names]

    def before(self, stage: Stage, path: Any) -> Stage | None:
        """The stage whose folder holds `path`, among those before `stage`: so lineage cannot close into a ring."""
        places = [Path(path), *Path(path).parents] if isinstance(path, str) and path else []
        ends = {place.parts[-2:] for place in places}
        return next((s for s in self.stages[: self.stages.index(stage)] if s.places & ends), None)

    def parent(self, stage: Stage, role: str = "init_from") -> Stage | None:
        """The earlier stage that `stage` has as its `role`."""
        paths = [parent.get("path") for parent in stage.parents if parent.get("role") == role]
        return next((found for path in paths if (found := self.before(stage, path))), None)

    def line(self, stage: Stage | None) -> list[Stage]:
        """`stage` and the stages it came from, nearest first."""
        return [stage, *self.line(self.parent(stage))] if stage else []

    def compared(self, stage: Stage) -> list[Stage]:
        """What `stage` may be compared with, nearest first: its ancestors, or the line that `versus` names."""
        versus = next((s for s in self.stages if s.name == stage.versus), None)
        return self.line(versus or self.parent(stage))


def load_run(folder: Path) -> Run:
    """The run in `folder`; raises DataError when there is none."""
    if not any((folder / name).is_file() for name in ("MANIFEST.json", "metrics.jsonl", "samples.jsonl")):
        raise DataError(f"no run in {folder}: it holds no MANIFEST.json. Give a run's own folder, such as runs/NAME")
    manifest = as_dict(read_manifest(folder))
    name = str(manifest.get("name") or folder.resolve().name)
    entries = manifest.get("stages")
    if not isinstance(entries, list):
        return Run(name, folder, manifest, [_stage(folder, {"name": name})])
    stages = [_stage(folder / str(e.get("path", e["name"])), e) for e in map(as_dict, entries) if e.get("name")]
    return Run(name, folder, manifest, stages)


def _stage(folder: Path, entry: dict[str, Any]) -> Stage:
    manifest = as_dict(read_manifest(folder))
    phase = entry.get("phase") or manifest.get("phase") or ""
    of = entry.get("of") or manifest.get("of")
    return Stage(str(entry["name"]), str(phase), folder, of, entry.get("versus"), manifest)


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


def as_dict(value: Any) -> dict[str, Any]:
    """`value` if it is a dict, else an empty one."""
    return value if isinstance(value, dict) else {}


def finite(value: Any) -> float | None:
    """A finite number, or None for anything else (json reads NaN and Infinity too)."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if good else None


def first(*values: Any) -> Any:
    """The first that is not None."""
    return next((value for value in values if value is not None), None)
