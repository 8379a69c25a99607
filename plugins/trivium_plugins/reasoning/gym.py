"""The package reasoning-gym behind two questions: problem number so-and-so of a task, and what an answer is worth.

Its verifiers are asked with care. Those of some tasks drop a minus sign ("-7" passes for 7), give a share to any text
that holds the answer ("17" for 7), or may fail off the main thread and then say 0: so plain numbers are compared as
numbers here, and a verifier that does not accept its own right answer is refused wherever it runs.
"""

from __future__ import annotations

import json
import re
import threading
from decimal import Decimal
from functools import lru_cache
from importlib import metadata
from typing import Any

from trivium import ConfigError, DataError
from trivium.registry import near_misses
from trivium_plugins.reasoning.config import SETTING

PROBLEMS = 100_000
"""Different draws of one task. A few of the package's generators list them all beforehand, and slowly."""
FEWER = {"acre": 2_000, "word_ladder": 1_000}
NUMBER = re.compile(r"[+-]?(\d+|\d{1,3}(,\d{3})+)(\.\d+)?")


class Gym:
    """One task with its settings and seed."""

    def __init__(self, task: str, settings: dict[str, Any], seed: int) -> None:
        try:
            from reasoning_gym.factory import DATASETS, create_dataset
        except ImportError as error:
            raise DataError(
                f"domain=reasoning needs the package reasoning-gym ({error}); pip install 'trivium-llm[reasoning]'"
            ) from error
        if task not in DATASETS:
            raise ConfigError(
                f"data.tasks has {task!r}, which reasoning-gym {version()} does not know.{near_misses(task, DATASETS)}"
            )
        self._told = task, settings, seed
        self.task, self.num_problems = task, FEWER.get(task, PROBLEMS)
        self._trusted: set[int] = set()
        try:
            self._made = create_dataset(task, seed=seed, size=self.num_problems, **settings)
        except (AssertionError, TypeError, ValueError) as error:
            raise ConfigError(
                f"data.tasks has {task!r}, which reasoning-gym does not make with {settings or 'its own settings'} "
                f"({error}); set data.settings=[{task}.NAME=VALUE]"
            ) from error
        self.problem = lru_cache(maxsize=256)(self._problem)  # the answers to one prompt are judged one after another

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        """Another process makes it anew: what it remembers of problems cannot travel."""
        return type(self), self._told

    def _problem(self, number: int) -> dict[str, Any]:
        """question, answer and what the verifier needs."""
        found = self._made[number]
        if not isinstance(found["answer"], str) or not found["answer"].strip():
            raise DataError(
                f"{self.task} of reasoning-gym gives no right answer (problem {number}), so there is nothing to learn "
                "or to score against; take it out of data.tasks"
            )
        return found

    def value(self, number: int, given: str) -> float:
        """What an answer is worth, 0 to 1. Raises DataError where the verifier cannot be trusted."""
        problem = self.problem(number)
        right = problem["answer"]
        if NUMBER.fullmatch(right):
            return float(bool(NUMBER.fullmatch(given)) and _number(given) == _number(right))
        thread = threading.get_ident()
        if thread not in self._trusted:
            own = self._made.score_answer(right, problem)
            if own != 1:
                raise DataError(
                    f"the verifier of {self.task} gives its own right answer {own} instead of 1 (problem {number}, "
                    f"thread {threading.current_thread().name}); its rewards would be wrong, take it out of data.tasks"
                )
            self._trusted.add(thread)
        return float(self._made.score_answer(given, problem)) if given else 0.0


def _number(text: str) -> Decimal:
    """
    >>> _number("-1,204.50") == _number("-1204.5"), _number("-7") == _number("7")
    (True, False)
    """
    return Decimal(text.replace(",", ""))


def version() -> str:
    """Of the package: another one may make other problems."""
    return metadata.version("reasoning-gym")


def settings_of(task: str, settings: list[str]) -> dict[str, Any]:
    """The values that were set for one task: numbers, true and false, lists, or else text.

    >>> settings_of("gcd", ["gcd.max_value=99", "chain_sum.max_terms=3"])
    {'max_value': 99}
    """
    found: dict[str, Any] = {}
    for setting in settings:
        match = SETTING.fullmatch(setting)
        if match and match[1] == task:
            try:
                found[match[2]] = json.loads(match[3])
            except ValueError:
                found[match[2]] = match[3]
    return found
