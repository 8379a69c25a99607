"""Packs whose data is a list of records, out of a package or out of the few that come with the pack."""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from trivium import ConfigError, DataError, Example, Source, SourceConfig, split_of

LONGER = 1.2  # times the words of its opposite that what is said may have


@dataclass(frozen=True)
class RecordsConfig(SourceConfig):
    """What packs of records can be told; a pack adds `parts`, with its own for a default."""

    sample: bool = False  # read the few records that come with the package: nothing is fetched, little is learnt

    def check_parts(self, parts: Sequence[str], known: Sequence[str]) -> None:
        """Refuse an empty list, a part that is named twice, and one that there is not."""
        if not parts or len(set(parts)) < len(parts) or not set(parts) <= set(known):
            raise ConfigError(f"data.parts={list(parts)!r} must name some of {', '.join(known)}, each once")


def crossed(records: Iterable[dict[str, Any]], said: Callable[[dict[str, Any]], str]) -> Iterator[dict[str, Any]]:
    """Records two by two, what each says being the `wrong` one for the other; what is left over is left out.

    Both say about as much: records are sorted by the words they say, those of one length by a hash, and neighbours are
    two of a pair. And each text is once right and once wrong, so that whoever does not read what was asked gets exactly
    half of them.
    """

    def place(record: dict[str, Any]) -> tuple[int, str]:
        return len(said(record).split()), hashlib.sha256(record["id"].encode()).hexdigest()

    told = sorted(records, key=place)
    for one, other in zip(told[::2], told[1::2], strict=False):
        if said(one).lower() != said(other).lower() and place(other)[0] <= LONGER * place(one)[0]:
            yield {**one, "wrong": said(other)}
            yield {**other, "wrong": said(one)}


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
