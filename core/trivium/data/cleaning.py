"""A source, cleaned: the steps of `data.clean` around any source, in their order.

One pass finds which examples stay and counts what was done; both are kept in the cache, under the hash of all that they
follow from. Texts are changed when an example is asked for, so memory holds indices and hashes only. Cleaning knows one
split: an example never changes sides, and what two splits share is told by the check for contamination.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping
from functools import cache, cached_property
from importlib.metadata import version
from typing import Any

import numpy as np

from trivium.data.clean_text import Change, change_of, optional
from trivium.data.config import CleaningConfig
from trivium.data.duplicates import Exact, Near
from trivium.data.quality import broken_rules
from trivium.data.source import Example, Source, form_of, prompt_of
from trivium.disk import cache_folder, keep, kept
from trivium.errors import DataError
from trivium.schema import CHANGING
from trivium.types import Score

VERSION = 1
"""Of what the steps make of an example; raise it when one of them changes."""
TEXTS = ("text", "prompt", "completion", "chosen", "rejected", "answer")
"""Where an example holds text, beside messages. An answer is cleaned like the turn that gives it: it must still fit."""
READ_BY = {
    "unicode": ("mojibake",),
    "length": ("min_chars", "max_chars"),
    "language": ("languages", "language_min_chars", "language_confidence"),
    "quality": ("min_words", "max_words", "stop_words", "repetition"),
    "near": ("near_threshold", "near_words"),
}
"""The settings that each step reads: what is not read changes no fingerprint."""
Filter = Callable[[int, Example], tuple[bool, list[str]]]
"""Example and its index -> whether it stays, and under which names it counts besides."""


class Cleaned(Source):
    """What is left of a source, with its texts changed: the same at every call and in any order of asking."""

    def __init__(self, source: Source) -> None:
        """Refuses a step whose package is missing; the pass over the source waits until it is needed."""
        super().__init__(source.config)
        self.source, self.phases = source, source.phases  # type: ignore[misc]
        self.steps, self.settings = list(source.config.clean), source.config.cleaning
        self._changes = {name: change_of(name, self.settings) for name in self.steps if name in CHANGING}
        self._filters()

    def __len__(self) -> int:
        return len(self._found[0])

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"there are examples 0 to {len(self) - 1}, not {index}")
        return self._changed(int(self._found[0][index]), len(self.steps))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of what the content follows from: the source, the steps, the settings they read, their packages."""
        read = [[name, *(getattr(self.settings, key) for key in READ_BY.get(name, ()))] for name in self.steps]
        packages = {"unicode": "ftfy" if self.settings.mojibake else "", "language": "py3langid", "near": "rensa"}
        used = [f"{p} {version(p)}" for name in self.steps if (p := packages.get(name))]
        return hashlib.sha256(json.dumps([VERSION, self.source.fingerprint, read, used]).encode()).hexdigest()

    @property
    def notes(self) -> Mapping[str, int | str]:
        """How many examples each step saw, changed and removed, and why."""
        return {**self.source.notes, **self._found[1]}

    def expect(self, phase: str) -> None:
        self.source.expect(phase)

    def origin(self, example: Example) -> str:
        return self.source.origin(example)

    def score(self, example: Example, completion: str) -> Score:
        return self.source.score(example, completion)

    @cached_property
    def _found(self) -> tuple[np.ndarray, dict[str, int]]:
        """The indices that stay, and the counts."""
        path = cache_folder() / "cleaned" / f"{self.fingerprint}.bin"
        content = kept(path)
        if content is None:
            indices, counts = self._pass()
            keep(path, json.dumps(counts).encode() + b"\n" + indices.tobytes())
        else:
            facts, _, rest = content.partition(b"\n")
            indices, counts = np.frombuffer(rest, np.int64), json.loads(facts)
        if not len(indices):
            told = ", ".join(f"{k} {v:,}" for k, v in counts.items())
            raise DataError(
                f"data.clean=[{', '.join(self.steps)}] leaves nothing of split={self.config.split} ({told}); leave the "
                "step away that removes too much, or change its settings in data.cleaning"
            )
        return indices, counts

    def _pass(self) -> tuple[np.ndarray, dict[str, int]]:
        counts: dict[str, Counter[str]] = {name: Counter() for name in self.steps}
        filters, indices = self._filters(), []
        for index in range(len(self.source)):
            example = self.source[index]
            for name, count in counts.items():
                count["seen"] += 1
                if name in CHANGING:
                    new, why = changed(example, self._changes[name])
                    fault = spoiled(example, new) if new is not example else ""
                    count["changed"] += new is not example
                    stays, why, example = not fault, [*why.elements(), *[fault] * bool(fault)], new
                else:
                    stays, why = filters[name](index, example)
                count.update(f"({reason})" for reason in why)
                if not stays:
                    count["removed"] += 1
                    break
            else:
                indices.append(index)
        told = {"examples": len(self.source), "kept": len(indices)}
        for name, count in counts.items():
            figures = ("seen", *["changed"] * (name in CHANGING), "removed", *sorted(k for k in count if k[0] == "("))
            told |= {f"{name} {figure}": count[figure] for figure in figures}
        return np.array(indices, np.int64), told

    def _changed(self, index: int, before: int) -> Example:
        """Example `index` of the source, as the changing ones of the first `before` steps leave it."""
        example = self.source[index]
        for name in self.steps[:before]:
            if name in CHANGING:
                example, _ = changed(example, self._changes[name])
        return example

    def _filters(self) -> dict[str, Filter]:
        """The filtering steps, new: they remember what they have seen."""
        found: dict[str, Filter] = {}
        for number, name in enumerate(self.steps):
            if name == "near":
                found[name] = Near(self.settings, lambda index, before=number: self._changed(index, before))
            elif name not in CHANGING:
                make: dict[str, Callable[[], Filter]] = {
                    "length": lambda: length_filter(self.settings),
                    "language": lambda: language_filter(self.settings),
                    "quality": lambda: quality_filter(self.settings),
                    "exact": Exact,
                }
                found[name] = make[name]()
        return found


