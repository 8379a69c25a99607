"""Small functions over a list of numbers, made as needed: which numbers to keep, what to do to each, what to return.

The answer is one line, and whatever computes the same is right: an answer is judged by what it returns for five lists.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from typing import Any, NamedTuple

from trivium import split_of
from trivium_plugins.code.library import fenced

K = range(2, 10)
KEEP = {"": "", "even": "n % 2 == 0", "odd": "n % 2 == 1", "positive": "n > 0", "negative": "n < 0"}
KEEP |= {f"greater than {k}": f"n > {k}" for k in K} | {f"less than {k}": f"n < {k}" for k in K}
KEEP |= {f"divisible by {k}": f"n % {k} == 0" for k in K if k > 2}
CHANGE = {"": "n", "square": "n * n", "double": "n * 2", "negate": "-n"}
CHANGE |= {f"add {k} to": f"n + {k}" for k in K} | {f"subtract {k} from": f"n - {k}" for k in K}
CHANGE |= {f"multiply by {k}": f"n * {k}" for k in K if k > 2}
RETURN = {
    "their sum": "sum({})",
    "how many there are": "len([{}])",
    "them as a list": "[{}]",
    "them as a list from large to small": "sorted([{}], reverse=True)",
    "the largest, or 0 if there is none": "max([{}], default=0)",
    "the smallest, or 0 if there is none": "min([{}], default=0)",
}


class Exercise(NamedTuple):
    """What is asked, and the expression that answers it."""

    asked: str
    expression: str


def draw(*key: object) -> int:
    """A uniform 64-bit number that depends on `key` alone."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, key)).encode()).digest()[:8])


def exercise(r: int) -> Exercise:
    """
    >>> exercise(0)
    Exercise(asked='Return their sum.', expression='sum(n for n in numbers)')
    """
    keep = list(KEEP)[r % len(KEEP)]
    change = list(CHANGE)[r // len(KEEP) % len(CHANGE)]
    end = list(RETURN)[r // len(KEEP) // len(CHANGE) % len(RETURN)]
    steps = [f"keep the numbers that are {keep}"] * bool(keep)
    if change:
        by = change.partition(" by ")
        steps.append(f"multiply each by {by[2]}" if by[1] else f"{change} each")
    asked = ", ".join([*steps, f"return {end}"]) + "."
    inner = f"{CHANGE[change]} for n in numbers" + (f" if {KEEP[keep]}" if keep else "")
    return Exercise(asked[0].upper() + asked[1:], RETURN[end].format(inner))


def tests_of(expression: str, key: str) -> str:
    """Assertions on the empty list and four lists of ten numbers, which are drawn for this exercise."""
    right: Callable[[list[int]], Any] = eval(f"lambda numbers: {expression}")  # made here, of the tables above
    draws = random.Random(draw("tests", key))
    lists = [[], *([draws.randint(-30, 30) for _ in range(10)] for _ in range(4))]
    return "\n".join(f"assert f({numbers}) == {right(numbers)!r}" for numbers in lists)


class Exercises:
    """`num_exercises` of one split."""

    def __init__(self, split: str, seed: int, size: int) -> None:
        self.split, self.seed, self.size = split, seed, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        found = next(
            made
            for attempt in range(10_000)  # one in ten is of the test split
            if split_of((made := exercise(draw(self.seed, index, attempt))).asked, 0.1, 0.1) == self.split
        )
        head = "def f(numbers):"
        asked = f"Write the Python function f.\n\n{fenced(head + chr(10) + f'    {DOC}{found.asked}{DOC}')}"
        answer = fenced(f"{head}\n    return {found.expression}")
        return {
            "id": f"exercises/{index}",
            "task": "exercises",
            "messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}],
            "answer": answer,
            "function": "f",
            "before": f"{head}\n",
            "tests": tests_of(found.expression, found.asked),
        }


DOC = '"' * 3
