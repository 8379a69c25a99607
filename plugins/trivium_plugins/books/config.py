"""Settings of the source `books`."""

from __future__ import annotations

from dataclasses import dataclass, field

from trivium import ConfigError
from trivium.data.config import SourceConfig

PARTS = ("holmes", "history", "war_and_peace", "austen")


@dataclass(frozen=True)
class BooksConfig(SourceConfig):
    """Which parts are read, and from where."""

    parts: list[str] = field(default_factory=lambda: ["holmes", "history", "war_and_peace"])  # in this order, each once
    sample: bool = False  # read the few records that come with the package: nothing is fetched, little is learnt

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.parts or len(set(self.parts)) < len(self.parts) or not set(self.parts) <= set(PARTS):
            raise ConfigError(f"data.parts={list(self.parts)!r} must name some of {', '.join(PARTS)}, each once")
