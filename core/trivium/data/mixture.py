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

    def weight(self, step: int) -> float:
        """Linear between the steps that are named, level before the first and after the last."""
        steps, values = zip(*self.weights, strict=True)
        return float(np.interp(step, steps, values))


class MixedOrder:
    """The sequence of rows that a run reads of several parts, `size` a step; rows are numbered part after part.

    Every epoch of a part is another permutation of its rows. A part that has given its most gives no more, and the
    others take its share. Raises DataError when none is left.
    """

    def __init__(self, shares: Sequence[Share], size: int, seed: int, fingerprint: str) -> None:
        self.shares, self.size, self.seed, self.fingerprint = tuple(shares), size, seed, fingerprint
        self._first = np.cumsum([0, *(share.rows for share in shares)])
        self._orders = [Order(s.rows, seed, f"{fingerprint}/{s.name}") for s in shares]
        self._owed = np.zeros(len(shares))  # by the shares so far, and not read
        self._read = [np.zeros(len(shares), np.int64)]  # before each step, of each part

    def read_before(self, step: int) -> np.ndarray:
        """(parts,) rows read of each before `step`."""
        while len(self._read) <= step:
            self._read.append(self._read[-1] + self._taken(len(self._read) - 1))
        return self._read[step]

    def _taken(self, step: int) -> np.ndarray:
        """Rows that `step` takes of each part: what is owed in whole rows, then one by one where most is owed."""
        read, most = self._read[step], np.array([share.most for share in self.shares])
        taken = np.zeros(len(self.shares), np.int64)
        weights = np.array([share.weight(step) for share in self.shares])
        weights[read >= most] = 0
        if not weights.sum() > 0:
            raise DataError(
                f"the mixture has nothing left at step {step + 1}: every part has given its most (epochs, tokens) or "
                "has no weight; raise them, or lower trainer.max_steps"
            )
        self._owed[weights == 0] = 0
        self._owed += weights / weights.sum() * self.size
        taken = np.minimum(np.floor(np.maximum(self._owed + ROUNDING, 0)), most - read).astype(np.int64)
        while (over := int(taken.sum()) - self.size) > 0:  # where some have given more than they owed, others less
            most_taken = int(np.argmax(taken))
            taken[most_taken] -= min(over, int(taken[most_taken]))
        for _ in range(self.size - int(taken.sum())):
            owed = np.round(self._owed - taken, 9)  # of those that are owed alike, the first
            left = np.where((read + taken < most) & (weights > 0), owed, -np.inf)
            if not np.isfinite(left).any():
                raise DataError(
                    f"the mixture has too few rows left at step {step + 1}; raise epochs or tokens of a part, or lower "
                    "trainer.max_steps"
                )
            taken[int(np.argmax(left))] += 1
        self._owed -= taken
        return taken

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
