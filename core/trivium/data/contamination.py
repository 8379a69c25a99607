"""Whether training data holds what is held out: the same words in a row (Brown et al. 2020, appendix C; n = 13).

What is compared: of text, the text; of what is asked and answered, the whole conversation with its right answer. A
held-out text is found if it shares one n-gram with the training data, as in the paper. Conversations share phrases by
nature ("Thank you!", "You are welcome."), so one is found only if a single training example holds nine tenths of its
n-grams. What is shorter than n words is compared as a whole, with its signs: 3 + 5 is not 3 - 5.

The held-out n-grams are held as sorted 64-bit hashes and the training data is read past them, so memory follows from
the size of what is held out.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trivium.data.source import Example, Source, form_of
from trivium.disk import cache_folder, keep, kept

VERSION = 1
"""Of what is compared and how; raise it when that changes."""
WORDS = 13
WORST = 10
"""The most that is told of: examples, the most shared first."""
CONVERSATION = 0.9
"""Share of a conversation's n-grams that one training example must hold."""
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+")
"""Letters and digits in a row; of scripts without blanks, Chinese and Japanese characters one by one."""
BASE = 0x9E3779B97F4A7C15
BATCH = 4096
"""Training examples that are read past the held-out n-grams at once."""
PAIRS = 4_000_000
"""Pairs of a shared n-gram and who has it that are in memory at once; more only of one example by itself."""
KNOWN = 1_000_000
"""Words whose hashes are remembered at most."""


@dataclass(frozen=True)
class Found:
    """A held-out example that the training data holds, and the training example that has most of it; by their ids."""

    held_out: str
    train: str
    shared: int  # n-grams of the held-out example that this training example has
    of: int  # n-grams that the held-out example has


@dataclass(frozen=True)
class Overlap:
    """What training data holds of a held-out set."""

    examples: int  # that are held out
    contaminated: int  # of them
    worst: tuple[Found, ...]  # at most WORST, the most n-grams first

    @property
    def share(self) -> float:
        """Of the held-out examples that are contaminated."""
        return self.contaminated / max(1, self.examples)


def overlap(train: Source, held_out: Source, n: int = WORDS) -> Overlap:
    """Count the held-out examples that the training data holds. Reads both once; from the cache if it has before."""
    made_of = [VERSION, CONVERSATION, WORST, train.fingerprint, held_out.fingerprint, n]
    path = cache_folder() / "overlaps" / f"{hashlib.sha256(json.dumps(made_of).encode()).hexdigest()}.json"
    content = kept(path)
    if content is None:
        found = find_overlap(train, held_out, n)
        keep(path, json.dumps(dataclasses.asdict(found)).encode())
        return found
    facts = json.loads(content)
    return Overlap(facts["examples"], facts["contaminated"], tuple(Found(**f) for f in facts["worst"]))


def find_overlap(train: Source, held_out: Source, n: int) -> Overlap:
    """`overlap`, without the cache."""
    hashes_of, total = Hasher(n), len(held_out)
    grams, owners, whole = np.empty(0, np.uint64), np.empty(0, np.int64), []
    for start, examples in batches(held_out):
        found, whose = each_once(*hashes_of(examples))
        grams, owners = np.concatenate([grams, found]), np.concatenate([owners, whose + start])
        whole += [form_of(e) != "text" for e in examples]
    order = np.argsort(grams, kind="stable")
    grams, owners = grams[order], owners[order]
    sizes = np.bincount(owners, minlength=total)
    needed = np.where(whole, np.ceil(CONVERSATION * sizes), 1)
    most, where = np.zeros(total, np.int64), np.full(total, -1)
    for start, examples in batches(train):
        for held, mine, count in shared_grams(grams, owners, *hashes_of(examples)):
            better = count > most[held]
            most[held[better]], where[held[better]] = count[better], mine[better] + start
    hit = np.flatnonzero((most > 0) & (most >= needed))
    told = hit[np.lexsort((hit, -most[hit]))][:WORST]
    worst = tuple(Found(held_out[int(i)]["id"], train[int(where[i])]["id"], int(most[i]), int(sizes[i])) for i in told)
    return Overlap(total, len(hit), worst)


def batches(source: Source) -> Iterator[tuple[int, list[Example]]]:
    """The examples, BATCH at a time, with the number of the first."""
    for start in range(0, len(source), BATCH):
        yield start, [source[i] for i in range(start, min(start + BATCH, len(source)))]


