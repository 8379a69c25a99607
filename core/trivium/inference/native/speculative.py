"""Guessing the next tokens, so that one pass of the model confirms several (Leviathan et al. 2023,
https://arxiv.org/abs/2211.17192).

Lossless in the strongest sense: at each guessed place the model draws its own token with that place's own random
number, as it would without guesses, and a guess counts only where it is that very token. So the answer is the same
whatever is guessed, and a guess of probability p is right with probability p, the best there is for one guess.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch

from trivium.inference.native.row import Row
from trivium.inference.sampling import Drawn, sample_places
from trivium.models.cache import KVCache
from trivium.models.protocol import CausalLM

GRAMS = (4, 3, 2)
"""Lengths of endings that are looked up, the longest first."""
GROWTH = 256


class Guesser(ABC):
    """Fills in rows' drafts."""

    @abstractmethod
    def guess(self, rows: Sequence[Row], counts: Sequence[int]) -> None:
        """Set `row.drafts` to at most `counts` tokens that may come next."""


class NGrams(Guesser):
    """What followed when the row last ended as it does now (Saxena 2023, prompt lookup decoding): for answers that
    repeat their prompts, such as code that is edited, summaries, quotations."""

    def __init__(self) -> None:
        self._known: WeakKeyDictionary[Row, tuple[dict[tuple[int, ...], int], list[int]]] = WeakKeyDictionary()

    def guess(self, rows: Sequence[Row], counts: Sequence[int]) -> None:
        for row, count in zip(rows, counts, strict=True):
            follows, upto = self._known.setdefault(row, ({}, [0]))
            ids = row.ids
            for end in range(upto[0], len(ids)):  # what ids[end] follows; the row's own end follows nothing yet
                for size in GRAMS:
                    if end >= size:
                        follows[tuple(ids[end - size : end])] = end
            upto[0] = len(ids)
            found = (follows.get(tuple(ids[-size:])) for size in GRAMS if len(ids) >= size)
            start = next((place for place in found if place is not None), None)
            row.drafts = [] if start is None else ids[start : start + count]


class Draft(Guesser):
    """A smaller model of the same vocabulary. It draws with the random numbers that the model will draw with, so that
    what both find likely is what both draw."""

    def __init__(self, model: CausalLM) -> None:
        self.model = model
        self._caches: WeakKeyDictionary[Row, tuple[KVCache, int]] = WeakKeyDictionary()

    def guess(self, rows: Sequence[Row], counts: Sequence[int]) -> None:
        for row, count in zip(rows, counts, strict=True):
            row.drafts = []
            if count > 0:
                self._one(row, min(count, self.model.context - len(row.ids)))

    def _one(self, row: Row, count: int) -> None:
        length = len(row.ids) + count
        cache, read = self._caches.get(row, (None, 0))
        if cache is None or cache.length < length:
            longer = self.model.new_cache(1, min(self.model.context, length + GROWTH))
            if cache is not None:
                longer.copy_from(cache)
            cache = longer
        tokens = row.ids[read:]
        for number in range(count):
            places = torch.arange(len(row.ids) + number - len(tokens), len(row.ids) + number, device=cache.keys.device)
            given = torch.tensor([tokens], device=places.device)
            hidden = self.model(given, places[None], cache=cache)
            (drawn,) = sample_places(self.model.head(hidden[:, -1]).float(), [row.place(number)])
            if not isinstance(drawn, Drawn):
                break
            row.drafts.append(drawn.token)
            tokens = [drawn.token]
        self._caches[row] = cache, len(row.ids)  # guesses are read again, where they were right
