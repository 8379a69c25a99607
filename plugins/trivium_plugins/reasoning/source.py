"""The source `reasoning`: problems of several tasks taking turns, each made when asked for."""

from __future__ import annotations

import hashlib
import json
from typing import Any, ClassVar

from trivium import DataError, Example, Score, Source, fingerprint_of, split_of
from trivium_plugins.reasoning.config import ReasoningConfig
from trivium_plugins.reasoning.gym import Gym, settings_of, version

VERSION = 1
"""Of what the code makes out of a problem; raise it when that changes."""
SAMPLED = 60
"""Examples that enter the fingerprint beside all settings and the version of the package."""
MARK = "####"
"""Stands before the answer of a worked solution, as in GSM8K."""


class Reasoning(Source):
    """Example i is a problem of task i mod n; which one follows from (settings, split, i) alone."""

    phases: ClassVar[frozenset[str]] = frozenset({"tokenizer", "sft", "rlhf", "evaluate"})

    def __init__(self, config: ReasoningConfig) -> None:
        super().__init__(config)
        self.config: ReasoningConfig = config
        seed = config.seed % 2**31
        self._gyms = {task: Gym(task, settings_of(task, config.settings), seed) for task in config.tasks}
        for task in range(len(config.tasks)):  # a task without answers is refused now, not in the middle of a run
            self[task]

    def __len__(self) -> int:
        return self.config.num_examples

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < max(len(self), len(self.config.tasks)):
            raise IndexError(f"reasoning has examples 0 to {len(self) - 1}, not {index}")
        turn, which = divmod(index, len(self.config.tasks))
        task = self.config.tasks[which]
        number, problem = self._drawn(task, turn)
        asked, answer = problem["question"].strip(), problem["answer"].strip()
        said = answer
        if self.config.worked and (steps := problem["metadata"].get("answer_cot")):
            said = f"{steps.rpartition(MARK)[0].strip() or steps.strip()}\n{MARK} {answer}"
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
        return {"id": f"reasoning/{task}/{turn}", "task": task, "messages": turns, "answer": answer, "problem": number}

    def _drawn(self, task: str, turn: int) -> tuple[int, dict[str, Any]]:
        """The first problem drawn for this turn whose text belongs to the split."""
        gym = self._gyms[task]
        for attempt in range(1000):
            drawn = hashlib.sha256(f"{self.config.seed}/{task}/{turn}/{attempt}".encode()).digest()
            number = int.from_bytes(drawn[:8]) % gym.num_problems
            problem = gym.problem(number)
            if split_of(f"{task}/{problem['question']}", 0.1, 0.1) == self.config.split:
                return number, problem
        raise DataError(
            f"{task} of reasoning-gym makes too few different problems for a split {self.config.split}; make it "
            f"harder with data.settings=[{task}.NAME=VALUE] or take it out of data.tasks"
        )

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all settings, the package's version, and a sample."""
        if not hasattr(self, "_fingerprint"):
            c = self.config
            made_of = [VERSION, version(), c.split, c.seed, c.tasks, c.settings, c.num_examples, c.worked]
            made_of.append(fingerprint_of(self[i] for i in range(min(SAMPLED, len(self)))))
            self._fingerprint = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()
        return self._fingerprint

    def score(self, example: Example, completion: str) -> Score:
        """What the task's verifier makes of the answer; a value below 1 is 0 without `data.partial_credit`."""
        gym = self._gyms.get(example.get("task", ""))
        number = example.get("problem")
        if gym is None or not isinstance(number, int) or gym.problem(number)["answer"].strip() != example["answer"]:
            raise DataError(f"example {example.get('id')!r} is no problem of this source: its settings made another")
        value = gym.value(number, answer_of(completion, example["answer"]))
        correct = value >= 1
        return Score(value if self.config.partial_credit else float(correct), correct)


def answer_of(completion: str, right: str) -> str:
    """What is judged of a completion: what follows its last ####, if there is one, without a full stop at the end.

    >>> answer_of("2 x 3 = 6\\n#### 6", "6"), answer_of(" -7. ", "7"), answer_of("He left.", "She left.")
    ('6', '-7', 'He left.')
    """
    given = completion.rpartition(MARK)[2].strip()
    return given if right.endswith(".") else given.removesuffix(".").strip()
