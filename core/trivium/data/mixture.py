"""Several sources in one run, in chosen shares: which rows a step reads is a pure function of its number.

Rows are as long as one another, so shares of rows are shares of tokens. Each part is packed by itself and read in an
order of its own; a step takes of each what brings what was read nearest to its share so far, to within one row.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, ClassVar

import numpy as np

from trivium.data.config import MixtureConfig, PartConfig
from trivium.data.position import Order, key_of, permute
from trivium.data.source import Example, Source
from trivium.data.table import Ids, TokenTable
from trivium.errors import ConfigError, DataError
from trivium.types import Score

ROUNDING = 1e-9
INF = float("inf")
CHUNK = 256
"""Steps whose shares are worked out at once."""
RECENT = 128
"""Steps up to one that was asked for whose counts are held."""
MARKS = 64
"""Places that are remembered, of a run of any length; twice as far apart whenever there are more."""


class Mixture(Source):
    """Its parts' examples, one part after the other; ids and origins begin with the part's name."""

    phases: ClassVar[frozenset[str]] = frozenset(
        {"tokenizer", "pretrain", "sft", "preference", "reward", "rlhf", "distill", "evaluate"}
    )
    config: MixtureConfig

    def __init__(self, config: MixtureConfig, parts: Mapping[str, Source]) -> None:
        super().__init__(config)
        if not parts:
            raise ConfigError("domain=mixture needs data.parts={NAME: {weight: 1}, ...}, a domain or more by name")
        self.parts = dict(parts)
        self.ends = tuple(accumulate(len(part) for part in self.parts.values()))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"the mixture has examples 0 to {len(self) - 1}, not {index}")
        which = bisect_right(self.ends, index)
        name, part = list(self.parts.items())[which]
        example = part[index - (self.ends[which - 1] if which else 0)]
        return {**example, "id": f"{name}/{example['id']}"}

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the parts' own. Shares are no content: with others, the same rows are read in another order."""
        content = [[name, part.fingerprint, len(part)] for name, part in self.parts.items()]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    @property
    def notes(self) -> dict[str, Any]:
        """Those of its parts."""
        told = ((f"{name} {what}", note) for name, part in self.parts.items() for what, note in part.notes.items())
        return dict(told)

    def expect(self, phase: str) -> None:
        """Refuse a part whose examples `phase` cannot use."""
        for part in self.parts.values():
            part.expect(phase)

    def origin(self, example: Example) -> str:
        """Its part."""
        return example["id"].partition("/")[0]

    def score(self, example: Example, completion: str) -> Score:
        """The verdict of the part it is from."""
        name, _, own = example["id"].partition("/")
        return self.parts[name].score({**example, "id": own}, completion)


@dataclass(frozen=True)
class Share:
    """One part of a mixed order. rows: how many it has. most: how many of them are read at most, repeats counted."""

    name: str
    rows: int
    weights: tuple[tuple[int, float], ...]
    most: float = float("inf")

    def weight(self, step: float | np.ndarray) -> Any:
        """Of a step, or of an array of them: linear between those that are named, level before and behind."""
        steps, values = zip(*self.weights, strict=True)
        return np.interp(step, steps, values)


@dataclass
class Place:
    """Where a run is after so many steps. read: rows of each part. owed: of each by the shares so far, and not read."""

    step: int
    read: list[int]
    owed: list[float]

    def copy(self) -> Place:
        """One that can be moved on by itself."""
        return Place(self.step, self.read.copy(), self.owed.copy())


