"""The doctor's rules about a batch, a data set as a whole, and training against held-out data; and what is sampled."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from trivium.data.contamination import Overlap, Twins, hashed
from trivium.data.lint import Finding, found
from trivium.data.lint_examples import words_of
from trivium.data.source import Example, Source, form_of
from trivium.data.table import TokenTable
from trivium.data.tokenizer import Tokenizer
from trivium.types import IGNORE, TokenBatch

LOOKED_AT = 1000
"""Examples that a bounded look reads."""

SPARE = 1.05
"""Rows of a model to tokens of its tokenizer: fewer are padding (Qwen2.5: 152,064 to 151,665), more somebody else's."""

LONGEST = 4
"""Of them: enough to see what does not fit, few enough that a share of what is looked at is one of the data."""

MOST_CHARACTERS = 2_000_000
"""Read in a bounded look, about: longer texts leave fewer of them."""


def survey(
    source: Source, count: int, among: int = 0, each: Callable[[Example], Iterable[Finding]] = lambda example: ()
) -> tuple[list[Example], list[Finding]]:
    """`count` examples to look at closely, and what is wrong with those that were read to choose them.

    Evenly spread, the first and the longest few (by characters) included; the same at every call. among: how
    many are read; 0 is all of them. each: what is looked at in every one. Of those that are read some hundred
    bytes each are held meanwhile.
    """
    size = len(source)
    read = np.array(spread(size, among or size))
    lengths, ids = np.zeros(len(read), np.int64), np.zeros(len(read), np.uint64)
    verdicts, findings = [0, 0], []
    for number, index in enumerate(read):
        example = source[int(index)]
        lengths[number] = sum(len(text) for _, text in _words(example))
        ids[number] = hashed(str(example["id"]))
        findings += each(example)
        if form_of(example) == "labels" and isinstance(example["label"], int):
            verdicts[bool(example["label"])] += 1
    findings += _check_ids(source, read, ids)
    if sum(verdicts) and not all(verdicts):
        kind = "desirable" if verdicts[True] else "undesirable"
        findings.append(found("one_sided", "", f"all {sum(verdicts)} verdicts are {kind}; KTO learns from both kinds"))
    long = np.argsort(-lengths, kind="stable")[:LONGEST].tolist()
    if among:
        count = min(count, max(1, MOST_CHARACTERS * len(lengths) // max(1, int(lengths.sum()))))
    long = long[: max(1, count // 8)]
    others = np.delete(np.arange(len(read)), long)
    even = others[spread(len(others), max(1, count - len(long)))]
    return [source[int(read[i])] for i in sorted([*long, *even.tolist()])], findings


def _check_ids(source: Source, read: np.ndarray, ids: np.ndarray) -> Iterator[Finding]:
    order = np.argsort(ids, kind="stable")
    again = np.sort(order[1:][ids[order][1:] == ids[order][:-1]])
    for number in again:
        id_ = str(source[int(read[number])]["id"])
        yield found("same_id", id_, "another example has this id; a source must give each its own")


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


def check_overlap(name: str, overlap: Overlap, allowed: float, *, fails: bool) -> Iterator[Finding]:
    """What training data has of the held-out set `name`: whole examples, prompts, and more of them for the most part
    than the share `allowed`, which is fatal if `fails`."""
    seen = "it is held out ({}), and trained on as example {}; take it out of one of the two"
    yield from _twins("held_out_seen", name, overlap.same, seen)
    asked = "its prompt is held out ({}), and trained on with another answer in example {}"
    yield from _twins("same_prompt", name, overlap.prompts, asked)
    if overlap.share <= allowed:
        return
    worst = overlap.worst[0]
    then = (
        "take them out of either, or set data.contamination=warn"
        if fails
        else "a figure on them is of what was learned by heart"
    )
    message = (
        f"{overlap.contaminated:,} of {overlap.examples:,} held-out examples ({name}) are in the training data, such "
        f"as {worst.held_out} in {worst.train} ({worst.shared:,} of its {worst.of:,} n-grams); {then}"
    )
    yield found("leak", "", message, fatal=fails)


def _twins(rule: str, name: str, twins: Twins, message: str) -> Iterator[Finding]:
    """A finding for each that is told of, and one for the others."""
    for held_out, trained in twins.told:
        yield found(rule, held_out, message.format(name, trained))
    if twins.count > len(twins.told):
        yield found(rule, "", f"{twins.count - len(twins.told):,} more are such ({name})")


def check_vocabulary(tokenizer: Tokenizer, rows: int) -> Iterator[Finding]:
    """rows: of the model's embedding."""
    if tokenizer.vocab_size > rows:
        message = (
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model only {rows}; take the model's own tokenizer"
        )
        yield found("vocabulary", "", message)
    elif rows > SPARE * tokenizer.vocab_size + 512:
        rest = rows - tokenizer.vocab_size
        message = (
            f"the model has {rows} rows and the tokenizer {tokenizer.vocab_size} tokens, so {rest} rows are none; is "
            "it another model's tokenizer?"
        )
        yield found("vocabulary", "", message, fatal=False)


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
