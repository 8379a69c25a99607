"""Settings of the source `primer`."""

from __future__ import annotations

from dataclasses import dataclass, field

from trivium.data.config import SourceConfig, positive
from trivium.errors import ConfigError

DEFAULT_PARTS = ("books", "definitions", "tasks", "chats")
PARTS = (*DEFAULT_PARTS, "pairs")  # pairs say nothing that tasks do not, so a tokenizer needs none of them
TASKS = ("add", "subtract", "copy", "reverse", "count", "compare")


@dataclass(frozen=True)
class PrimerConfig(SourceConfig):
    """Which parts of the primer, and how much of each; `seed` changes what is made, never the split."""

    parts: list[str] = field(default_factory=lambda: list(DEFAULT_PARTS))  # in this order; more parts, more variety
    tasks: list[str] = field(default_factory=lambda: list(TASKS))  # more kinds leave each a smaller share of num_tasks
    num_tasks: int = 12_000  # over all kinds, evenly; more brings new problems until they repeat (about 8,000 sums)
    num_chats: int = 3_000  # more brings new combinations of facts and phrasings
    num_pairs: int = 6_000  # right and wrong answers, over the kinds of tasks; more brings new problems and mistakes
    pair_tasks: list[str] = field(default_factory=list)  # kinds of the pairs; empty takes those of `tasks`
    num_definitions: int = 4_000  # at most, the commonest words first; more brings rarer words, up to all there are

    def __post_init__(self) -> None:
        super().__post_init__()
        _some_of(self, "parts", PARTS)
        _some_of(self, "tasks", TASKS)
        if self.pair_tasks:
            _some_of(self, "pair_tasks", TASKS)
        positive(self, "num_tasks", "num_chats", "num_pairs", "num_definitions")


def _some_of(owner: PrimerConfig, name: str, allowed: tuple[str, ...]) -> None:
    """Refuse an empty list, a repeated value (its examples would share ids) and a value outside `allowed`."""
    values = list(getattr(owner, name))
    unknown = [v for v in values if v not in allowed]
    if unknown:
        raise ConfigError(f"{name}={values!r} has {unknown[0]!r}, which is not one of {', '.join(allowed)}")
    if not values or len(set(values)) < len(values):
        raise ConfigError(f"{name}={values!r} must name at least one of {', '.join(allowed)}, each once")
