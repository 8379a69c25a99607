"""Whether training data holds what is held out: the same words in a row (Brown et al. 2020, appendix C; n = 13).

What is compared: of text, the text; of what is asked and answered, the whole conversation with its right answer. A
held-out text is found if the training data as a whole holds a share of its n-grams: a fifth of a text is where Touvron
et al. 2023 (A.6) no longer call it clean; 0 is any one of them, as in Brown et al. Conversations share phrases by
nature ("Thank you!", "You are welcome."), so one is found only if a single training example holds nine tenths of its
n-grams. What is shorter than n words is compared as a whole, with its signs: 3 + 5 is not 3 - 5. Beside it, whole
examples are compared by their content, and prompts.

What is held out is held as sorted 64-bit hashes and the training data is read past them, so memory follows from the
size of what is held out.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trivium.data.source import Example, Source, form_of, prompt_of
from trivium.disk import cache_folder, keep, kept

VERSION = 2
"""Of what is compared and how; raise it when that changes."""
WORDS = 13
WORST = 10
"""The most that is told of: examples, the most shared first."""
TEXT = 0.2
"""Share of a text's n-grams that the training data must hold, unless told otherwise."""
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
class Twins:
    """Held-out examples that have something in common with a training example: how many, and the first few by ids."""

    count: int = 0
    told: tuple[tuple[str, str], ...] = ()  # (held out, trained on), at most WORST


@dataclass(frozen=True)
class Overlap:
    """What training data holds of a held-out set."""

    examples: int  # that are held out
    contaminated: int  # of them
    worst: tuple[Found, ...]  # at most WORST, the most n-grams first
    touched: int = 0  # texts that share an n-gram at all, and conversations that are contaminated
    same: Twins = Twins()  # whole examples
    prompts: Twins = Twins()  # prompts alone, of examples that are not the same

    @property
    def share(self) -> float:
        """Of the held-out examples that are contaminated."""
        return self.contaminated / max(1, self.examples)


def overlap(train: Source, held_out: Source, n: int = WORDS, text: float = 0.0) -> Overlap:
    """Count the held-out examples that the training data holds. Reads both once; from the cache if it has before.

    n: words of an n-gram; 0 compares whole examples and prompts alone. text: the share of a text's n-grams that makes
    it one that the training data holds; 0 is any.
    """
    made_of = [VERSION, CONVERSATION, WORST, train.fingerprint, held_out.fingerprint, n, text]
    path = cache_folder() / "overlaps" / f"{hashlib.sha256(json.dumps(made_of).encode()).hexdigest()}.json"
    content = kept(path)
    if content is None:
        found = find_overlap(train, held_out, n, text)
        keep(path, json.dumps(dataclasses.asdict(found)).encode())
        return found
    facts = json.loads(content)
    facts["worst"] = tuple(Found(**f) for f in facts["worst"])
    for key in ("same", "prompts"):
        facts[key] = Twins(facts[key]["count"], tuple(map(tuple, facts[key]["told"])))
    return Overlap(**facts)


def find_overlap(train: Source, held_out: Source, n: int, text: float = 0.0) -> Overlap:
    """`overlap`, without the cache."""
    grams = _Grams(n, len(held_out))
    contents, prompts = _Whole(content_of), _Whole(_prompt)
    for start, examples in batches(held_out):
        grams.hold(start, examples)
        contents.hold(examples)
        prompts.hold(examples)
    grams.sort()
    contents.sort()
    prompts.sort()
    for start, examples in batches(train):
        grams.look(start, examples)
        contents.look(start, examples)
        prompts.look(start, examples)

    def twins(where: np.ndarray) -> Twins:
        found = np.flatnonzero(where >= 0)
        told = tuple((str(held_out[int(i)]["id"]), str(train[int(where[i])]["id"])) for i in found[:WORST])
        return Twins(len(found), told)

    same = contents.where()
    prompt = np.where(same >= 0, -1, prompts.where())
    hit, touched = grams.found(text)
    told = hit[np.lexsort((hit, -grams.most[hit]))][:WORST]
    worst = tuple(
        Found(held_out[int(i)]["id"], train[int(grams.where[i])]["id"], int(grams.most[i]), int(grams.sizes[i]))
        for i in told
    )
    return Overlap(len(held_out), len(hit), worst, touched, twins(same), twins(prompt))


def copied(train: Sequence[Example], held_out: Sequence[Example], n: int = WORDS, text: float = TEXT) -> set[str]:
    """Ids of the held-out examples that the training data holds for the most part: for a source to leave them out.

    >>> copied([{"id": "a", "text": "To be, or not to be"}], [{"id": "b", "text": "to be or not to be?"}], n=3)
    {'b'}
    """
    grams = _Grams(n, len(held_out))
    for start in range(0, len(held_out), BATCH):
        grams.hold(start, held_out[start : start + BATCH])
    grams.sort()
    for start in range(0, len(train), BATCH):
        grams.look(start, train[start : start + BATCH])
    return {held_out[i]["id"] for i in grams.found(text)[0]}


