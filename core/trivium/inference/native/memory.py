"""Where keys and values live: a slab with a lane for each row, or pages. One view of both for the model.

Rows are numbered by lane, without gaps: 0 .. rows - 1. A model sees some neighbouring lanes as a KVCache whose slot j
is position j, and never knows which memory is behind it. Slabs are contiguous, which CPUs want; pages hold what rows
really use, which is worth a gather on GPUs. Both keep prefixes of earlier rows in pages.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from trivium.inference.native.blocks import Blocks
from trivium.models.cache import KVCache

NewCache = Callable[[int, int], KVCache]
GROWTH = 64
"""Slots are added this many at a time at least: few reallocations, little unread memory."""


class Pool:
    """The tensors of all pages, and one more where padding is written. They grow as pages are used."""

    def __init__(self, new_cache: NewCache, blocks: Blocks) -> None:
        self.new_cache, self.blocks = new_cache, blocks
        self.cache = new_cache(1, blocks.size)

    @property
    def sink(self) -> int:
        """The page that nobody reads."""
        return self.cache.keys.shape[1] - 1

    def reach(self, pages: Sequence[int]) -> None:
        """Have memory for these pages."""
        needed = max(pages, default=-1) + 1
        if needed > self.sink:
            grown = self.new_cache(1 + min(self.blocks.total, max(needed, 2 * self.sink)), self.blocks.size)
            grown.copy_from(self.cache)
            self.cache = grown

    def read(self, held: Tensor, layer: int | slice, pages: Tensor) -> Tensor:
        """Keys or values of (..., n) pages as slots: (..., K, n * size, D), layers first where there are several."""
        found = held[layer][..., pages, :, :, :].movedim(-4, -3)
        return found.flatten(-3, -2)


class Memory(ABC):
    """What the engine asks for. new_cache: makes one of so many rows and slots. context: the model's. slots: tokens
    that fit."""

    def __init__(self, new_cache: NewCache, context: int, slots: int, page: int, prefix_slots: int) -> None:
        self.new_cache, self.context, self.slots, self.page = new_cache, context, slots, page
        self.blocks = Blocks(prefix_slots // page, page)
        self.pool = Pool(new_cache, self.blocks)
        self.rows = 0

    @abstractmethod
    def fits(self, tokens: int, most: int) -> bool:
        """Whether a row of so many tokens, which may become `most`, can begin beside those that are here."""

    @abstractmethod
    def enter(self, tokens: Sequence[int], most: int) -> int:
        """Begin a row in the next lane: how many of its tokens were found in the prefix cache, never all."""

    @abstractmethod
    def reach(self, lanes: slice, lengths: Sequence[int]) -> bool:
        """Have memory for so many tokens in each lane; False where that cannot be."""

    @abstractmethod
    def view(self, lanes: slice, length: int) -> KVCache:
        """The first `length` slots of these lanes."""

    @abstractmethod
    def keep(self, lane: int, tokens: Sequence[int]) -> None:
        """Let later rows find these tokens, all of which the lane has read."""

    @abstractmethod
    def leave(self) -> None:
        """Free the last lane."""

    @abstractmethod
    def move(self, ending: int, other: int) -> None:
        """Let a row that ends and another exchange lanes. What the ending one holds need not be there afterwards."""

    @abstractmethod
    def wipe(self, lane: int) -> None:
        """Overwrite what a lane holds: a NaN in a slot that is masked still spoils who comes to see it."""

    @property
    @abstractmethod
    def used(self) -> int:
        """Slots that rows hold."""

    @property
    def kept(self) -> int:
        """Slots of prefixes that no row holds."""
        return self.blocks.kept * self.page

    def rest(self) -> None:  # noqa: B027
        """No row is left: hand back what only rows needed."""

    def forget(self) -> None:
        """No prefix is found any more."""
        self.blocks.clear()


class Slab(Memory):
    """One lane a row. Prefixes are copied in and out."""

    def __init__(self, new_cache: NewCache, context: int, slots: int, page: int, prefix_slots: int) -> None:
        super().__init__(new_cache, context, slots, page, prefix_slots)
        self.cache = new_cache(1, GROWTH)
        self.most: list[int] = []  # of each lane, how many tokens it may become

    @property
    def used(self) -> int:
        return sum(self.most)

    def fits(self, tokens: int, most: int) -> bool:
        return (self.rows + 1) * max([most, *self.most]) <= self.slots

    def enter(self, tokens: Sequence[int], most: int) -> int:
        pages = self.blocks.match(tokens[: len(tokens) - 1])
        found = len(pages) * self.page
        lane, self.rows = self.rows, self.rows + 1
        self.most.append(most)
        self._grow(self.rows, max(found, 1))
        if pages:
            numbers = torch.tensor(pages, device=self.cache.keys.device)
            self.cache.keys[:, lane, :, :found] = self.pool.read(self.pool.cache.keys, slice(None), numbers)
            self.cache.values[:, lane, :, :found] = self.pool.read(self.pool.cache.values, slice(None), numbers)
        self.blocks.release(pages)
        return found

    def reach(self, lanes: slice, lengths: Sequence[int]) -> bool:
        return True  # a lane's `most` was held for it from the beginning

    def _grow(self, rows: int, length: int) -> None:
        has_rows, has = self.cache.keys.shape[1], self.cache.length
        if rows <= has_rows and length <= has:
            return
        rows = has_rows if rows <= has_rows else max(rows, 2 * has_rows)
        most = max(length, self.context)  # padding may reach a little beyond the context
        length = has if length <= has else min(most, max(length + GROWTH, has + has // 2))
        grown = self.new_cache(rows, length)
        grown.copy_from(self.cache)
        self.cache = grown

    def view(self, lanes: slice, length: int) -> KVCache:
        self._grow(self.rows, length)
        return self.cache.part(lanes, length)

    def keep(self, lane: int, tokens: Sequence[int]) -> None:
        known = self.blocks.match(tokens)
        new = self.blocks.take(len(tokens) // self.page - len(known))
        if new:
            self.pool.reach(new)
            first, last = len(known) * self.page, (len(known) + len(new)) * self.page
            numbers = torch.tensor(new, device=self.cache.keys.device)
            for pool, held in ((self.pool.cache.keys, self.cache.keys), (self.pool.cache.values, self.cache.values)):
                pool[:, numbers] = held[:, lane, :, first:last].unflatten(2, (len(new), self.page)).movedim(2, 1)
            self.blocks.publish([*known, *new], tokens)
        self.blocks.release([*known, *(new or [])])

    def leave(self) -> None:
        self.most.pop()
        self.rows -= 1

    def rest(self) -> None:
        self.cache = self.new_cache(1, GROWTH)

    def move(self, ending: int, other: int) -> None:
        for held in (self.cache.keys, self.cache.values):
            held[:, ending, :, : self.most[other]] = held[:, other, :, : self.most[other]]
        self.most[ending], self.most[other] = self.most[other], self.most[ending]

    def wipe(self, lane: int) -> None:
        self.cache.keys[:, lane] = 0
        self.cache.values[:, lane] = 0


class Paged(Memory):
    """A table of pages for each row, which it may share with others; more are taken as it grows."""

    def __init__(self, new_cache: NewCache, context: int, slots: int, page: int, prefix_slots: int) -> None:
        super().__init__(new_cache, context, slots, page, slots)  # prefixes stay in the pages that rows have left
        self.tables: list[list[int]] = []

    @property
    def used(self) -> int:
        return self.blocks.held * self.page

    def fits(self, tokens: int, most: int) -> bool:
        return self._pages(tokens + 1) <= self.blocks.free + self.blocks.kept

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self.page)

    def enter(self, tokens: Sequence[int], most: int) -> int:
        pages = self.blocks.match(tokens[: len(tokens) - 1])
        self.tables.append(pages)
        self.rows += 1
        return len(pages) * self.page

    def reach(self, lanes: slice, lengths: Sequence[int]) -> bool:
        for table, length in zip(self.tables[lanes], lengths, strict=True):
            more = self.blocks.take(max(0, self._pages(length) - len(table)))
            if more is None:
                return False
            table += more
            self.pool.reach(more)
        return True

    def view(self, lanes: slice, length: int) -> KVCache:
        tables, wide = self.tables[lanes], self._pages(length)
        rows = [(table + [self.pool.sink] * wide)[:wide] for table in tables]
        return PagedCache(self.pool, torch.tensor(rows, device=self.pool.cache.keys.device))

    def keep(self, lane: int, tokens: Sequence[int]) -> None:
        self.blocks.publish(self.tables[lane], tokens)

    def leave(self) -> None:
        self.blocks.release(self.tables.pop())
        self.rows -= 1

    def move(self, ending: int, other: int) -> None:
        self.tables[ending], self.tables[other] = self.tables[other], self.tables[ending]

    def wipe(self, lane: int) -> None:
        own = [page for page in self.tables[lane] if self.blocks.alone(page)]
        self.pool.cache.keys[:, own] = 0
        self.pool.cache.values[:, own] = 0


class PagedCache(KVCache):
    """Rows of pages as a KVCache: written in place, gathered to be read."""

    def __init__(self, pool: Pool, tables: Tensor) -> None:
        self.pool, self.tables = pool, tables
        self.keys, self.values, self.dtype = pool.cache.keys, pool.cache.values, pool.cache.dtype

    @property
    def length(self) -> int:
        return self.tables.shape[1] * self.pool.blocks.size

    def update(self, layer: int, keys: Tensor, values: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        size, cache = self.pool.blocks.size, self.pool.cache
        pages, slots = self.tables.gather(1, positions // size), positions % size
        for held, new in ((self.keys, keys), (self.values, values)):
            held[layer][pages, :, slots] = cache.encoded(new).transpose(1, 2)
        read = [cache.decoded(self.pool.read(held, layer, self.tables)) for held in (self.keys, self.values)]
        return read[0], read[1]
