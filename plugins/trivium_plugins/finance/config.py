"""Settings of the source `finance`."""

from __future__ import annotations

from dataclasses import dataclass, field

from trivium import ConfigError, SourceConfig

PARTS = ("economies", "figures")


@dataclass(frozen=True)
class FinanceConfig(SourceConfig):
    """Which parts, and whether a question shows the figures it asks about."""

    parts: list[str] = field(default_factory=lambda: list(PARTS))  # in this order; more parts, more variety
    shown: int = 3  # lines of the country's figures that a question shows, the right one among them; 0: must be known
    sample: bool = False  # the few countries that ship with the framework, instead of all: no network

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.parts or len(set(self.parts)) < len(self.parts) or set(self.parts) - set(PARTS):
            raise ConfigError(f"data.parts={list(self.parts)} must name at least one of {', '.join(PARTS)}, each once")
        if not 0 <= self.shown <= 10:
            raise ConfigError(f"data.shown={self.shown} must be between 0 and 10")
