"""Six kinds of small problem with one right answer each, made from (seed, kind, number) alone.

A problem's split is the hash of the problem, not of the example: a problem of the test split is in no training set,
whatever the seed and the phrasing. Pairs of numbers are hashed without their order, so that 23 + 45 and 45 + 23 (and
23 - 45 and 45 - 23) are on one side. Spelled words have a space between letters: each letter is then its own token,
and the model sees what it is asked to copy, turn round or count.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

from trivium.data.source import split_of
from trivium.errors import DataError
from trivium_plugins.primer import texts
from trivium_plugins.primer.config import PrimerConfig

NUMBERS = 100
"""Numbers are 0 to 99."""

SPELLED = frozenset({"copy", "reverse"})
"""Kinds whose answer is a spelled word, where spaces and capitals do not matter."""


class Problem(NamedTuple):
    """One problem: what decides its split, what is asked, and the one right answer."""

    key: str
    question: str
    answer: str


def draw(*key: object) -> int:
    """A uniform 64-bit number that depends on `key` alone: no generator state, so any example can be made first."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, key)).encode()).digest()[:8])


def add(r: int) -> Problem:
    """A sum of two numbers."""
    a, b = _two_numbers(r)
    return Problem(_pair(a, b), f"What is {a} + {b}?", str(a + b))


def subtract(r: int) -> Problem:
    """A difference of two numbers, which may be negative."""
    a, b = _two_numbers(r)
    return Problem(_pair(a, b), f"What is {a} - {b}?", str(a - b))


def compare(r: int) -> Problem:
    """The larger or the smaller of two different numbers."""
    a = r % NUMBERS
    b = (a + 1 + r // NUMBERS % (NUMBERS - 1)) % NUMBERS
    asked, answer = (("larger", max(a, b)), ("smaller", min(a, b)))[r // NUMBERS**2 % 2]
    return Problem(_pair(a, b), f"Which is {asked}, {a} or {b}?", str(answer))


def copy(r: int) -> Problem:
    """A spelled word as it is."""
    word = _word(r)
    return Problem(word, f"Copy: {' '.join(word)}", " ".join(word))


def reverse(r: int) -> Problem:
    """A spelled word from its last letter to its first."""
    word = _word(r)
    return Problem(word, f"Reverse: {' '.join(word)}", " ".join(reversed(word)))


def count(r: int) -> Problem:
    """The number of letters of a spelled word."""
    word = _word(r)
    return Problem(word, f"How many letters: {' '.join(word)}", str(len(word)))


def _two_numbers(r: int) -> tuple[int, int]:
    return r % NUMBERS, r // NUMBERS % NUMBERS


def _pair(a: int, b: int) -> str:
    return f"{min(a, b)},{max(a, b)}"


def _word(r: int) -> str:
    choices = texts.words()
    return choices[r % len(choices)]


KINDS: dict[str, Callable[[int], Problem]] = {
    "add": add, "subtract": subtract, "copy": copy, "reverse": reverse, "count": count, "compare": compare,
}  # fmt: skip


def problem_of(kind: str, split: str, *key: object) -> Problem:
    """The first problem of `kind` drawn for `key` that belongs to the split."""
    for attempt in range(10_000):  # one in ten is of the test split, so the end is never reached with whole data
        problem = KINDS[kind](draw(*key, attempt))
        if split_of(f"{kind}/{problem.key}", 0.1, 0.1) == split:
            return problem
    raise DataError(f"no {kind!r} problem of the {split} split can be made from the bundled words")


class Tasks:
    """`num_tasks` problems, the kinds taking turns, so that any run of examples is balanced."""

    def __init__(self, config: PrimerConfig) -> None:
        texts.words()  # a damaged word list is reported when the source is built, not in the middle of a run
        self.config = config

    def __len__(self) -> int:
        return self.config.num_tasks

    def __getitem__(self, index: int) -> dict[str, Any]:
        number, which = divmod(index, len(self.config.tasks))
        kind = self.config.tasks[which]
        problem = problem_of(kind, self.config.split, self.config.seed, kind, number)
        turns = [{"role": "user", "content": problem.question}, {"role": "assistant", "content": problem.answer}]
        return {"id": f"tasks/{kind}/{number}", "task": kind, "messages": turns, "answer": problem.answer}

    def identity(self) -> list[Any]:
        """What the content follows from, beyond the split."""
        return [texts.digest(texts.WORDS), self.config.seed, list(self.config.tasks), self.config.num_tasks]


def is_right(task: str, answer: str, completion: str) -> bool:
    """Whether `completion` is `answer` and nothing else, but for space around it and one full stop at its end.

    >>> is_right("subtract", "-7", " -7.\\n"), is_right("subtract", "-7", "7"), is_right("add", "68", "68 and more")
    (True, False, False)
    >>> is_right("reverse", "e n o t s", "Enots")
    True
    """
    given = completion.strip().removesuffix(".").strip()
    if task in SPELLED:
        given, answer = given.replace(" ", "").lower(), answer.replace(" ", "").lower()
    return given == answer
