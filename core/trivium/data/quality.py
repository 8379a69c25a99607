"""Which rules of Gopher a document breaks (Rae et al. 2021, https://arxiv.org/abs/2112.11446, appendix A.1.1).

All rules of "Quality filtering" and, of "Repetition removal", those of table A1 with its thresholds. The paper leaves
open what a word is: here it is what stands between blanks, and n-grams are of such words. Each share names what it is
a share of; the characters of n-grams are counted without the blanks between words.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from trivium.data.config import CleaningConfig

STOP_WORDS = frozenset({"the", "be", "to", "of", "and", "that", "have", "with"})
BULLETS = ("•", "‣", "▪", "◦", "*", "-")
ELLIPSES = ("...", "…")
DUPLICATES = {"line": (0.30, 0.20), "paragraph": (0.30, 0.20)}
"""Share of the lines (paragraphs) that repeat an earlier one, and of all their characters, that is too much."""
TOP_NGRAM = {2: 0.20, 3: 0.18, 4: 0.16}
"""Share of the characters in the most frequent n-gram."""
DUPLICATE_NGRAMS = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
"""Share of the characters in n-grams that occur more than once, each character counted once."""


def broken_rules(text: str, settings: CleaningConfig) -> list[str]:
    """The names of all rules that a text breaks, none of a good one."""
    words = text.split()
    broken = broken_quality(text, words, settings)
    if settings.repetition and words:
        broken += broken_repetition(text, words)
    return broken


def broken_quality(text: str, words: Sequence[str], settings: CleaningConfig) -> list[str]:
    """The rules on words, symbols and lines."""
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    count = max(1, len(words))
    held = STOP_WORDS & {word.lower().strip(".,;:!?\"'()") for word in words}
    checks = {
        "too few words": len(words) < settings.min_words,
        "too many words": len(words) > settings.max_words,
        "mean word length": not 3 <= sum(map(len, words)) / count <= 10,
        "hash signs": text.count("#") / count > 0.1,
        "ellipses": sum(map(text.count, ELLIPSES)) / count > 0.1,
        "bullet lines": sum(line.startswith(BULLETS) for line in lines) > 0.9 * len(lines),
        "ellipsis lines": sum(line.endswith(ELLIPSES) for line in lines) > 0.3 * len(lines),
        "words without letters": sum(any(c.isalpha() for c in word) for word in words) < 0.8 * count,
        "stop words": len(held) < settings.stop_words,
    }
    return [name for name, breaks in checks.items() if breaks]


def broken_repetition(text: str, words: Sequence[str]) -> list[str]:
    """The rules on lines, paragraphs and phrases that come again."""
    broken = []
    for unit, pieces in (("line", text.split("\n")), ("paragraph", re.split(r"\n[ \t]*\n", text))):
        share, characters = repeated_pieces([p.strip() for p in pieces if p.strip()])
        most_share, most_characters = DUPLICATES[unit]
        if share > most_share:
            broken.append(f"duplicate {unit}s")
        if characters > most_characters:
            broken.append(f"duplicate {unit} characters")
    for (n, top), share in zip(_NGRAMS, repeated_ngrams(words), strict=True):
        if share > (TOP_NGRAM if top else DUPLICATE_NGRAMS)[n]:
            broken.append(f"top {n}-gram" if top else f"duplicate {n}-grams")
    return broken


def repeated_pieces(pieces: Sequence[str]) -> tuple[float, float]:
    """The share of the pieces that repeat an earlier one, and of the pieces' characters that are in such.

    >>> repeated_pieces(["ab", "cdef", "ab"])
    (0.3333333333333333, 0.25)
    """
    seen: set[str] = set()
    again = [p for p in pieces if p in seen or seen.add(p)]
    return len(again) / max(1, len(pieces)), sum(map(len, again)) / max(1, sum(map(len, pieces)))


_NGRAMS = [*((n, True) for n in TOP_NGRAM), *((n, False) for n in DUPLICATE_NGRAMS)]


def repeated_ngrams(words: Sequence[str]) -> list[float]:
    """For each n of the table, the share of the words' characters in the top n-gram, or in n-grams that come again.

    A top n-gram that occurs once is none. Of several as frequent the one of most characters is taken.
    """
    numbers: dict[str, int] = {}
    ids = np.fromiter((numbers.setdefault(w, len(numbers)) for w in words), np.int64, len(words))
    sizes = np.fromiter(map(len, words), np.int64, len(words))
    ends = np.concatenate(([0], np.cumsum(sizes)))
    shares, grams = [], ids
    for n in range(2, max(DUPLICATE_NGRAMS) + 1):
        if len(grams) < 2:
            shares += [0.0] * (max(DUPLICATE_NGRAMS) + 1 - n)
            break
        pairs = grams[:-1] * len(numbers) + ids[n - 1 :]  # exact: a gram's number and its next word's
        _, grams, counts = np.unique(pairs, return_inverse=True, return_counts=True)
        often = counts[grams]
        if n in TOP_NGRAM:
            most = often == often.max()
            lengths = np.where(most, ends[n:] - ends[:-n], -1)
            where = (grams == grams[lengths.argmax()]) & (often > 1)
        else:
            where = often > 1
        edges = np.zeros(len(words) + 1, np.int64)  # +1 where a gram begins, -1 behind its end
        starts = np.flatnonzero(where)
        np.add.at(edges, starts, 1)
        np.add.at(edges, starts + n, -1)
        shares.append(float(sizes[np.cumsum(edges[:-1]) > 0].sum() / max(1, ends[-1])))
    return shares
