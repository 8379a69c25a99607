"""Questions about licences with one right answer each: a text's category, and what a clause is about."""

from __future__ import annotations

import re
from collections.abc import Set
from typing import Any

from trivium_plugins.legal.texts import Licence, paragraphs

CATEGORIES = (
    "CLA", "Commercial", "Copyleft", "Copyleft Limited", "Free Restricted", "Patent License", "Permissive",
    "Proprietary Free", "Public Domain", "Source-available", "Unstated License",
)  # fmt: skip
"""The database's own eleven, given to each text by its editors."""

CLAUSES = {
    "warranty": r"\bas[ -]is\b|warrant(?:y|ies)\b",
    "liability": r"\bliab(?:le|ility)\b",
    "termination": r"\bterminat(?:e|es|ed|ion)\b",
    "governing law": r"\bgoverned by\b|\bjurisdiction\b|\bvenue\b",
    "patents": r"\bpatents?\b",
    "trademarks": r"\btrademarks?\b|\bendorse\b",
    "source code": r"\bsource code\b",
    "fees": r"\bfees?\b|\broyalt(?:y|ies)\b",
}
"""What a clause is about, by the words that say so. A paragraph in which two of these are found is no question."""
WORDS = 13
"""Words in a row that a held-out clause shares with none that training asks about: as many as make a leak."""
SHORTEST, LONGEST = 80, 600
"""Characters of a clause that a question shows whole."""


def kind_of(paragraph: str) -> str | None:
    """The one subject whose words stand in a paragraph, else None.

    >>> kind_of("This agreement is governed by the laws of Finland."), kind_of("No warranty and no liability.")
    ('governing law', None)
    """
    found = [kind for kind, words in CLAUSES.items() if re.search(words, paragraph, re.I)]
    return found[0] if len(found) == 1 else None


def category(one: Licence, excerpt: int) -> dict[str, Any]:
    """Which category is it? Shows the beginning of the text."""
    shown = " ".join(one.text.split())[:excerpt]
    asked = f"{shown}\n\nWhich category of licence is this: {', '.join(CATEGORIES)}?"
    return _example(f"category/{one.key}", "category", asked, one.category)


def asked(one: Licence, seen: Set[str] = frozenset()) -> dict[str, str]:
    """Subject -> its clause: the first of each. seen: runs of words, of which a clause must have others only; one that
    is too short to have any is left out then."""
    first: dict[str, str] = {}
    for paragraph in paragraphs(one.text):
        if SHORTEST <= len(paragraph) <= LONGEST and (kind := kind_of(paragraph)) and kind not in first:
            mine = runs(paragraph)
            if not seen or (mine and not mine & seen):
                first[kind] = paragraph
    return first


def runs(paragraph: str) -> set[str]:
    """Every WORDS words in a row of it.

    >>> len(runs("one two " * 7)), runs("No warranty.")
    (2, set())
    """
    words = re.findall(r"\w+", paragraph.lower())
    return {" ".join(words[i : i + WORDS]) for i in range(len(words) - WORDS + 1)}


def clause(one: Licence, kind: str, shown: str) -> dict[str, Any]:
    """What is a clause about?"""
    ask = f"What is this clause about: {', '.join(CLAUSES)}?"
    return _example(f"clause/{one.key}/{kind}", "clause", f"{shown}\n\n{ask}", kind)


def _example(name: str, task: str, asked: str, answer: str) -> dict[str, Any]:
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    return {"id": name, "task": task, "messages": turns, "answer": answer}


def is_right(answer: str, completion: str) -> bool:
    """Whether a completion is the answer and nothing else, but for case, space around it and one full stop.

    >>> is_right("Copyleft", " copyleft.\\n"), is_right("Copyleft", "Copyleft Limited"), is_right("CLA", "CLA, CLA")
    (True, False, False)
    """
    return completion.strip().removesuffix(".").strip().lower() == answer.lower()
