"""Settings of the source `preferences`."""

from __future__ import annotations

from dataclasses import dataclass, field

from trivium_plugins.records import RecordsConfig

PARTS = ("words", "senses")


@dataclass(frozen=True)
class PreferencesConfig(RecordsConfig):
    """Which parts are read, and from where."""

    parts: list[str] = field(default_factory=lambda: ["words"])  # in this order, each once

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_parts(self.parts, PARTS)