class _Grams:
    """The n-grams of what is held out, and what training examples have of them."""

    def __init__(self, n: int, total: int) -> None:
        self.hashes_of = Hasher(n) if n else None
        self.grams, self.owners = np.empty(0, np.uint64), np.empty(0, np.int64)
        self.whole: list[bool] = []  # conversations, which one training example must hold
        self.most, self.where = np.zeros(total, np.int64), np.full(total, -1)
        self.sizes = np.zeros(total, np.int64)

    def hold(self, start: int, examples: Sequence[Example]) -> None:
        self.whole += [form_of(e) != "text" for e in examples]
        if self.hashes_of:
            found, whose = each_once(*self.hashes_of(examples))
            self.grams = np.concatenate([self.grams, found])
            self.owners = np.concatenate([self.owners, whose + start])

    def sort(self) -> None:
        order = np.argsort(self.grams, kind="stable")
        self.grams, self.owners = self.grams[order], self.owners[order]
        self.sizes = np.bincount(self.owners, minlength=len(self.whole))
        self.seen = np.zeros(len(self.grams), bool)  # at the first of equal ones

    def look(self, start: int, examples: Sequence[Example]) -> None:
        if not self.hashes_of:
            return
        hashes, whose = self.hashes_of(examples)
        places = np.searchsorted(self.grams, hashes)
        there = places < len(self.grams)
        there[there] = self.grams[places[there]] == hashes[there]
        self.seen[places[there]] = True
        for held, mine, count in shared_grams(self.grams, self.owners, hashes[there], whose[there]):
            better = count > self.most[held]
            self.most[held[better]], self.where[held[better]] = count[better], mine[better] + start

    def found(self, text: float) -> tuple[np.ndarray, int]:
        """The examples that the training data holds, and how many it has anything of (of conversations: those)."""
        whole = np.array(self.whole, bool)
        firsts = np.searchsorted(self.grams, self.grams)
        together = np.bincount(self.owners[self.seen[firsts]], minlength=len(whole))
        have = np.where(whole, self.most, together)
        least = np.maximum(1, np.ceil(np.where(whole, CONVERSATION, text) * self.sizes))
        return np.flatnonzero(have >= least), int((have >= np.where(whole, least, 1)).sum())


class _Whole:
    """Something of every held-out example as one hash, and the first training example that has the same."""

    def __init__(self, said: Callable[[Example], str | None]) -> None:
        self.said, self.held = said, []

    def hold(self, examples: Sequence[Example]) -> None:
        self.held.append(self._hashes(examples))

    def sort(self) -> None:
        self.unique, self.of = np.unique(np.concatenate([np.empty(0, np.uint64), *self.held]), return_inverse=True)
        self.first = np.full(len(self.unique), -1)

    def look(self, start: int, examples: Sequence[Example]) -> None:
        hashes = self._hashes(examples)
        places = np.minimum(np.searchsorted(self.unique, hashes), max(0, len(self.unique) - 1))
        if not len(self.unique):
            return
        mine = np.flatnonzero((self.unique[places] == hashes) & (hashes > 0) & (self.first[places] < 0))[::-1]
        self.first[places[mine]] = mine + start  # backwards, so that the first of them stays

    def where(self) -> np.ndarray:
        """For each held-out example: the training example's number, or -1."""
        return self.first[self.of]

    def _hashes(self, examples: Iterable[Example]) -> np.ndarray:
        return np.array([0 if (text := self.said(e)) is None else hashed(text) for e in examples], np.uint64)


def content_of(example: Example) -> str:
    """What an example teaches, without its id and name: equal text is equal content."""
    kept = ("text", "messages", "prompt", "completion", "chosen", "rejected", "label")
    return json.dumps({k: example[k] for k in kept if k in example}, sort_keys=True, default=str)


def _prompt(example: Example) -> str | None:
    """What is asked, if anything is."""
    if form_of(example) == "text":
        return None
    try:
        return json.dumps(prompt_of(example), sort_keys=True, default=str)
    except (KeyError, TypeError):  # of a wrong form, which the doctor names
        return None


def batches(source: Source) -> Iterator[tuple[int, list[Example]]]:
    """The examples, BATCH at a time, with the number of the first."""
    for start in range(0, len(source), BATCH):
        yield start, [source[i] for i in range(start, min(start + BATCH, len(source)))]


def shared_grams(
    grams: np.ndarray, owners: np.ndarray, hashes: np.ndarray, whose: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """For each held-out example that shares n-grams with a batch: its number, the example of the batch that has most
    of them (the first of such), and how many.

    grams, owners: the held-out n-grams, sorted. hashes, whose: those of the batch, by its examples, that are held out,
    too. In several pieces
    where everything is shared with everything: PAIRS bounds the memory.
    """
    hashes, whose = each_once(hashes, whose)
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
