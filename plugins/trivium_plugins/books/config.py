"""Settings of the source `books`."""

from __future__ import annotations

from dataclasses import dataclass, field

from trivium_plugins.records import RecordsConfig

PARTS = ("holmes", "history", "war_and_peace", "austen")


@dataclass(frozen=True)
class BooksConfig(RecordsConfig):
    """Which parts are read, and from where."""

    parts: list[str] = field(default_factory=lambda: ["holmes", "history", "war_and_peace"])  # in this order, each once

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_parts(self.parts, PARTS)
