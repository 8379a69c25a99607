"""The source `primer`: bundled books, definitions, made problems, chats and pairs, one after the other."""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from itertools import accumulate
from typing import Any, ClassVar, Protocol

from trivium.data.source import Example, Source, fingerprint_of
from trivium.errors import DataError
from trivium.types import Score
from trivium_plugins.primer.chats import Chats
from trivium_plugins.primer.config import PrimerConfig
from trivium_plugins.primer.pairs import Pairs
from trivium_plugins.primer.tasks import Tasks, is_right
from trivium_plugins.primer.texts import Books, Definitions

VERSION = 1
"""Of what the code makes out of a config; raise it when a template, a list or a draw changes."""

SAMPLED = 16
"""Examples of each part that enter the fingerprint, in case VERSION is forgotten."""


class Part(Protocol):
    """One part of the primer: indexed examples, and what their content follows from."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...

    def identity(self) -> list[Any]:
        """Every setting and digest that the content depends on, but for the split."""
        ...


PARTS: dict[str, type[Part]] = {
    "books": Books, "definitions": Definitions, "tasks": Tasks, "chats": Chats, "pairs": Pairs,
}  # fmt: skip


class Primer(Source):
    """The parts of the config, in its order; every example is made when asked for and is the same at every call."""

    phases: ClassVar[frozenset[str]] = frozenset(
        {"tokenizer", "pretrain", "sft", "preference", "reward", "rlhf", "distill", "evaluate"}
    )

    def __init__(self, config: PrimerConfig) -> None:
        super().__init__(config)
        self.parts: list[tuple[str, Part]] = [(name, PARTS[name](config)) for name in config.parts]
        self._ends = list(accumulate(len(part) for _, part in self.parts))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"primer has examples 0 to {len(self) - 1}, not {index}")
        which = bisect_right(self._ends, index)
        part = self.parts[which][1]
        return part[index - self._ends[which] + len(part)]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what the content follows from: bundled texts, the settings that matter to the parts, VERSION.

        Making every example only to hash it would take seconds. A setting that changes no example changes nothing
        here: the seed of books alone, or a cap on definitions beyond those there are.
        """
        if not hasattr(self, "_fingerprint"):
            content = [VERSION, self.config.split]
            for name, part in self.parts:
                sample = fingerprint_of(part[i] for i in range(min(SAMPLED, len(part))))
                content.append([name, part.identity(), sample])
            self._fingerprint = hashlib.sha256(json.dumps(content).encode()).hexdigest()
        return self._fingerprint

    def origin(self, example: Example) -> str:
        """Its task, else its part."""
        return example.get("task") or example["id"].partition("/")[0]

    def score(self, example: Example, completion: str) -> Score:
        """1.0 for the example's answer and nothing else, 0.0 for anything else; see `tasks.is_right`."""
        answer = example.get("answer")
        if not isinstance(answer, str) or not answer:
            raise DataError(f"example {example.get('id')!r} has no answer to score against; only tasks have one")
        correct = is_right(example.get("task", ""), answer, completion)
        return Score(float(correct), correct)
