"""How far a run in training is, read from its folder's files alone while another process writes them."""

from __future__ import annotations

import time
from collections import deque
from pathlib import Path
from statistics import median
from typing import Any

from trivium.lineage.manifest import read as read_manifest
from trivium.lineage.runs import as_dict, finite
from trivium.lineage.tail import Tail

CURVES = ("train/loss", "val/loss", "rollout/reward")
RECENT = 50
"""Steps whose figures are averaged: a single one says little."""


class Progress:
    """One training run: `refresh` reads what is new. Rows whose figures are None, NaN or of another kind are borne."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._metrics, self._said = Tail(folder / "metrics.jsonl"), Tail(folder / "samples.jsonl")
        self._clear()
        self.samples: list[dict[str, Any]] = []
        self.manifest: dict[str, Any] = {}

    def _clear(self) -> None:
        self.curves: dict[str, list[tuple[int, float]]] = {key: [] for key in CURVES}
        self.recent: deque[dict[str, Any]] = deque(maxlen=RECENT)
        self.skipped = 0

    def refresh(self) -> None:
        """Read what is new."""
        self.manifest = as_dict(read_manifest(self.folder)) or self.manifest
        rows, anew = self._metrics.read()
        if anew:
            self._clear()
        for row in rows:
            step = row.get("step")
            if not isinstance(step, int) or isinstance(step, bool):
                continue
            self.recent.append(row)
            self.skipped += bool(row.get("skipped"))
            for key, curve in self.curves.items():
                if (value := finite(row.get(key))) is not None:
                    curve.append((step, value))
        said, anew = self._said.read()
        newest = [] if anew else self.samples
        for line in said:
            if isinstance(line.get("prompt"), str) and isinstance(line.get("completion"), str):
                same = newest and newest[0].get("step") == line.get("step")
                newest = [*newest, line] if same else [line]
        self.samples = newest

    @property
    def step(self) -> int:
        """Steps done."""
        return self.recent[-1]["step"] if self.recent else int(finite(self.manifest.get("steps")) or 0)

    @property
    def max_steps(self) -> int | None:
        found = finite(as_dict(as_dict(self.manifest.get("config")).get("trainer")).get("max_steps"))
        return int(found) if found else None

    @property
    def status(self) -> str:
        return str(self.manifest.get("status") or ("running" if self.recent else "waiting"))

    @property
    def running(self) -> bool:
        """Whether more may come."""
        return self.status in ("running", "waiting")

    @property
    def seconds_left(self) -> float | None:
        """By the recent steps; validation, sampling and saving come on top."""
        took = self.typical("step_seconds")
        return None if took is None or self.max_steps is None else max(0, self.max_steps - self.step) * took

    @property
    def silent_seconds(self) -> float | None:
        """Since the last figures were written; None where there are none, or the clocks disagree."""
        try:
            passed = time.time() - (self.folder / "metrics.jsonl").stat().st_mtime
        except OSError:
            return None
        return passed if passed >= 0 else None

    def last(self, key: str) -> float | None:
        """The newest finite value of a recent step."""
        return next((value for row in reversed(self.recent) if (value := finite(row.get(key))) is not None), None)

    def typical(self, key: str) -> float | None:
        """The median over the recent steps."""
        values = [value for row in self.recent if (value := finite(row.get(key))) is not None]
        return median(values) if values else None

    def group(self, *prefixes: str) -> dict[str, float]:
        """The newest finite value of each figure whose name begins so, by the rest of its name."""
        names = dict.fromkeys(key for row in self.recent for key in row if key.startswith(prefixes))
        found = {key[max(len(p) for p in prefixes if key.startswith(p)) :]: self.last(key) for key in names}
        return {name: value for name, value in found.items() if value is not None}

    def split(self) -> dict[str, float]:
        """Seconds of a recent step by what they were spent on, on average."""
        spent: dict[str, float] = {}
        for row in self.recent:
            for key, value in row.items():
                if key.startswith("time/") and (seconds := finite(value)) is not None:
                    spent[key.removeprefix("time/")] = spent.get(key.removeprefix("time/"), 0.0) + seconds
        return {name: seconds / len(self.recent) for name, seconds in spent.items()}

    @property
    def checkpoints(self) -> list[str]:
        """Complete ones, oldest first, the best marked."""
        folder = self.folder / "checkpoints"
        found = [p.name for p in folder.glob("step-*") if p.name[5:].isdigit() and (p / "CHECKPOINT.json").is_file()]
        try:
            best = (folder / "BEST").read_text().strip()
        except (OSError, ValueError):
            best = ""
        return [f"{n} (best)" if n == best else n for n in sorted(found, key=lambda n: int(n[5:]))]
