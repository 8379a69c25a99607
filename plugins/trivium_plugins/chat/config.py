"""Settings of the source `chat`."""

from __future__ import annotations

from dataclasses import dataclass, field

from trivium_plugins.records import RecordsConfig

PARTS = ("conversations", "replies")


@dataclass(frozen=True)
class ChatConfig(RecordsConfig):
    """Which parts are read, and from where."""

    parts: list[str] = field(default_factory=lambda: ["conversations"])  # in this order, each once

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_parts(self.parts, PARTS)
