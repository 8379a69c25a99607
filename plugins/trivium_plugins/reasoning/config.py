"""Settings of the source `reasoning`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from trivium import ConfigError, SourceConfig
from trivium.data.config import positive

DEFAULT_TASKS = ("chain_sum", "basic_arithmetic", "number_sequence", "gcd", "letter_counting", "spell_backward")
SETTING = re.compile(r"(\w+)\.(\w+)=(\S.*)")


@dataclass(frozen=True)
class ReasoningConfig(SourceConfig):
    """Which kinds of problem, how hard and how many; `seed` changes what is made, never the split."""

    tasks: list[str] = field(default_factory=lambda: list(DEFAULT_TASKS))  # any names of reasoning-gym, taking turns
    settings: list[str] = field(default_factory=list)  # the package's own, as in [chain_sum.max_terms=3]: how hard
    num_examples: int = 12_000  # over all tasks, evenly; more brings new problems until they repeat
    worked: bool = False  # the worked solution where a task has one (gsm_symbolic), the answer after ####
    partial_credit: bool = False  # scores between 0 and 1 as the package gives them; else they are 0

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "num_examples")
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise ConfigError(f"data.tasks={list(self.tasks)} must name at least one task of reasoning-gym, each once")
        for setting in self.settings:
            found = SETTING.fullmatch(setting)
            if not found or found[1] not in self.tasks:
                raise ConfigError(
                    f"data.settings has {setting!r}, which is not TASK.NAME=VALUE of one of {', '.join(self.tasks)}"
                )
