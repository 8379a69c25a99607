"""Which page of the cache holds which tokens: counted references, chains of pages for prefixes, the oldest given up.

A page is `size` tokens in a row. A published page can be found by (the page before it, its tokens): the page before by
a serial number that is never used twice, the tokens by comparing them, so a hit is never of other text.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

ROOT = 0
"""Serial number of the empty prefix."""


class Blocks:
    """Page numbers 0 .. total - 1, each free, held (by so many), or kept: held by none, but published.

    free + held + kept == total, always.
    """

    def __init__(self, total: int, size: int) -> None:
        self.total, self.size = total, size
        self._free = list(range(total - 1, -1, -1))
        self._held: dict[int, int] = {}
        self._kept: OrderedDict[int, None] = OrderedDict()  # the first is given up first
        self._found: dict[tuple[int, tuple[int, ...]], int] = {}  # (serial of the page before, tokens) -> page
        self._key: dict[int, tuple[int, tuple[int, ...]]] = {}  # its inverse
        self._serial: dict[int, int] = {}
        self._next = ROOT + 1

    @property
    def free(self) -> int:
        """Pages that hold nothing."""
        return len(self._free)

    @property
    def kept(self) -> int:
        """Pages that hold a prefix and that nobody reads."""
        return len(self._kept)

    @property
    def held(self) -> int:
        """Pages that somebody reads or writes."""
        return len(self._held)

    def alone(self, page: int) -> bool:
        """Whether one row alone holds a page, and no later one can find it."""
        return self._held.get(page) == 1 and page not in self._key

    def match(self, tokens: Sequence[int]) -> list[int]:
        """The pages of the longest published prefix of whole pages. They are held until released."""
        pages, before = [], ROOT
        for start in range(0, len(tokens) - self.size + 1, self.size):
            page = self._found.get((before, tuple(tokens[start : start + self.size])))
            if page is None:
                break
            pages.append(page)
            before = self._serial[page]
        for page in pages:
            self._held[page] = self._held.get(page, 0) + 1
            self._kept.pop(page, None)
        return pages

    def take(self, count: int) -> list[int] | None:
        """So many pages to write into, held; the longest unread ones are given up for it. None where that many cannot
        be had (and nothing is changed)."""
        if count > len(self._free) + len(self._kept):
            return None
        pages = []
        for _ in range(count):
            if not self._free:
                page, _ = self._kept.popitem(last=False)
                self._forget(page)
                self._free.append(page)
            pages.append(self._free.pop())
        self._held.update(dict.fromkeys(pages, 1))
        return pages

    def publish(self, pages: Sequence[int], tokens: Sequence[int]) -> None:
        """Let the whole pages among `pages`, which hold `tokens`, be found. What is published twice is found once."""
        before = ROOT
        for number, page in enumerate(pages[: len(tokens) // self.size]):
            key = (before, tuple(tokens[number * self.size : (number + 1) * self.size]))
            known = self._found.get(key)
            if known is None and page not in self._key:
                self._found[key], self._key[page], self._serial[page] = page, key, self._next
                self._next += 1
                known = page
            if known is None:  # a page is found by one name
                return
            before = self._serial[known]

    def release(self, pages: Sequence[int]) -> None:
        """Let go of pages held: the last of a chain is given up first, since the others serve more prompts."""
        for page in reversed(pages):
            self._held[page] -= 1
            if self._held[page]:
                continue
            del self._held[page]
            if page in self._key:
                self._kept[page] = None
            else:
                self._free.append(page)

    def clear(self) -> None:
        """Forget every prefix: what pages hold is of other weights."""
        for page in list(self._key):
            self._forget(page)
        self._free += self._kept
        self._kept.clear()

    def _forget(self, page: int) -> None:
        del self._found[self._key.pop(page)]
        del self._serial[page]
