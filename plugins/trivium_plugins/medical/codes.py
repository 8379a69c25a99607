"""Questions about codes: from the meaning to the code and back, among answers of other categories.

Wrong answers are codes of the same split, one of each category at most: no held-out meaning is ever read in training.
"""

from __future__ import annotations

import hashlib
from typing import Any

from trivium import DataError
from trivium_plugins.medical.texts import Code


class Codes:
    """Question i is about the i-th code in an order drawn from the seed; even ones ask for the code, odd ones back."""

    def __init__(self, codes: list[Code], num: int, options: int, seed: int) -> None:
        self._codes = sorted(codes, key=lambda one: draw(seed, one.code))
        self._num, self._options, self._seed = min(num, len(codes)), options, seed
        found = len({one.code[:3] for one in codes})
        if found < max(options, 1):
            raise DataError(f"data.options={options} needs as many categories of codes, and this split has {found}")

    def __len__(self) -> int:
        return self._num

    def __getitem__(self, index: int) -> dict[str, Any]:
        right = self._codes[index]
        task = ("code", "meaning")[index % 2] if self._options else "code"
        answer = getattr(right, task)
        asked = f"Which ICD-10-CM code stands for: {right.meaning}?"
        if task == "meaning":
            asked = f"What does the ICD-10-CM code {right.code} stand for?"
        if self._options:
            shown = [getattr(one, task) for one in self._shown(right)]
            asked = "\n".join([asked, *(f"- {option}" for option in shown)])
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        return {"id": f"{task}/{right.code}", "task": task, "messages": turns, "answer": answer}

    def _shown(self, right: Code) -> list[Code]:
        """The right code and others, each of another category, in an order drawn from the seed."""
        shown, attempt = {right.code[:3]: right}, 0
        while len(shown) < self._options:
            drawn = self._codes[draw(self._seed, right.code, attempt) % len(self._codes)]
            shown.setdefault(drawn.code[:3], drawn)
            attempt += 1
        return sorted(shown.values(), key=lambda one: draw(self._seed, right.code, "order", one.code))


def draw(*key: object) -> int:
    """A uniform 64-bit number that depends on `key` alone."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, key)).encode()).digest()[:8])


def is_right(task: str, answer: str, completion: str) -> bool:
    """Whether a completion is the answer and nothing else, but for case, a dash before it and a full stop after it.

    >>> is_right("code", "A01.02", " - a01.02.\\n"), is_right("code", "A01.02", "A01.0")
    (True, False)
    """
    given = " ".join(completion.split()).removeprefix("- ").removesuffix(".").strip()
    return given.lower() == answer.removesuffix(".").lower()
