"""The schema that a table's columns come nearest to, and the setting that makes them fit it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from difflib import SequenceMatcher
from typing import NamedTuple

OPTIONAL = {"alpaca": ("input", "system"), "pairs": ("prompt", "system")}
"""Columns that a schema reads where they are, and that are told where one is like them."""
JUDGED = ("pairs", "labels")
_ASKED = ("query", "question", "prompt", "instruction", "input", "request", "problem", "user", "human")
_SAID = ("response", "output", "completion", "reply", "answer", "assistant", "target", "solution")
_TALK = ("conversation", "conversations", "messages", "dialog", "dialogue", "turns", "chat")
MEANS = {
    "prompt": _ASKED,
    "instruction": _ASKED,
    "question": _ASKED,
    "completion": _SAID,
    "output": _SAID,
    "messages": _TALK,
    "text": ("content", "body", "document", "article", "story", "passage", "code"),
    "chosen": ("preferred", "accepted", "winner", "better"),
    "rejected": ("dispreferred", "refused", "loser", "worse"),
    "label": ("verdict", "desirable"),
    "choices": ("options",),
    "answer": ("solution", "gold"),
}
"""Other names under which people write a column, its own left out."""
OTHERS = frozenset({*MEANS, *_ASKED, *_SAID, *_TALK} - {"text"})
ABOUT = frozenset("id ids index hash length len tokens count type source model name language".split())
"""Last words of columns that say something about a text and do not hold it: prompt_id is no prompt."""
LIKE = 0.8
"""How alike two spellings must be: txt is 0.86 like text, test 0.75."""
LEAST = 0.3
"""Below, a schema is not worth naming."""


class Nearest(NamedTuple):
    """A schema, its columns, and what was found for each of them; "" where nothing was."""

    schema: str
    columns: dict[str, str]

    @property
    def missing(self) -> list[str]:
        """The columns that nothing was found for."""
        return [name for name, column in self.columns.items() if not column]


def nearest(known: Mapping[str, Iterable[Sequence[str]]], columns: Sequence[str]) -> Nearest | None:
    """Of schemas and the columns that make each, the one that most of `columns` are, or are like. None: none is near.

    >>> nearest({"text": [["text"]], "alpaca": [["instruction", "output"]]}, ["instruct", "inputs", "outputs"])
    Nearest(schema='alpaca', columns={'instruction': 'instruct', 'input': 'inputs', 'output': 'outputs'})
    """
    best, most = None, (False, LEAST)
    for schema, needed in ((schema, needed) for schema, each in known.items() for needed in each):
        found, alike = _matched(needed, columns)
        whole = dict.fromkeys(needed, "") | found
        more = _optional(schema, whole, columns)
        # what may hold bad answers is never to be read as something to imitate
        rank = schema in JUDGED and len(found) == len(needed), alike / len(needed) + 0.1 * len(more)
        if rank > most:
            first = dict(list(whole.items())[:1])
            best, most = Nearest(schema, {**first, **more, **whole}), rank
    return best


def _optional(schema: str, whole: Mapping[str, str], columns: Sequence[str]) -> dict[str, str]:
    free = [column for column in columns if column not in whole.values()]
    names = [name for name in OPTIONAL.get(schema, ()) if name not in whole]
    return {name: column for name, column in _matched(names, free)[0].items() if _alike(name, column) >= LIKE}


def _matched(needed: Sequence[str], columns: Sequence[str]) -> tuple[dict[str, str], float]:
    """The most alike column for each name, each column once; and how alike they are in all."""
    pairs = ((_alike(name, column), name, column) for name in needed for column in columns)
    found: dict[str, str] = {}
    total = 0.0
    for alike, name, column in sorted(pairs, key=lambda pair: -pair[0]):  # stable: the first of equals
        if alike and name not in found and column not in found.values():
            found[name] = column
            total += alike
    return found, total


def _alike(name: str, column: str) -> float:
    """1 for the same name, 0.7 for another word for it, 0 for something else."""
    if name == column:
        return 1.0
    small = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", column).lower()
    words = re.split(r"[\W_]+", small)
    if words[-1] in ABOUT or (words[0] == "system") != (name == "system"):
        return 0.0
    if name == "text" and OTHERS.intersection(words):  # answer_text is an answer
        return 0.0
    alike = 0.99 * SequenceMatcher(None, name, small).ratio()
    if alike >= LIKE:
        return alike
    if name in words:
        return LIKE
    return 0.7 if {small, *words} & {*MEANS.get(name, ())} else 0.0


def setting(pairs: Mapping[str, str]) -> str:
    """data.columns as a shell and the command line take it; pairs: known name, and the one found.

    >>> print(setting({"prompt": "the question"}))
    'data.columns=["prompt=the question"]'
    """
    said = (f"{new}={old}".replace('"', '\\"') for new, old in pairs.items())
    listed = ",".join(f'"{pair}"' for pair in said)
    return shlex.quote(f"data.columns=[{listed}]")