def changed(example: Example, change: Change) -> tuple[Example, Counter[str]]:
    """An example with every text of it changed, and what was done how often; itself where that is nothing."""
    done: Counter[str] = Counter()

    def of(value: Any) -> Any:
        if isinstance(value, str):
            text, counts = change(value)
            done.update(counts)
            return text
        if isinstance(value, Mapping):
            return {**value, "content": of(value["content"])}
        return [of(m) for m in value]

    new = {k: of(v) if k == "messages" or (k in TEXTS and isinstance(v, str | list)) else v for k, v in example.items()}
    return (new, done) if new != example else (example, Counter())


def spoiled(before: Example, after: Example) -> str:
    """Why an example is of no use any more once its texts were changed; "" if it is.

    >>> spoiled({"prompt": "4?", "chosen": "4 ", "rejected": "4"}, {"prompt": "4?", "chosen": "4", "rejected": "4"})
    'sides became equal'
    """
    if any(b.strip() and not a.strip() for b, a in zip(texts_of(before), texts_of(after), strict=True)):
        return "became empty"
    if form_of(after) == "pairs":
        sides = after["chosen"], after["rejected"]
        shared = 0 if "prompt" in after else len(prompt_of(after))
        if sides[0] == sides[1] or (shared and shared >= min(map(len, sides))):
            return "sides became equal"
    return ""


def texts_of(example: Example) -> list[str]:
    """Every text that an example says, in a fixed order."""
    found = []
    for key in ("text", "prompt", "messages", "completion", "chosen", "rejected"):
        value = example.get(key, [])
        found += [value] if isinstance(value, str) else [m["content"] for m in value]
    return found


def length_filter(settings: CleaningConfig) -> Filter:
    """By the characters of all that an example says."""

    def check(index: int, example: Example) -> tuple[bool, list[str]]:
        size = sum(map(len, texts_of(example)))
        why = "too short" if size < settings.min_chars else "too long" if size > settings.max_chars else ""
        return not why, [why] * bool(why)

    return check


def language_filter(settings: CleaningConfig) -> Filter:
    """By what py3langid takes all that an example says for; what it is not sure of, or is too short to tell, stays."""
    identifier = _identifier()

    def check(index: int, example: Example) -> tuple[bool, list[str]]:
        text = "\n".join(texts_of(example))
        if len(text) < settings.language_min_chars:
            return True, ["undecided, short"]
        language, confidence = identifier.classify(text)
        if language in settings.languages:
            return True, []
        if confidence <= settings.language_confidence:
            return True, ["undecided, unsure"]
        return False, [language]

    return check


@cache
def _identifier() -> Any:
    module = optional("py3langid.langid", "data.clean=[language]")
    return module.LanguageIdentifier.from_model_file(module.MODEL_FILE, norm_probs=True)


def quality_filter(settings: CleaningConfig) -> Filter:
    """By the rules of Gopher; a text that breaks several counts under each of them."""

    def check(index: int, example: Example) -> tuple[bool, list[str]]:
        broken = broken_rules("\n\n".join(texts_of(example)), settings)
        return not broken, broken

    return check
