"""A source: indexed examples with a content fingerprint.

Map-style, so that order can be a pure function of (seed, fingerprint, index) and any example can be asked for again.
An example is a plain dict in one of these forms, each with a unique string `id`:

    {"id", "text"}                                         pretraining, bits per byte
    {"id", "messages": [{"role", "content"}, ...]}         tuning; roles system, user, assistant
    {"id", "prompt", "completion"}                         tuning without a chat template
    {"id", "messages", "answer", "task"}                   verifiable: the last message is a right assistant turn
    {"id", "chosen", "rejected"}                           pairs: two lists of messages that begin alike, up to an
                                                           assistant turn, and each end in one
    {"id", "prompt", "chosen", "rejected"}                 pairs of text, without a chat template
    {"id", "messages", "label"}                            labelled: True if the last turn is desirable, False if not
    {"id", "prompt", "completion", "label"}                labelled text
    {"id", "prompt", "completions", "labels"}              the steps of a solution, each with a verdict

One with messages or with chosen and rejected may have `tools`, JSON schemas of the functions that its turns call: an
assistant turn has `tool_calls` then, and a turn of the role tool what came of them.

An example carries its own answer; `score` never looks anything up by the prompt's text.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from typing import Any, ClassVar

from trivium.data.config import SourceConfig
from trivium.errors import DataError
from trivium.types import Score


class WrongForm(DataError):
    """The data is sound and of another form than was asked for."""


Example = Mapping[str, Any]
Messages = Sequence[Mapping[str, Any]]
FORM_WORDS = {
    "text": "text",
    "chat": "messages, or prompt and completion",
    "answers": "messages with an answer to score against",
    "pairs": "chosen and rejected",
    "labels": "a completion with a label",
    "steps": "a prompt, completions and a label for each",
}
"""The forms of examples, and what each holds."""
READS = {
    "pretrain": ("text",),
    "sft": ("chat", "answers"),
    "preference": ("pairs", "labels"),
    "reward": ("pairs",),
    "rlhf": ("answers",),
    "distill": ("chat", "answers", "text"),
}
"""The forms that each training phase can use; tokenizer and evaluate take any."""


def form_of(example: Example) -> str:
    """Which of the FORM_WORDS an example is: the most specific, so that a bad answer is never one to imitate."""
    marks = {"chosen": "pairs", "label": "labels", "labels": "steps", "answer": "answers", "text": "text"}
    return next((form for key, form in marks.items() if key in example), "chat")


def prompt_of(example: Example) -> str | Messages:
    """What the answers of a pair, or a labelled answer, follow: text, or messages.

    >>> ask, yes, no = ({"role": r, "content": c} for r, c in (("user", "4?"), ("assistant", "4"), ("assistant", "5")))
    >>> prompt_of({"id": "1", "chosen": [ask, yes], "rejected": [ask, no]}) == [ask]
    True
    """
    if "prompt" in example:
        return example["prompt"]
    if "chosen" not in example:
        return example["messages"][:-1]
    both = zip(example["chosen"], example["rejected"], strict=False)
    return [chosen for chosen, _ in takewhile(lambda turns: turns[0] == turns[1], both)]


class Source(ABC):
    """Subclass with `phases`, `__len__`, `__getitem__` and, where examples have answers, `score`.

    Built as `cls(config)`; building may read files but must not tokenise. Raises DataError on bad files.
    """

    phases: ClassVar[frozenset[str]] = frozenset()
    """The phases it can feed, such as {"tokenizer", "pretrain", "sft", "evaluate"}."""

    def __init__(self, config: SourceConfig) -> None:
        self.config = config

    @abstractmethod
    def __len__(self) -> int:
        """Number of examples."""

    @abstractmethod
    def __getitem__(self, index: int) -> Example:
        """Example `index`, the same at every call."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the content: equal if and only if every example is. Computed once."""
        if not hasattr(self, "_fingerprint"):
            self._fingerprint = fingerprint_of(self[i] for i in range(len(self)))
        return self._fingerprint

    @property
    def notes(self) -> Mapping[str, Any]:
        """What the run's manifest should say of how it was read, such as rows that were skipped, by reason."""
        return {}

    def expect(self, phase: str) -> None:
        """Refuse the first example of a form that `phase` cannot use. Raises DataError naming it."""
        if phase in READS and form_of(example := self[0]) not in READS[phase]:
            found = ", ".join(k for k in example if k != "id")
            words = ", or ".join(FORM_WORDS[form] for form in READS[phase])
            raise DataError(f"example {example['id']} has {found}; phase={phase} needs {words}")

    def origin(self, example: Example) -> str:
        """Under which name `train/loss/NAME` counts an example, such as a task's or a book's; "" is under none."""
        return str(example.get("source") or example.get("task") or "")

    def score(self, example: Example, completion: str) -> Score:
        """Judge a completion of a verifiable example."""
        raise DataError(f"{type(self).__name__} has no score(): its examples have no verifiable answer")


def fingerprint_of(examples: Iterable[Example]) -> str:
    """SHA-256 over the canonical JSON of `examples`, in order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps(example, sort_keys=True, ensure_ascii=False).encode())
        digest.update(b"\n")
    return digest.hexdigest()


def split_of(content: str, validation: float, test: float) -> str:
    """The split of a piece of content, decided by its hash alone: a duplicate can never be on both sides.

    validation, test: the shares held out (0 to 1).

    >>> [split_of(w, 0.1, 0.1) for w in ("stone", "river", "cloud", "house")]
    ['train', 'train', 'train', 'train']
    """
    share = int.from_bytes(hashlib.sha256(content.encode()).digest()[:8]) / 2**64
    return "test" if share < test else "validation" if share < test + validation else "train"
