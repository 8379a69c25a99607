"""Settings of the source `code`."""

from __future__ import annotations

from dataclasses import dataclass, field

from trivium import ConfigError, SourceConfig
from trivium.data.config import positive

PARTS = ("modules", "functions", "exercises", "human_eval")
JUDGED = ("exercises", "human_eval")
"""Parts whose answers are judged by running them."""


@dataclass(frozen=True)
class CodeConfig(SourceConfig):
    """Which parts, and whether answers may be run."""

    parts: list[str] = field(default_factory=lambda: ["modules", "functions"])  # in this order
    num_exercises: int = 6_000  # more brings new exercises until they repeat (there are 4,536)
    run_code: bool = False  # run what a model wrote, in a process with limits, to score it; see the pack's README
    seconds: float = 5.0  # of processor time that an answer may take; more is kinder to slow answers
    memory_mb: int = 512  # of address space that an answer may take
    sample: bool = False  # of HumanEval the eight problems that ship with the framework, instead of all: no network

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "num_exercises", "seconds", "memory_mb")
        unknown = [p for p in self.parts if p not in PARTS]
        if unknown or not self.parts or len(set(self.parts)) < len(self.parts):
            raise ConfigError(f"data.parts={list(self.parts)} must name at least one of {', '.join(PARTS)}, each once")
        if "human_eval" in self.parts and self.split != "test":
            raise ConfigError(
                f"data.parts has human_eval and data.split={self.split}; it is for measuring only, so set "
                "data.split=test or leave it out"
            )
