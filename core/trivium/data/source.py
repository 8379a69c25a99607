"""A source: indexed examples with a content fingerprint.

Map-style, so that order can be a pure function of (seed, fingerprint, index) and any example can be asked for again.
An example is a plain dict in one of these forms, each with a unique string `id`:

    {"id", "text"}                                         pretraining, bits per byte
    {"id", "messages": [{"role", "content"}, ...]}         tuning; roles system, user, assistant
    {"id", "prompt", "completion"}                         tuning without a chat template
    {"id", "messages", "answer", "task"}                   verifiable: the last message is a right assistant turn

An example carries its own answer; `score` never looks anything up by the prompt's text.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from trivium.data.config import SourceConfig
from trivium.errors import DataError
from trivium.types import Score

Example = Mapping[str, Any]
FORMS = {
    "pretrain": (("text",), "text"),
    "sft": (("messages", "prompt"), "messages or prompt and completion"),
}
"""What each training phase reads: an example has one of these keys, said in these words."""


class Source(ABC):
    """Subclass with `phases`, `__len__`, `__getitem__` and, where examples have answers, `score`.

    Built as `cls(config)`; building may read files but must not tokenise. Raises DataError on bad files.
    """

    phases: ClassVar[frozenset[str]] = frozenset()
    """The phases it can feed, such as {"tokenizer", "pretrain", "sft", "evaluate"}."""

    def __init__(self, config: SourceConfig) -> None:
        self.config = config

    @abstractmethod
    def __len__(self) -> int:
        """Number of examples."""

    @abstractmethod
    def __getitem__(self, index: int) -> Example:
        """Example `index`, the same at every call."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the content: equal if and only if every example is. Computed once."""
        if not hasattr(self, "_fingerprint"):
            self._fingerprint = fingerprint_of(self[i] for i in range(len(self)))
        return self._fingerprint

    def expect(self, phase: str) -> None:
        """Refuse the first example of a form that `phase` cannot use. Raises DataError naming it."""
        keys, words = FORMS.get(phase, ((), ""))
        example = self[0] if keys else {}
        if keys and not any(key in example for key in keys):
            found = ", ".join(k for k in example if k != "id")
            raise DataError(f"example {example['id']} has {found}; phase={phase} needs {words}")

    def score(self, example: Example, completion: str) -> Score:
        """Judge a completion of a verifiable example."""
        raise DataError(f"{type(self).__name__} has no score(): its examples have no verifiable answer")


def fingerprint_of(examples: Iterable[Example]) -> str:
    """SHA-256 over the canonical JSON of `examples`, in order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps(example, sort_keys=True, ensure_ascii=False).encode())
        digest.update(b"\n")
    return digest.hexdigest()


def split_of(content: str, validation: float, test: float) -> str:
    """The split of a piece of content, decided by its hash alone: a duplicate can never be on both sides.

    validation, test: the shares held out (0 to 1).

    >>> [split_of(w, 0.1, 0.1) for w in ("stone", "river", "cloud", "house")]
    ['train', 'train', 'train', 'train']
    """
    share = int.from_bytes(hashlib.sha256(content.encode()).digest()[:8]) / 2**64
    return "test" if share < test else "validation" if share < test + validation else "train"
