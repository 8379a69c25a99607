"""A step's figures: they stay on the device until the next step is under way, so that no step waits for the host."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class Stopwatch:
    """Where a step's time goes. On a GPU the marks are events in its stream: the host does not wait for them.

    It runs from the end of one step to the end of the next, so that what follows a step (its figures written, the
    loop's own work) is counted too; only what happens `aside` belongs to no step.
    """

    def __init__(self) -> None:
        self._on_gpu = False
        self._marks: list[tuple[str, Any]] = []

    def start(self, device: torch.device) -> None:
        """Training begins on `device`; what follows belongs to the first step."""
        self._on_gpu = device.type == "cuda"
        self._marks = [("", self._mark())]

    def lap(self, name: str) -> None:
        """The time since the last mark was spent on `name`."""
        self._marks.append((name, self._mark()))

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What happens inside belongs to no step: validation, sampling, saving."""
        self.lap("other")
        try:
            yield
        finally:
            self.lap("")

    def laps(self) -> list[tuple[str, Any]]:
        """The step's marks, for `seconds` to read once they are past; what follows belongs to the next step."""
        marks, self._marks = self._marks, self._marks[-1:]
        return marks

    def _mark(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def seconds(laps: list[tuple[str, Any]]) -> dict[str, float]:
    """Seconds by name; on a GPU all marks must be past.

    >>> seconds([("", 1.0), ("forward", 3.0), ("backward", 3.5), ("", 9.0), ("forward", 10.0)])  # 5.5 s aside
    {'forward': 3.0, 'backward': 0.5}
    """
    spent: dict[str, float] = {}
    for (_, before), (name, after) in zip(laps, laps[1:], strict=False):
        if not name:
            continue
        took = after - before if isinstance(after, float) else before.elapsed_time(after) / 1000
        spent[name] = spent.get(name, 0.0) + took
    return spent


class Figures:
    """One step's: tensors on their way to the host, and what the host knew at once."""

    def __init__(
        self,
        step: int,
        known: Mapping[str, Tensor],
        metrics: Mapping[str, tuple[Tensor, Tensor]],
        facts: dict[str, float],
        laps: list[tuple[str, Any]],
    ) -> None:
        self.step, self.facts, self._laps = step, facts, laps
        self._names = [*known, *(f"{name} {part}" for name in metrics for part in ("total", "count"))]
        values = [*known.values(), *(x for pair in metrics.values() for x in pair)]
        exact = torch.float32 if values[0].device.type == "mps" else torch.float64
        self._values = torch.stack([v.to(exact) for v in values]).to("cpu", non_blocking=True)
        self._arrived = torch.cuda.Event() if values[0].is_cuda else None
        if self._arrived:
            self._arrived.record()

    def read(self) -> tuple[dict[str, Any], bool, int]:
        """The step's row, whether it was bad, and how many units it counted."""
        if self._arrived:
            self._arrived.synchronize()
        found = dict(zip(self._names, self._values.tolist(), strict=True))
        bad, count = bool(found.pop("bad")), int(found.pop("count"))
        row: dict[str, Any] = {"step": self.step, "train/loss": found.pop("train/loss")}
        for name in [n.removesuffix(" total") for n in found if n.endswith(" total")]:
            total, number = found.pop(f"{name} total"), found.pop(f"{name} count")
            if number:
                row[f"train/{name}"] = total / number
        row |= {"lr": self.facts.pop("lr"), "grad_norm": found.pop("grad_norm"), "tokens": int(found.pop("tokens"))}
        row |= {name: int(found.pop(name)) for name in ("targets", "attended")}
        spent = seconds(self._laps)
        whole = sum(spent.values())
        row |= {"step_seconds": whole, "tokens_per_second": row["tokens"] / whole if whole else 0.0}
        return row | self.facts | found | {f"time/{name}": took for name, took in spent.items()}, bad, count
