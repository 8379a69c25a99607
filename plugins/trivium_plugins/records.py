"""Packs whose data is a list of records, out of a package or out of the few that come with the pack."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from trivium import ConfigError, DataError, Example, Source, SourceConfig, split_of


@dataclass(frozen=True)
class RecordsConfig(SourceConfig):
    """What packs of records can be told; a pack adds `parts`, with its own for a default."""

    sample: bool = False  # read the few records that come with the package: nothing is fetched, little is learnt

    def check_parts(self, parts: Sequence[str], known: Sequence[str]) -> None:
        """Refuse an empty list, a part that is named twice, and one that there is not."""
        if not parts or len(set(parts)) < len(parts) or not set(parts) <= set(known):
            raise ConfigError(f"data.parts={list(parts)!r} must name some of {', '.join(known)}, each once")


class Records(Source):
    """The parts of the config, in its order; a tenth of the records is held out for tests, a twentieth to validate."""

    sample: ClassVar[Path]
    """The records that come with the pack, as JSON lines."""
    config: Any

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        found = ((part, record) for part in config.parts for record in self.records(part))
        self.examples = [example for part, record in found for example in self.made_of(part, record)]
        if not self.examples:
            raise DataError(
                f"data.parts={list(config.parts)} has nothing in data.split={config.split} of "
                f"{'the sample; set data.sample=false' if config.sample else 'what was fetched'}"
            )

    @abstractmethod
    def read(self, part: str) -> Iterator[dict[str, Any]]:
        """The records of one part, out of its package."""

    @abstractmethod
    def made_of(self, part: str, record: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """What one record is for training."""

    @abstractmethod
    def content(self, record: dict[str, Any]) -> str:
        """What decides the split."""

    def records(self, part: str) -> Iterator[dict[str, Any]]:
        """Those of the split."""
        lines = self.sample.read_text("utf-8").split("\n") if self.config.sample else []
        told = map(json.loads, filter(None, lines)) if self.config.sample else self.read(part)
        return (record for record in told if split_of(self.content(record), 0.05, 0.1) == self.config.split)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]
