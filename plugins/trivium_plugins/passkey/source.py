"""The source `passkey`: after Mohtashami and Jaggi 2023 (https://arxiv.org/abs/2305.16300), with their filler."""

from __future__ import annotations

import hashlib
from typing import ClassVar

from trivium import DataError, Example, Score, Source, split_of
from trivium_plugins.passkey.config import PasskeyConfig

FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.".split()
HIDDEN = "The pass key is {0}. Remember it. {0} is the pass key."
QUESTION = "What is the pass key?"
DIGITS = 5


def draw(*key: object) -> int:
    """A uniform 64-bit number that depends on `key` alone."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, key)).encode()).digest()[:8])


class Passkey(Source):
    """The cells of the grid take turns; example i follows from (settings, split, i) alone."""

    phases: ClassVar[frozenset[str]] = frozenset({"tokenizer", "sft", "rlhf", "evaluate"})

    def __init__(self, config: PasskeyConfig) -> None:
        super().__init__(config)
        self.config: PasskeyConfig = config
        self.cells = [(length, depth) for length in config.lengths for depth in config.depths]

    def __len__(self) -> int:
        return self.config.num_examples

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"passkey has examples 0 to {len(self) - 1}, not {index}")
        length, depth = self.cells[index % len(self.cells)]
        seed = self.config.seed
        key = next(
            k
            for attempt in range(10_000)  # one in ten is of the test split
            if split_of((k := f"{draw(seed, index, attempt) % 10**DIGITS:0{DIGITS}}"), 0.1, 0.1) == self.config.split
        )
        hidden, question = HIDDEN.format(key).split(), QUESTION.split()
        filler = length - len(hidden) - len(question)
        before = draw(seed, index, "depth") % (filler + 1) if self.config.any_depth else round(depth * filler)
        start = draw(seed, index, "filler") % len(FILLER)  # so that the place cannot be told from the words alone
        words = [FILLER[(start + i) % len(FILLER)] for i in range(filler)]
        asked = " ".join([*words[:before], *hidden, *words[before:], *question])
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": key}]
        task = f"passkey/{length}" + ("" if self.config.any_depth else f"@{depth:g}")
        return {"id": f"{task}/{index}", "task": task, "messages": turns, "answer": key}

    def score(self, example: Example, completion: str) -> Score:
        """1.0 for the key and nothing else, but for a full stop."""
        if "answer" not in example:
            raise DataError(f"example {example.get('id')!r} has no answer to score against")
        correct = completion.strip().removesuffix(".") == example["answer"]
        return Score(float(correct), correct)
