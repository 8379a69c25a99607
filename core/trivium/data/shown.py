"""Documents as people see them: the text of their tokens in stretches, each trained or not, with what is invisible."""

from __future__ import annotations

import re
from itertools import groupby
from typing import NamedTuple

from trivium.data.chat import Encoded
from trivium.data.tokenizer import Tokenizer


class Stretch(NamedTuple):
    """A piece of text that is trained or not. special: one special token."""

    text: str
    trained: bool
    special: bool


def stretches(document: Encoded, tokenizer: Tokenizer, most: int = 0) -> list[Stretch]:
    """The text of a document, special tokens shown and each by itself. most: tokens shown; 0 is all.

    A character whose bytes are of two stretches would be shown as two U+FFFD; no mask of ours cuts one.
    """
    added = tokenizer._core.get_added_tokens_decoder()
    special = {i for i, token in added.items() if token.special}
    shown = list(zip(document.ids, document.trained, strict=True))[: most or None]
    made = []
    for (trained, alone), run in groupby(enumerate(shown), lambda x: (x[1][1], x[0] if x[1][0] in special else -1)):
        ids = [token for _, (token, _) in run]
        made.append(Stretch(tokenizer.decode(ids, special=True), trained, alone >= 0))
    return made


def exchanges(parts: list[Stretch]) -> list[list[Stretch]]:
    """Cut behind each answer, to be shown on lines of their own; not where the text itself breaks the line there."""
    cut: list[list[Stretch]] = [[]]
    for part in parts:
        before = cut[-1][-1] if cut[-1] else None
        if before and before.trained and not part.trained and not part.text.startswith("\n"):
            cut.append([])
        cut[-1].append(part)
    return cut


def visible(text: str) -> str:
    """Text with its white space shown where it would be missed: line breaks, tabs, and spaces at the ends or in a row.

    >>> visible(" a  b\\tc\\n")
    '·a··b⇥c⏎\\n'
    """
    text = re.sub(r"^ +| +$| {2,}|(?<=\n) +| +(?=\n)", lambda spaces: "·" * len(spaces[0]), text)
    return text.replace("\t", "⇥").replace("\r", "␍").replace("\n", "⏎\n")


def plain(parts: list[Stretch]) -> str:
    """For where there are no colours: trained text stands in [brackets]."""
    runs = groupby(parts, lambda part: part.trained)
    return "".join(f"[{t}]" if on else t for on, run in runs for t in ["".join(visible(p.text) for p in run)])