def shared_grams(
    grams: np.ndarray, owners: np.ndarray, hashes: np.ndarray, whose: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """For each held-out example that shares n-grams with a batch: its number, the example of the batch that has most
    of them (the first of such), and how many.

    grams, owners: the held-out n-grams, sorted. hashes, whose: those of the batch, by its examples. In several pieces
    where everything is shared with everything: PAIRS bounds the memory.
    """
    starts = np.searchsorted(grams, hashes)
    there = starts < len(grams)
    there[there] = grams[starts[there]] == hashes[there]
    hashes, whose = each_once(hashes[there], whose[there])
    starts = np.searchsorted(grams, hashes)
    counts = np.searchsorted(grams, hashes, side="right") - starts
    ends = np.cumsum(counts)
    cuts = np.append(np.flatnonzero(np.diff(whose)) + 1, len(hashes))  # where an example of the batch ends
    first = 0
    while first < len(hashes):
        before = ends[first - 1] if first else 0
        cuts = cuts[cuts > first]
        fitting = cuts[ends[cuts - 1] - before <= PAIRS]
        last = fitting[-1] if len(fitting) else cuts[0]
        here = slice(first, last)
        places = np.repeat(starts[here] - (ends[here] - counts[here] - before), counts[here])
        held = owners[places + np.arange(int(ends[last - 1] - before))]
        pairs, shared = np.unique(held * BATCH + np.repeat(whose[here], counts[here]), return_counts=True)
        held, mine = pairs // BATCH, pairs % BATCH
        order = np.lexsort((mine, -shared, held))
        best = order[np.flatnonzero(np.diff(held[order], prepend=-1))]
        yield held[best], mine[best], shared[best]
        first = last


def compared_text(example: Example) -> str:
    """What of an example must not be in both: everything that is asked and rightly answered.

    Of fields of a wrong form, which the doctor names, what they look like as text.
    """
    if "text" in example:
        return _as_text(example["text"])
    said: Any = next(
        (example[key] for key in ("chosen", "messages", "completion", "completions") if key in example), ""
    )
    turns = said if isinstance(said, (list, tuple)) else [said]
    told = "\n".join(_as_text(t.get("content") if isinstance(t, Mapping) else t) for t in turns)
    return f"{_as_text(example['prompt'])}\n{told}" if "prompt" in example else told


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else "" if value is None else json.dumps(value, default=str)


def each_once(hashes: np.ndarray, whose: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """N-grams by example, without those that an example has had before."""
    order = np.lexsort((hashes, whose))
    hashes, whose = hashes[order], whose[order]
    new = np.ones(len(hashes), bool)
    new[1:] = (hashes[1:] != hashes[:-1]) | (whose[1:] != whose[:-1])
    return hashes[new], whose[new]


class Hasher:
    """Examples -> the hashes of their n-grams, and which example each is of."""

    def __init__(self, n: int) -> None:
        self.n, self._known = n, {}
        self._powers = [np.uint64(pow(BASE, k, 2**64)) for k in range(n)]

    def __call__(self, examples: Sequence[Example]) -> tuple[np.ndarray, np.ndarray]:
        long, short, spoken, numbers = [], [], [], []
        for index, example in enumerate(examples):
            text = compared_text(example).lower()
            words = WORD.findall(text)
            if len(words) >= self.n:
                long.append(index)
                spoken.append(len(words))
                numbers += map(self._number, words)
            elif whole := " ".join(text.split()):
                short.append((hashed(f"whole {whole}"), index))
        once = np.array([h for h, _ in short], np.uint64), np.array([i for _, i in short], np.int64)
        if not long:
            return once
        words, whose = np.array(numbers, np.uint64), np.repeat(np.array(long), spoken)
        count = len(words) - self.n + 1
        grams = np.zeros(count, np.uint64)
        for k, power in enumerate(self._powers):
            grams += words[k : k + count] * power
        inside = whose[:count] == whose[self.n - 1 :]  # not across two examples
        return np.concatenate([once[0], grams[inside]]), np.concatenate([once[1], whose[:count][inside]])

    def _number(self, word: str) -> int:
        found = self._known.get(word)
        if found is None:
            if len(self._known) >= KNOWN:
                self._known.clear()
            found = self._known[word] = hashed(word)
        return found


def hashed(text: str) -> int:
    """64 bits that depend on the text alone."""
    return int.from_bytes(hashlib.blake2b(text.encode(errors="replace"), digest_size=8).digest())
