"""Settings of the source `legal`."""

from __future__ import annotations

from dataclasses import dataclass, field

from trivium import ConfigError, SourceConfig
from trivium.data.config import positive

PARTS = ("texts", "categories", "clauses")


@dataclass(frozen=True)
class LegalConfig(SourceConfig):
    """Which parts of the licences, and how long the excerpts are that questions show."""

    parts: list[str] = field(default_factory=lambda: list(PARTS))  # in this order; more parts, more variety
    excerpt: int = 600  # characters of a text that a question shows; more says more and costs tokens
    sample: bool = False  # the few licences that ship with the framework, instead of all of them: no network

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "excerpt")
        if not self.parts or len(set(self.parts)) < len(self.parts) or set(self.parts) - set(PARTS):
            raise ConfigError(f"data.parts={list(self.parts)} must name at least one of {', '.join(PARTS)}, each once")
