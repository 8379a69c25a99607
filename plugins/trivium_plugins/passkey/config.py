"""Settings of the source `passkey`."""

from __future__ import annotations

from dataclasses import dataclass, field

from trivium import ConfigError, SourceConfig
from trivium.data.config import positive

SHORTEST = 20
"""Words of a text: what is not filler has seventeen."""


@dataclass(frozen=True)
class PasskeyConfig(SourceConfig):
    """The grid of lengths and depths, and how much of it; the key decides the split."""

    lengths: list[int] = field(default_factory=lambda: [64, 128, 256])  # words of a text; tokens are some more
    depths: list[float] = field(default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 1.0])  # where it is hidden; 0 is first
    num_examples: int = 6_000  # over all cells of the grid, evenly
    any_depth: bool = False  # hide it anywhere, for training: a model that is shown five places learns five places

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "num_examples")
        if not self.lengths or min(self.lengths) < SHORTEST or len(set(self.lengths)) < len(self.lengths):
            raise ConfigError(f"data.lengths={list(self.lengths)} must be different numbers of {SHORTEST} or more")
        if not self.depths or not all(0 <= d <= 1 for d in self.depths) or len(set(self.depths)) < len(self.depths):
            raise ConfigError(f"data.depths={list(self.depths)} must be different shares from 0 (first) to 1 (last)")