class MixedOrder:
    """The sequence of rows that a run reads of several parts, `size` a step; rows are numbered part after part.

    Every epoch of a part is another permutation of its rows. A part that has given its most gives no more, and the
    others take its share. Raises DataError when none is left.

    What is owed is rounded at every step, so counts come of those before: a few places are marked to go on from.
    """

    def __init__(self, shares: Sequence[Share], size: int, seed: int, fingerprint: str) -> None:
        self.shares, self.size, self.seed, self.fingerprint = tuple(shares), size, seed, fingerprint
        self._first = np.cumsum([0, *(share.rows for share in shares)])
        self._orders = [Order(s.rows, seed, f"{fingerprint}/{s.name}") for s in shares]
        self._most = [share.most for share in shares]
        self._limited = [part for part, most in enumerate(self._most) if most < INF]
        self._level_from = max(step for share in shares for step, _ in share.weights)
        self._place = Place(0, [0] * len(shares), [0.0] * len(shares))
        self._marks, self._apart = [self._place.copy()], CHUNK
        self._recent = {0: tuple(self._place.read)}

    def read_before(self, step: int) -> np.ndarray:
        """(parts,) rows read of each before `step`."""
        if step not in self._recent:
            self._go_to(step)
        return np.array(self._recent[step], np.int64)

    def _go_to(self, step: int) -> None:
        nearest = max((p for p in (*self._marks, self._place) if p.step <= step), key=lambda p: p.step)
        place = nearest.copy()
        while place.step < step:
            used_up = self._used_up(place)
            for due in self._due(place.step, min(step, (place.step // CHUNK + 1) * CHUNK), used_up):
                self._take(place, due)
                if place.step > step - RECENT:
                    self._recent[place.step] = tuple(place.read)
                if self._used_up(place) != used_up:
                    break
            self._mark(place)
        self._place = place
        self._recent[step] = tuple(place.read)
        while len(self._recent) > 2 * RECENT:
            del self._recent[next(iter(self._recent))]

    def _mark(self, place: Place) -> None:
        """Remember a place now and then; where there are too many, every second is forgotten."""
        if place.step < self._marks[-1].step + self._apart:
            return
        self._marks.append(place.copy())
        if len(self._marks) > MARKS:
            self._marks, self._apart = self._marks[::2], 2 * self._apart

    def _used_up(self, place: Place) -> list[int]:
        """The parts that have given their most."""
        return [part for part in self._limited if place.read[part] >= self._most[part]]

    def _due(self, start: int, end: int, used_up: list[int]) -> list[list[float]]:
        """Rows of each part, and fractions of such, that its share is of each step; -1 where it has none."""
        steps = np.arange(start, start + 1 if start >= self._level_from else end)
        weights = np.stack([share.weight(steps) for share in self.shares], axis=1)
        weights[:, used_up] = 0
        with np.errstate(invalid="ignore"):
            due = weights / weights.sum(axis=1, keepdims=True) * self.size
        found = np.where(weights > 0, due, -1.0).tolist()
        return found if len(found) == end - start else found * (end - start)

    def _take(self, place: Place, due: list[float]) -> None:
        """A step takes of each part what is owed in whole rows, then one by one where most is owed.

        In plain numbers: a few parts are no work for arrays, and long runs have many steps.
        """
        owed, taken, over = place.owed, [], -self.size
        for part, add in enumerate(due):
            owed[part] = have = owed[part] + add if add >= 0 else 0.0
            taken.append(whole := int(have + ROUNDING) if have > 0 else 0)
            over += whole
        for part in self._limited:
            if (less := taken[part] - int(self._most[part] - place.read[part])) > 0:
                taken[part] -= less
                over -= less
        while over > 0:  # where some have given more than they owed, others less
            most_taken = taken.index(max(taken))
            less = min(over, taken[most_taken])
            taken[most_taken] -= less
            over -= less
        if over < 0:
            self._fill(place, due, taken, -over)
        place.step += 1
        for part, whole in enumerate(taken):
            owed[part] -= whole
            place.read[part] += whole

    def _fill(self, place: Place, due: list[float], taken: list[int], missing: int) -> None:
        """Add so many rows to those that a step takes."""
        left = [round((n - k) * 1e9) if add >= 0 else -INF for n, k, add in zip(place.owed, taken, due, strict=True)]
        while True:
            for part in self._limited:
                if place.read[part] + taken[part] >= self._most[part]:
                    left[part] = -INF
            part = left.index(most_owed := max(left))  # of those that are owed alike, the first
            if most_owed == -INF:
                raise DataError(self._nothing_left(place.step + 1, max(due) < 0))
            taken[part] += 1
            missing -= 1
            if not missing:
                return
            left[part] = round((place.owed[part] - taken[part]) * 1e9)

    @staticmethod
    def _nothing_left(step: int, every: bool) -> str:
        if every:
            return (
                f"the mixture has nothing left at step {step}: every part has given its most (epochs, tokens) or "
                "has no weight; raise them, or lower trainer.max_steps"
            )
        return (
            f"the mixture has too few rows left at step {step}; raise epochs or tokens of a part, or lower "
            "trainer.max_steps"
        )

    def rows(self, start: int, count: int) -> np.ndarray:
        """Rows at global indices start..start+count-1."""
        first, last = start // self.size, -(-(start + count) // self.size)
        steps = [self._step(step) for step in range(first, last)]
        here = start - first * self.size
        return np.concatenate([np.empty(0, np.int64), *steps])[here : here + count]

    def first(self, count: int) -> np.ndarray:
        """The rows among the first `count`, each once."""
        return np.unique(self.rows(0, count))

    def _step(self, step: int) -> np.ndarray:
        before, after = self.read_before(step), self.read_before(step + 1)
        chosen = [
            first + order.rows(int(a), int(b - a))
            for first, order, a, b in zip(self._first, self._orders, before, after, strict=False)
        ]
        mixed = permute(np.arange(self.size), self.size, key_of("step", self.seed, self.fingerprint, step))
        return np.concatenate(chosen)[mixed]

    def figures(self, step: int, length: int) -> dict[str, float]:
        """What was read before `step`: epochs and tokens, padding counted, of each part."""
        read = self.read_before(step)
        epochs = {f"data/{s.name}/epochs": round(int(n) / s.rows, 4) for s, n in zip(self.shares, read, strict=True)}
        return epochs | {f"data/{s.name}/tokens": int(n) * length for s, n in zip(self.shares, read, strict=True)}


def shares_of(config: MixtureConfig, rows: Mapping[str, int], length: int) -> list[Share]:
    """The shares of parts with so many rows of `length` tokens.

    A part without a weight has rows ** (1 / temperature): 1 takes parts by their size, more takes them more alike
    (Devlin 2019; Xue et al. 2021, https://arxiv.org/abs/2010.11934, with alpha = 1 / temperature).
    """
    found = []
    for name, count in rows.items():
        part: PartConfig = config.part(name)
        weights = part.weights or ((0, float(count) ** (1 / config.temperature)),)
        if not count:
            raise DataError(f"data.parts.{name} has nothing to train on")
        limits = [part.epochs * count if part.epochs else np.inf, part.tokens // length if part.tokens else np.inf]
        if min(limits) < 1:
            raise DataError(
                f"data.parts.{name} gives no row of {length} tokens: epochs={part.epochs:g}, tokens={part.tokens}, "
                f"and it has {count:,} rows"
            )
        found.append(Share(name, count, weights, float(np.floor(min(limits)))))
    return found


def document_ends(source: Mixture, table: TokenTable) -> tuple[int, ...]:
    """Where each part's documents end in the table of a mixture."""
    assert isinstance(table.ids, Ids)
    return tuple(table.ids.documents_before(end) for end in source.ends)
