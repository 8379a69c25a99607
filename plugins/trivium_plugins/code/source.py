"""The source `code`: parts of the config one after the other."""

from __future__ import annotations

import hashlib
import json
import re
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, ClassVar

from trivium import ConfigError, DataError, Example, Score, Source, fingerprint_of
from trivium_plugins.code import human_eval, library
from trivium_plugins.code.config import JUDGED, CodeConfig
from trivium_plugins.code.exercises import Exercises
from trivium_plugins.code.sandbox import Limits, passes, walls

VERSION = 1
"""Of what the code makes out of its files; raise it when that changes."""
SAMPLED = 200
"""Exercises that enter the fingerprint, beside all settings."""
FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.S)


class Code(Source):
    """Modules and functions of the standard library, exercises, HumanEval."""

    phases: ClassVar[frozenset[str]] = frozenset({"tokenizer", "pretrain", "sft", "rlhf", "evaluate"})

    def __init__(self, config: CodeConfig) -> None:
        super().__init__(config)
        self.config: CodeConfig = config
        self._parts: list[Sequence[Any] | Exercises] = [self._part(name) for name in config.parts]
        self._ends = list(accumulate(map(len, self._parts)))
        self._limits = Limits(config.seconds, config.memory_mb << 20)
        if config.run_code:
            held = walls(self._limits)
            missing = [name for name in ("files", "network") if name not in held]
            kept = f"; the kernel does NOT keep them from {' and '.join(missing)}" if missing else ""
            print(f"answers are run as Python, each in a process with limits{kept}")

    def _part(self, name: str) -> Sequence[Any] | Exercises:
        split = self.config.split
        if name == "exercises":
            return Exercises(split, self.config.seed, self.config.num_exercises)
        if name == "human_eval":
            return human_eval.problems(self.config.sample)
        return library.documents(split) if name == "modules" else library.functions(split)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"code has examples 0 to {len(self) - 1}, not {index}")
        which = bisect_right(self._ends, index)
        return self._parts[which][index - self._ends[which] + len(self._parts[which])]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of every text, and of a sample of exercises with their settings."""
        if not hasattr(self, "_fingerprint"):
            made_of: list[Any] = [VERSION, self.config.split]
            for name, part in zip(self.config.parts, self._parts, strict=True):
                made = name == "exercises"
                read = range(min(SAMPLED, len(part)) if made else len(part))
                settings = [self.config.seed, len(part)] if made else []
                made_of.append([name, *settings, fingerprint_of(part[i] for i in read)])
            self._fingerprint = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()
        return self._fingerprint

    def origin(self, example: Example) -> str:
        """Its part."""
        return example["id"].partition("/")[0]

    def expect(self, phase: str) -> None:
        """Before anything is generated: answers that nobody may run cannot be judged."""
        judged = [name for name in self.config.parts if name in JUDGED]
        if phase in ("evaluate", "rlhf") and judged and not self.config.run_code:
            aside = [name for name in self.config.parts if name not in JUDGED]
            instead = f", or data.parts=[{','.join(aside)}] to do without" if aside and phase == "evaluate" else ""
            raise ConfigError(
                f"phase={phase} judges {' and '.join(judged)} by running what the model writes, which is off; set "
                f"data.run_code=true if this machine may run it{instead}"
            )
        super().expect(phase)

    def score(self, example: Example, completion: str) -> Score:
        """1.0 if the example's tests pass, in a process of their own; 0.0 for anything else."""
        if "tests" not in example:
            raise DataError(f"example {example.get('id')!r} has no tests; only exercises and human_eval can be judged")
        if not self.config.run_code:
            raise DataError("judging an answer runs what a model wrote; set data.run_code=true if this machine may")
        program = program_of(example["before"], example["function"], completion)
        correct = bool(program.strip()) and passes(program, example["tests"], self._limits)
        return Score(float(correct), correct)


def program_of(before: str, function: str, completion: str) -> str:
    """The program that a completion makes: its first block of Markdown or all of it, which is the whole function (then
    what stands before that, such as imports, is put before it) or its body.

    >>> program_of("import re\\ndef f(x):\\n", "f", "Here:\\n```python\\ndef f(x):\\n    return 1\\n```\\nDone.")
    'import re\\ndef f(x):\\n    return 1\\n'
    >>> program_of("def f(x):\\n", "f", "    return 1\\n")
    'def f(x):\\n    return 1\\n'
    """
    found = FENCE.search(completion)
    code = found[1] if found else completion
    if not code.strip():
        return ""
    head = re.search(rf"^def {re.escape(function)}\b", before, re.M)
    if re.search(rf"^def {re.escape(function)}\b", code, re.M):
        return before[: head.start() if head else 0] + code
    return before + code
