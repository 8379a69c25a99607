"""The doctor's rules about a batch, a data set as a whole, and training against held-out data; and what is sampled."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from trivium.data.contamination import Overlap
from trivium.data.lint import Finding, found
from trivium.data.lint_examples import content_of, words_of
from trivium.data.source import Example, Source, form_of, prompt_of
from trivium.data.table import TokenTable
from trivium.data.tokenizer import Tokenizer
from trivium.types import IGNORE, TokenBatch

LOOKED_AT = 1000
"""Examples among which a bounded look searches the longest, and held-out examples that it compares with."""

LONGEST = 4
"""Of them: enough to see what does not fit, few enough that a share of what is looked at is one of the data."""

MOST_CHARACTERS = 2_000_000
"""Read in a bounded look, about: longer texts leave fewer of them."""


def sample(source: Source, count: int, among: int = 0) -> tuple[list[Example], list[Example]]:
    """`count` examples to look at closely, and all that were read to choose them.

    Evenly spread, the first and the longest few (by characters) included; the same at every call. among: how
    many are read; 0 is all of them.
    """
    size = len(source)
    read = spread(size, among or size)
    examples = [source[i] for i in read]
    lengths = [sum(len(text) for _, text in _words(e)) for e in examples]
    long = sorted(range(len(examples)), key=lambda i: -lengths[i])[:LONGEST]
    if among:
        count = min(count, max(1, MOST_CHARACTERS * len(lengths) // max(1, sum(lengths))))
    long = long[: max(1, count // 8)]
    others = sorted({*range(len(examples))} - {*long})
    even = [others[i] for i in spread(len(others), max(1, count - len(long)))]
    return [examples[i] for i in sorted([*long, *even])], examples


def _words(example: Example) -> Iterator[tuple[str, str]]:
    try:
        yield from ((who, text) for who, text in words_of(example) if isinstance(text, str))
    except (AttributeError, KeyError, TypeError):  # of a wrong form, which is a finding later
        return


def spread(size: int, count: int) -> list[int]:
    """At most `count` of the numbers below `size`, evenly spread from the first on.

    >>> spread(10, 4), spread(3, 5)
    ([0, 2, 5, 7], [0, 1, 2])
    """
    return list(range(size)) if count >= size else [i * size // count for i in range(count)]


def check_set(examples: Sequence[Example]) -> Iterator[Finding]:
    """Ids, and verdicts of both kinds."""
    seen: set[str] = set()
    for example in examples:
        if example["id"] in seen:
            yield found("same_id", example["id"], "another example has this id; a source must give each its own")
        seen.add(example["id"])
    labels = [bool(e["label"]) for e in examples if form_of(e) == "labels" and isinstance(e["label"], int)]
    if labels and len(set(labels)) == 1:
        kind = "desirable" if labels[0] else "undesirable"
        yield found("one_sided", "", f"all {len(labels)} verdicts are {kind}; KTO learns from both kinds")


def check_held_out(train: Iterable[Example], held_out: Sequence[Example]) -> Iterator[Finding]:
    """Content that is on both sides, by its hash; and prompts that are, with other answers."""
    train = list(train)
    contents = {_digest(content_of(e)): e["id"] for e in train}
    prompts = {_prompt(e): e["id"] for e in train if form_of(e) != "text"}
    for example in held_out:
        twin = contents.get(_digest(content_of(example)))
        if twin is not None:
            message = f"it is held out, and trained on as example {twin}; take it out of one of the two"
            yield found("held_out_seen", example["id"], message)
        elif form_of(example) != "text" and (twin := prompts.get(_prompt(example))) is not None:
            message = f"its prompt is held out, and trained on with another answer in example {twin}"
            yield found("same_prompt", example["id"], message)


def check_overlap(name: str, overlap: Overlap, allowed: float, *, fails: bool) -> Iterator[Finding]:
    """More of the held-out set `name` in the training data than the share `allowed`; fatal if `fails`."""
    if overlap.share <= allowed:
        return
    worst = overlap.worst[0]
    then = (
        "take them out of either (data.contamination=fail)"
        if fails
        else "a figure on them is of what was learned by heart"
    )
    message = (
        f"{overlap.contaminated:,} of {overlap.examples:,} held-out examples ({name}) are in the training data, such "
        f"as {worst.held_out} in {worst.train} ({worst.shared:,} of its {worst.of:,} n-grams); {then}"
    )
    yield found("leak", "", message, fatal=fails)


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=16).digest()


def _prompt(example: Example) -> bytes:
    return _digest(json.dumps(prompt_of(example), sort_keys=True, default=str))


def check_vocabulary(tokenizer: Tokenizer, rows: int) -> Iterator[Finding]:
    """rows: of the model's embedding."""
    if tokenizer.vocab_size > rows:
        message = (
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model only {rows}; take the model's own tokenizer"
        )
        yield found("vocabulary", "", message)


def check_batch(batch: TokenBatch, table: TokenTable, rows: Sequence[Sequence[int]], vocab: int) -> Iterator[Finding]:
    """A collated batch against the documents (of `table`, by row) that it was made of. vocab: the model's rows."""
    tokens, labels, positions = (t.numpy() for t in (batch.tokens, batch.labels, batch.positions))
    segments = np.ones_like(tokens) if batch.segments is None else batch.segments.numpy()
    known = labels[labels != IGNORE]
    wrong = known[(known < 0) | (known >= vocab)]
    if wrong.size:
        message = f"{wrong.size} labels are outside the model's {vocab} tokens, such as {wrong[0]}"
        yield found("label_vocabulary", "", message)
    if (labels != tokens)[labels != IGNORE].any():
        yield found(
            "label_place", "", "labels are not the tokens they stand at; the shift happens once, in the objective"
        )
    for b, row in enumerate(rows):
        starts = np.cumsum([0, *(table.lengths[d] for d in row)])
        if starts[-1] > tokens.shape[1]:
            message = f"its end is cut off: {starts[-1]} tokens in a row of {tokens.shape[1]}"
            yield found("pad_by_mask", table.ids[row[-1]] if table.ids else "", message)
            continue
        for number, d in enumerate(row):
            here = slice(starts[number], starts[number + 1])
            _, trained = table.document(d)
            id_ = table.ids[d] if table.ids else ""
            if labels[b, here.start] != IGNORE:
                yield found("first_label", id_, "its first token is a target, predicted from another document's end")
            hidden = trained[1:] & (labels[b, here][1:] == IGNORE)
            if hidden.any():
                lost = int(tokens[b, here][1:][hidden][0])
                message = f"{int(hidden.sum())} trained tokens have no label, the first of them token {lost}"
                yield found("pad_by_mask", id_, message)
            whole = (segments[b, here] == number + 1).all()
            if not whole or not (positions[b, here] == np.arange(table.lengths[d])).all():
                yield found("segments", id_, "its positions do not count from 0 within a segment of its own")
        rest = slice(int(starts[-1]), None)
        if segments[b, rest].any() or (labels[b, rest] != IGNORE).any():
            yield found("segments", "", "padding is part of a document, or trained on")
