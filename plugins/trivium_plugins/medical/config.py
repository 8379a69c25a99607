"""Settings of the source `medical`."""

from __future__ import annotations

from dataclasses import dataclass, field

from trivium import ConfigError, SourceConfig
from trivium.data.config import positive

PARTS = ("surgery", "definitions", "codes")


@dataclass(frozen=True)
class MedicalConfig(SourceConfig):
    """Which parts, and how codes are asked for; `seed` changes what is asked, never the split."""

    parts: list[str] = field(default_factory=lambda: list(PARTS))  # in this order; more parts, more variety
    num_codes: int = 12_000  # questions at most, drawn among the codes of the split; more brings rarer diseases
    options: int = 4  # answers to choose from, 2 to 8; more is harder; 0 shows none: the code must be known
    sample: bool = False  # the few codes and pages that ship with the framework, instead of all: no network

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "num_codes")
        if not self.parts or len(set(self.parts)) < len(self.parts) or set(self.parts) - set(PARTS):
            raise ConfigError(f"data.parts={list(self.parts)} must name at least one of {', '.join(PARTS)}, each once")
        if self.options != 0 and not 2 <= self.options <= 8:
            raise ConfigError(f"data.options={self.options} must be 0 or between 2 and 8")
        if self.sample and "definitions" in self.parts:
            raise ConfigError(
                "data.sample=true has no definitions, which may be fetched but not shipped; "
                "set data.parts=[surgery,codes] or fewer"
            )
