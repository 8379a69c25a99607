"""A right and a wrong answer to one problem: what preference tuning and reward models learn from.

Problems are those of `tasks`, split by the same rule and drawn apart. A wrong answer is a mistake that a learner makes,
written as a right answer is, so that nothing but being wrong gives it away.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from trivium_plugins.primer import texts
from trivium_plugins.primer.config import PrimerConfig
from trivium_plugins.primer.tasks import Problem, draw, is_right, problem_of

Mistake = Callable[[Problem, int], str]
"""A wrong answer from a problem and a random number; empty, or the right one, where the mistake cannot be made."""


def _numbers(problem: Problem) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", problem.question)]


def _off_by(step: int, low: int) -> Mistake:
    """Too large or too small by `step`; too large where the other would be less than `low`."""

    def mistake(problem: Problem, r: int) -> str:
        n, sign = int(problem.answer), 1 - 2 * (r % 2)
        return str(n + sign * step if n + sign * step >= low else n + step)

    return mistake


def _digits_swapped(problem: Problem, r: int) -> str:
    """The last two digits the other way round, unless a zero would come first."""
    n = problem.answer
    swapped = n[:-2] + n[:-3:-1]
    return swapped if len(n.lstrip("-")) > 1 and swapped == str(int(swapped)) else ""


def _subtracted(problem: Problem, r: int) -> str:
    a, b = _numbers(problem)
    return str(a - b)


def _added(problem: Problem, r: int) -> str:
    return str(sum(_numbers(problem)))


def _sign_dropped(problem: Problem, r: int) -> str:
    return problem.answer.removeprefix("-")


def _other_number(problem: Problem, r: int) -> str:
    return next(str(n) for n in _numbers(problem) if str(n) != problem.answer)


def _digits_mixed(problem: Problem, r: int) -> str:
    """The first digit of one number with the last of the other, where both have two."""
    a, b = (str(n) for n in _numbers(problem))
    mixed = (a[0] + b[1:], b[0] + a[1:])[r % 2]
    return mixed if len(a) == len(b) == 2 and mixed not in (a, b) else ""


def _letters_swapped(problem: Problem, r: int) -> str:
    """Two different neighbours the other way round."""
    letters = problem.answer.split(" ")
    places = [i for i in range(len(letters) - 1) if letters[i] != letters[i + 1]]
    if not places:
        return ""
    i = places[r % len(places)]
    return " ".join([*letters[:i], letters[i + 1], letters[i], *letters[i + 2 :]])


def _letter_replaced(problem: Problem, r: int) -> str:
    letters = problem.answer.split(" ")
    i, shift = r % len(letters), 1 + r // len(letters) % 25
    letters[i] = chr(ord("a") + (ord(letters[i]) - ord("a") + shift) % 26)
    return " ".join(letters)


def _letter_left_out(problem: Problem, r: int) -> str:
    letters = problem.answer.split(" ")
    del letters[r % len(letters)]
    return " ".join(letters)


def _not_turned(problem: Problem, r: int) -> str:
    return problem.answer[::-1]


SPELLING: dict[str, Mistake] = {
    "letters swapped": _letters_swapped, "letter replaced": _letter_replaced, "letter left out": _letter_left_out,
}  # fmt: skip
MISTAKES: dict[str, dict[str, Mistake]] = {
    "add": {
        "off by one": _off_by(1, low=0), "off by ten": _off_by(10, low=0), "digits swapped": _digits_swapped,
        "subtracted": _subtracted,
    },
    "subtract": {
        "off by one": _off_by(1, low=-99), "off by ten": _off_by(10, low=-99), "digits swapped": _digits_swapped,
        "added": _added, "sign dropped": _sign_dropped,
    },
    "copy": SPELLING,
    "reverse": {**SPELLING, "not turned round": _not_turned},
    "count": {"off by one": _off_by(1, low=1), "off by two": _off_by(2, low=1)},
    "compare": {"other number": _other_number, "digits mixed": _digits_mixed},
}  # fmt: skip


def wrong_answers(kind: str, problem: Problem, *key: object) -> dict[str, str]:
    """By mistake, what it makes of the problem; only the mistakes that can be made there. key: of the draws."""
    made = {name: mistake(problem, draw(*key, name)) for name, mistake in MISTAKES[kind].items()}
    return {name: wrong for name, wrong in made.items() if wrong and not is_right(kind, problem.answer, wrong)}


class Pairs:
    """`num_pairs` problems, each with its answer and a mistake; the kinds take turns."""

    def __init__(self, config: PrimerConfig) -> None:
        texts.words()  # a damaged word list is reported when the source is built, not in the middle of a run
        self.config = config
        self.kinds = list(config.pair_tasks or config.tasks)

    def __len__(self) -> int:
        return self.config.num_pairs

    def __getitem__(self, index: int) -> dict[str, Any]:
        number, which = divmod(index, len(self.kinds))
        kind = self.kinds[which]
        key = (self.config.seed, "pairs", kind, number)  # the word keeps these draws apart from those of tasks
        problem = problem_of(kind, self.config.split, *key)
        wrong = list(wrong_answers(kind, problem, *key).values())
        asked = {"role": "user", "content": problem.question}
        chosen, rejected = (
            [asked, {"role": "assistant", "content": answer}]
            for answer in (problem.answer, wrong[draw(*key, "mistake") % len(wrong)])
        )
        return {"id": f"pairs/{kind}/{number}", "task": kind, "chosen": chosen, "rejected": rejected}

    def identity(self) -> list[Any]:
        """What the content follows from, beyond the split."""
        return [texts.digest(texts.WORDS), self.config.seed, self.kinds, self.config.num_pairs]
