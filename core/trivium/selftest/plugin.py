"""Names that only the self-test's own processes know: an objective that plants bad numbers."""

from __future__ import annotations

from dataclasses import dataclass

from trivium.errors import ConfigError
from trivium.objectives.config import NextTokenConfig
from trivium.plugin import Plugin
from trivium.registry import Entry

PLACES = ("loss", "gradient", "micro_batch")


@dataclass(frozen=True)
class PoisonedConfig(NextTokenConfig):
    """What is planted, where, and in which steps: those whose first tokens hash to `salt` modulo `share`."""

    value: str = "nan"
    place: str = "loss"  # loss (of all micro-batches) | micro_batch (of one) | gradient (one element of one weight's)
    share: int = 12
    salt: int = 0

    def __post_init__(self) -> None:
        if self.place not in PLACES:
            raise ConfigError(f"objective.place={self.place!r} is not one of {', '.join(PLACES)}")


PLUGIN = Plugin(
    name="faults",
    help="bad numbers, for the self-test",
    objectives={
        "poisoned": Entry(
            "trivium.selftest.poisoned:Poisoned", "trivium.selftest.plugin:PoisonedConfig", "plants bad numbers"
        )
    },
)
