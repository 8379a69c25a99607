"""Settings of the source `translate`."""

from __future__ import annotations

from dataclasses import dataclass

from trivium import ConfigError, SourceConfig
from trivium.data.config import one_of, positive

LANGUAGES = {"de": "German", "fr": "French"}
MEASURES = ("chrF", "rougeL")


@dataclass(frozen=True)
class TranslateConfig(SourceConfig):
    """Into which language, and how long a paragraph may be."""

    language: str = "de"  # de | fr
    max_words: int = 40  # of the English paragraph; more brings longer ones, which small models cannot do
    min_words: int = 4  # of the English paragraph; fewer brings headings
    sample: bool = False  # the few sentences that ship with the framework, instead of all pages: no network
    measure: str = "chrF"  # chrF | rougeL: what a translation is worth, against the one that is there

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, "language", tuple(LANGUAGES))
        one_of(self, "measure", MEASURES)
        positive(self, "max_words", "min_words")
        if self.min_words > self.max_words:
            raise ConfigError(f"data.min_words={self.min_words} is more than data.max_words={self.max_words}")
