"""Settings of the source `summarise`."""

from __future__ import annotations

from dataclasses import dataclass, field

from trivium import ConfigError, SourceConfig
from trivium.data.config import one_of, positive

PARTS = ("functions", "topics", "manual")
MEASURES = ("rougeL", "chrF")


@dataclass(frozen=True)
class SummariseConfig(SourceConfig):
    """Which parts, how long a text may be, and what a summary is worth."""

    parts: list[str] = field(default_factory=lambda: ["functions", "topics"])  # manual is fetched (12.6 MB)
    max_words: int = 120  # of a section: the rest of it is not shown
    max_characters: int = 700  # of a function; longer ones are left out
    sample: bool = False  # the five pages of the manual that ship with the framework, instead of all: no network
    measure: str = "rougeL"  # rougeL | chrF: what a summary is worth, against the one that is there

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, "measure", MEASURES)
        positive(self, "max_words", "max_characters")
        unknown = [p for p in self.parts if p not in PARTS]
        if unknown or not self.parts or len(set(self.parts)) < len(self.parts):
            raise ConfigError(f"data.parts={list(self.parts)} must name at least one of {', '.join(PARTS)}, each once")
