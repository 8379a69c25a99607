"""Who is served next: rows in lanes, those that are decoded first, then those whose prompts are read; others wait.

Requests that do not fit wait; running ones are not given up for them. Only with pages, which rows take as they grow,
the youngest row makes room for older ones and begins again later, with the same answer.
"""

from __future__ import annotations

from collections import deque
from itertools import takewhile

from trivium.inference.native.memory import Memory
from trivium.inference.native.row import Row


class Scheduler:
    """lanes: the rows that have memory, `lanes[i]` in lane i. decoding: how many of the first are decoded."""

    def __init__(self, memory: Memory, max_rows: int, *, prefix_cache: bool) -> None:
        self.memory, self.max_rows, self.prefix_cache = memory, max_rows, prefix_cache
        self.lanes: list[Row] = []
        self.decoding = 0
        self.waiting: deque[Row] = deque()
        self.preempted = 0

    @property
    def reading(self) -> list[Row]:
        """Rows whose prompts are not read yet, the oldest first."""
        return self.lanes[self.decoding :]

    def count_decoding(self) -> None:
        """The first rows of which one token is unread are decoded."""
        self.decoding = sum(1 for _ in takewhile(lambda row: row.began and row.unread == 1, self.lanes))

    def find(self, request_id: str) -> Row | None:
        """The row of a request."""
        return next((row for row in (*self.lanes, *self.waiting) if row.request.id == request_id), None)

    def leave(self, row: Row) -> None:
        """Take a row out, wherever it is. Lanes stay in order."""
        if row not in self.lanes:
            self.waiting.remove(row)
            return
        lane, memory = self.lanes.index(row), self.memory
        if self.prefix_cache:
            memory.keep(lane, row.ids[: row.read])
        if lane < self.decoding:
            self.decoding -= 1
            lane = self._move(lane, self.decoding)
        for following in range(lane, len(self.lanes) - 1):  # prompts are read in the order in which they came
            lane = self._move(following, following + 1)
        memory.leave()
        self.lanes.pop()
        if not self.lanes:
            memory.rest()

    def _move(self, lane: int, other: int) -> int:
        if lane != other:
            self.memory.move(lane, other)
            self.lanes[lane], self.lanes[other] = self.lanes[other], self.lanes[lane]
        return other

    def admit(self) -> None:
        """Let rows in while there is room, in the order in which they came.

        One whose prompt begins with a page that a row before it is about to read waits until that is in the cache.
        """
        while self.waiting and len(self.lanes) < self.max_rows:
            row = self.waiting[0]
            if not self.memory.fits(len(row.ids), row.most):
                return
            if self.prefix_cache and any(self._soon_cached(row, before) for before in self.reading):
                return
            self.waiting.popleft()
            row.read = self.memory.enter(row.ids, row.most)
            row.cached = row.cached if row.began else row.read
            self.lanes.append(row)

    def _soon_cached(self, row: Row, before: Row) -> bool:
        """Whether the next page of what `before` reads is one that `row` needs, too."""
        end = before.read + self.memory.page
        return end < min(len(row.ids), len(before.ids)) and row.ids[:end] == before.ids[:end]

    def group(self, budget: int) -> tuple[int, int]:
        """How many of the first reading rows to read together, and how many tokens of each at most.

        Several are read whole, and none is padded to more than twice its length; a prompt longer than the budget is
        read a piece at a time, alone.
        """
        rows = self.reading
        if not rows:
            return 0, 0
        count, longest, shortest = 1, rows[0].unread, rows[0].unread
        if longest >= budget:
            return 1, budget
        for row in rows[1:]:
            longest, shortest = max(longest, row.unread), min(shortest, row.unread)
            if longest * (count + 1) > budget or longest > 2 * shortest:
                break
            count += 1
        return count, max(row.unread for row in rows[:count])

    def make_room(self, lanes: slice, lengths: list[int]) -> bool:
        """Have memory for so many tokens in each of these lanes: False after the youngest row had to go for it, so that
        lanes must be looked at anew."""
        if self.memory.reach(lanes, lengths):
            return True
        youngest = max(self.lanes, key=lambda row: row.number)
        self.leave(youngest)
        youngest.read, youngest.drafts = 0, []
        self.waiting.appendleft(youngest)
        self.preempted += 1
        return False
