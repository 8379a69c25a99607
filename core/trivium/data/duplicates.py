"""Duplicates: the same content again, and nearly the same. The first in the source's order is kept.

Exact: SHA-256 of the content, without what no reader sees (Unicode form, line ends, blanks at line ends). Near: MinHash
with locality-sensitive hashing (Broder 1997; Lee et al. 2022, https://arxiv.org/abs/2107.06499) finds candidates, and
their true Jaccard similarity decides, so nothing is removed by an unlucky hash.

An example is compared part by part: a prompt with a prompt, an answer with an answer; the least similar part counts. So
questions from one template with different answers stay, as does a pair whose sides are exchanged.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from trivium.data.clean_text import optional
from trivium.data.config import CleaningConfig
from trivium.data.source import Example, Messages, form_of, prompt_of

HASHES = 128
MISSED = 1e-5
"""The most of the duplicates, at the very threshold, that hashing may miss."""
SEED = 20_211_208
LINE_END_BLANKS = re.compile("[ \t\u00a0]*(\r\n?|\n)")
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\s\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+")
"""What stands between blanks; of scripts that have none, Chinese and Japanese characters one by one."""


def parts_of(example: Example) -> tuple[str, ...]:
    """What two examples must have alike, each part for itself: its form, what is asked, what is answered, how judged.

    >>> parts_of({"id": "1", "prompt": "4?", "completion": "5", "label": False})
    ('labels', 'false', '4?', '5')
    """
    form = form_of(example)
    if form == "text":
        return (form, example["text"])
    prompt = _told(prompt_of(example))
    if form == "pairs":
        shared = len(prompt_of(example)) if "prompt" not in example else 0
        sides = [example[side] if "prompt" in example else example[side][shared:] for side in ("chosen", "rejected")]
        return (form, prompt, *map(_told, sides))
    answer = _told(example["messages"][-1:]) if "messages" in example else example["completion"]
    judged = json.dumps([example.get("label"), example.get("task"), example.get("answer")], sort_keys=True, default=str)
    if form == "labels":
        judged = json.dumps(example["label"])
    return (form, judged, prompt, answer) if form != "chat" else (form, prompt, answer)


def _told(said: str | Messages) -> str:
    return said if isinstance(said, str) else "\n\n".join(f"{m['role']}: {m['content']}" for m in said)


def digest_of_content(example: Example) -> bytes:
    """SHA-256 of what an example says; its id is no part of it."""
    parts = [LINE_END_BLANKS.sub("\n", unicodedata.normalize("NFC", part)).strip() for part in parts_of(example)]
    return hashlib.sha256(json.dumps(parts).encode()).digest()


def shingles(text: str, words: int) -> frozenset[str]:
    """Every `words` words in a row, in lower case; of a shorter text the whole.

    >>> sorted(shingles("The cat sat down", 3))
    ['cat sat down', 'the cat sat']
    """
    found = WORD.findall(text.lower())
    return frozenset(" ".join(found[i : i + words]) for i in range(max(1, len(found) - words + 1)))


def jaccard(one: frozenset[str], other: frozenset[str]) -> float:
    """Shared over all.

    >>> jaccard(frozenset("abc"), frozenset("bcd"))
    0.5
    """
    return len(one & other) / max(1, len(one | other))


def bands_for(threshold: float) -> int:
    """Into how many bands HASHES hashes are cut: as few as miss no more than MISSED at the threshold.

    Two texts are candidates if all hashes of a band agree: with chance 1 - (1 - J^rows)^bands.

    >>> bands_for(0.8), bands_for(0.95)
    (32, 16)
    """
    for rows in (32, 16, 8, 4, 2):
        if (1 - threshold**rows) ** (HASHES // rows) <= MISSED:
            return HASHES // rows
    return HASHES


class Exact:
    """Removes what has been seen; 32 bytes of each example are kept."""

    def __init__(self) -> None:
        self._seen: set[bytes] = set()

    def __call__(self, index: int, example: Example) -> tuple[bool, list[str]]:
        """Whether it is kept, and nothing more to count."""
        digest = digest_of_content(example)
        new = digest not in self._seen
        self._seen.add(digest)
        return new, []


class Near:
    """Removes what is nearly what has been kept. Signatures are kept and no text: `at` gives an example anew."""

    def __init__(self, settings: CleaningConfig, at: Callable[[int], Example]) -> None:
        self.threshold, self.words = settings.near_threshold, settings.near_words
        self._minhash: Any = optional("rensa", "data.clean=[near]").RMinHash
        bands = bands_for(self.threshold)
        self._index: Any = optional("rensa", "data.clean=[near]").RMinHashLSH(self.threshold, HASHES, bands)
        self._at = lru_cache(maxsize=256)(lambda index: self._parts(at(index)))

    def __call__(self, index: int, example: Example) -> tuple[bool, list[str]]:
        """Whether it is kept, and nothing more to count."""
        mine = self._parts(example)
        signature = self._minhash(HASHES, SEED)
        signature.update(hashed_from(mine))
        for other in sorted(self._index.query(signature)):
            if similarity(mine, self._at(other)) >= self.threshold:
                return False, []
        self._index.insert(index, signature)
        return True, []

    def _parts(self, example: Example) -> tuple[frozenset[str], ...]:
        return tuple(shingles(part, self.words) for part in parts_of(example))


def hashed_from(parts: tuple[frozenset[str], ...]) -> list[str]:
    """What the signature of an example is made from: shingles, told apart by their part.

    These sets are at least as similar as the least similar parts, so hashing misses no more than it would of one part.
    A part of one shingle is the same or is not: as a mark on all others it keeps what cannot be a duplicate apart.
    """
    mark = hashlib.blake2b(json.dumps([sorted(p) if len(p) == 1 else 0 for p in parts]).encode(), digest_size=8)
    key = mark.hexdigest()
    return [f"{key} {i} {s}" for i, part in enumerate(parts) if len(part) > 1 for s in part] or [key]


def similarity(one: tuple[frozenset[str], ...], other: tuple[frozenset[str], ...]) -> float:
    """Of the parts that are least alike; 0 for examples of different forms."""
    return min(map(jaccard, one, other)) if len(one) == len(other) else 0.0
