"""Examples to token documents, documents to rows.

Best-fit decreasing (Ding et al. 2024, https://arxiv.org/abs/2404.10830): documents stay whole where they fit, rows are
almost full, and attention never crosses a document border. One policy for documents longer than a row: `split` for
text (every token but a document's first is a target, once), `truncate` for conversations (counted and reported,
end-of-turn losses apart).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trivium.data.chat import Chat, Encoded
from trivium.data.position import key_of, permute
from trivium.data.source import FORM_WORDS, Example, Source, form_of, prompt_of
from trivium.data.tokenizer import Tokenizer
from trivium.errors import DataError

WINDOW = 8192
"""Documents packed together: enough for full rows, few enough that a plan never needs the whole corpus."""

TOGETHER = 4096
"""Examples that are in memory at once while they are tokenised; of the others only ids and tokens are."""

MOST_ORIGINS = 32
"""Names under which losses are counted apart; where examples have more, none is."""


@dataclass
class TokenTable:
    """Documents as one flat array. Document d is tokens[offsets[d]:offsets[d+1]]; `trained` is aligned with tokens.

    group: so many documents in a row belong together and share a row: 2 for the chosen and rejected of a pair.
    columns: by name, one fp32 figure for each document. origin: for each document the number of its name in `origins`,
    under which its loss is counted, or one more if it has none; None where all have the same. They change nothing that
    is learned.
    """

    tokens: np.ndarray  # int32 (N,)
    trained: np.ndarray  # bool (N,)
    offsets: np.ndarray  # int64 (documents + 1,)
    ids: list[str]
    num_bytes: int = 0
    truncated: int = 0  # documents cut at the row length
    lost_ends: int = 0  # of those, conversations whose last end-of-turn token went with it
    group: int = 1
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    origins: tuple[str, ...] = ()
    origin: np.ndarray | None = None  # int64 (documents,)
    fingerprint: str = field(default="")

    def __post_init__(self) -> None:
        digest = hashlib.sha256()
        for array in (self.tokens, self.trained, self.offsets, *(self.columns[k] for k in sorted(self.columns))):
            digest.update(np.ascontiguousarray(array).tobytes())
        self.fingerprint = digest.hexdigest()

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document."""
        return np.diff(self.offsets)

    def document(self, d: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and mask of document `d`."""
        here = slice(self.offsets[d], self.offsets[d + 1])
        return self.tokens[here], self.trained[here]


def table_of(documents: Sequence[Encoded], ids: Sequence[str], **facts: Any) -> TokenTable:
    """A table of documents as they are; facts: its further fields."""
    offsets = np.concatenate(([0], np.cumsum([len(d.ids) for d in documents]))).astype(np.int64)
    tokens = np.fromiter((i for d in documents for i in d.ids), np.int32, offsets[-1])
    trained = np.fromiter((t for d in documents for t in d.trained), bool, offsets[-1])
    return TokenTable(tokens, trained, offsets, list(ids), **facts)


def tokenise(
    source: Source | Sequence[Example],
    tokenizer: Tokenizer,
    length: int,
    *,
    form: str = "text",
    train_on: str = "assistant",
) -> TokenTable:
    """Tokenise a whole source, or some examples, into documents that fit rows of `length` tokens.

    form: what an objective reads: "text", "chat", "pairs", "labels", or "any" of text and chat. Raises DataError for
    examples of another form, naming the first, and when nothing would be trained on.
    """
    if not len(source):
        split = f" (split={source.config.split})" if isinstance(source, Source) else ""
        raise DataError(f"the data set is empty{split}")
    if form not in _ENCODERS:
        raise DataError(f"this objective reads {FORM_WORDS.get(form, form)}, and nothing makes tokens of that yet")
    together = len(source) if form == "labels" else TOGETHER  # a verdict's neighbour may be anywhere
    seen: set[str] = set()
    parts = [
        _tokenised(source, range(start, min(start + together, len(source))), tokenizer, length, form, train_on, seen)
        for start in range(0, len(source), together)
    ]
    if not any(part.learns for part in parts):
        raise DataError(
            f"no token of {len(source)} examples would be trained on; raise batch.length={length} or look at the data"
        )
    columns = {}
    if form == "labels":
        columns["desirable"] = np.concatenate([part.desirable for part in parts])
    facts: dict[str, Any] = {"group": parts[0].group, "columns": columns}
    facts |= {name: sum(getattr(part, name) for part in parts) for name in ("num_bytes", "truncated", "lost_ends")}
    if isinstance(source, Source):
        names = [name for part in parts for name in part.names]
        origins = tuple(sorted(set(names) - {""}))
        if len(set(names)) > 1 and len(origins) <= MOST_ORIGINS:
            found = {name: i for i, name in enumerate(origins)}
            numbered = np.array([found.get(name, len(origins)) for name in names], np.int64)
            shown = numbered[np.concatenate([part.examples for part in parts])]
            facts |= {"origins": origins, "origin": shown}
    lengths = np.concatenate([part.lengths for part in parts])
    tokens = np.concatenate([part.tokens for part in parts])
    trained = np.concatenate([part.trained for part in parts])
    offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
    return TokenTable(tokens, trained, offsets, [i for part in parts for i in part.ids], **facts)


@dataclass
class _Part:
    """The documents of some examples as arrays. examples: which of all examples each is of. names: of the examples'
    origins."""

    tokens: np.ndarray
    trained: np.ndarray
    lengths: np.ndarray
    ids: list[str]
    examples: np.ndarray
    names: list[str]
    desirable: np.ndarray
    group: int
    num_bytes: int
    truncated: int
    lost_ends: int
    learns: bool


def _tokenised(
    source: Source | Sequence[Example], chosen: range, tokenizer: Tokenizer, length: int, form: str, train_on: str,
    seen: set[str],
) -> _Part:  # fmt: skip
    """The chosen examples, read now and forgotten after. seen: ids until then."""
    examples = [source[i] for i in chosen]
    for example in examples:
        if example["id"] in seen:
            raise DataError(f"two examples have the id {example['id']!r}; a source must give each its own")
        seen.add(example["id"])
    wanted = {"any": ("text", "chat", "answers"), "chat": ("chat", "answers")}.get(form, (form,))
    for example in examples:
        if form_of(example) not in wanted:
            raise DataError(
                f"example {example['id']} has {', '.join(k for k in example if k != 'id')}; "
                f"this objective needs {FORM_WORDS[wanted[0]]}"
            )
    encoded = _ENCODERS[form](examples, tokenizer, train_on)
    group = len(encoded[0])
    documents, ids, numbers = [], [], []
    truncated = lost_ends = 0
    for number, (example, unit) in enumerate(zip(examples, encoded, strict=True)):
        if "text" in example:
            pieces = [piece for document in unit for piece in _split(document, length)]
        else:
            pieces = [Encoded(d.ids[: length // group], d.trained[: length // group]) for d in unit]
            cut = [d for d in unit if len(d.ids) > length // group]
            truncated += len(cut)
            lost_ends += sum(d.trained[-1] or tokenizer.eot_id in d.ids[length // group :] for d in cut)
            if cut and not all(any(p.trained[1:]) for p in pieces):
                continue  # nothing left to learn from: counted above
        documents += pieces
        ids += [example["id"]] * len(pieces)
        numbers += [number] * len(pieces)
    lengths = np.array([len(d.ids) for d in documents], np.int64)
    return _Part(
        tokens=np.fromiter((i for d in documents for i in d.ids), np.int32, lengths.sum()),
        trained=np.fromiter((t for d in documents for t in d.trained), bool, lengths.sum()),
        lengths=lengths,
        ids=ids,
        examples=np.array(numbers, np.int64) + chosen.start,
        names=[source.origin(example) for example in examples] if isinstance(source, Source) else [],
        desirable=np.array([float(examples[n].get("label", 0)) for n in numbers], np.float32),
        group=group,
        num_bytes=sum(len(e["text"].encode()) for e in examples if "text" in e),
        truncated=truncated,
        lost_ends=lost_ends,
        learns=any(any(d.trained[1:]) for d in documents),
    )


def _split(document: Encoded, length: int) -> list[Encoded]:
    """A long text in pieces that share one token: the last of one is what the next one's first target follows from."""
    starts = range(0, len(document.ids) - 1, length - 1)
    return [Encoded(document.ids[s : s + length], document.trained[s : s + length]) for s in starts]


def _text(ids: list[int], tokenizer: Tokenizer) -> Encoded:
    whole = [*tokenizer.start, *ids, tokenizer.eos_id]
    return Encoded(whole, [True] * len(whole))


def encode_examples(examples: Sequence[Example], tokenizer: Tokenizer, train_on: str) -> list[Encoded]:
    """Conversations through the template; prompt/completion pairs as plain text ending in the end-of-text token."""
    chat = Chat(tokenizer)
    talks = [e for e in examples if "messages" in e]
    pairs = [e for e in examples if "messages" not in e]
    encoded = dict(zip((e["id"] for e in talks), chat.encode(talks, train_on), strict=True))
    prompts = tokenizer.encode_batch([e["prompt"] for e in pairs])
    completions = tokenizer.encode_batch([e["completion"] for e in pairs])
    for example, prompt, completion in zip(pairs, prompts, completions, strict=True):
        ids = [*tokenizer.start, *prompt, *completion, tokenizer.eos_id]
        num_prompt = 0 if train_on == "all" else len(ids) - len(completion) - 1
        encoded[example["id"]] = Encoded(ids, [i >= num_prompt for i in range(len(ids))])
    return [encoded[e["id"]] for e in examples]


def _encode_texts(examples: Sequence[Example], tokenizer: Tokenizer, _train_on: str) -> list[list[Encoded]]:
    return [[_text(ids, tokenizer)] for ids in tokenizer.encode_batch([e["text"] for e in examples])]


def _encode_chats(examples: Sequence[Example], tokenizer: Tokenizer, train_on: str) -> list[list[Encoded]]:
    return [[document] for document in encode_examples(examples, tokenizer, train_on)]


def _encode_any(examples: Sequence[Example], tokenizer: Tokenizer, train_on: str) -> list[list[Encoded]]:
    texts, chats = [e for e in examples if "text" in e], [e for e in examples if "text" not in e]
    found = iter(_encode_texts(texts, tokenizer, train_on)), iter(_encode_chats(chats, tokenizer, train_on))
    return [next(found[0] if "text" in e else found[1]) for e in examples]


def pair_sides(example: Example) -> list[dict[str, Any]]:
    """The chosen and the rejected answer of a pair as two examples of their own, with one prompt."""
    sides = []
    for side in ("chosen", "rejected"):
        name, said = f"{example['id']}#{side}", example[side]
        tools = {"tools": example["tools"]} if "tools" in example else {}
        talk = {"messages": said} if "prompt" not in example else {"prompt": example["prompt"], "completion": said}
        sides.append({"id": name, **talk, **tools})
    return sides


def _encode_pairs(examples: Sequence[Example], tokenizer: Tokenizer, _train_on: str) -> list[list[Encoded]]:
    """What is compared is each side's last turn."""
    encoded = encode_examples([side for e in examples for side in pair_sides(e)], tokenizer, "last_turn")
    pairs = [encoded[i : i + 2] for i in range(0, len(encoded), 2)]
    for example, (chosen, rejected) in zip(examples, pairs, strict=True):
        if chosen.ids == rejected.ids:
            raise DataError(f"example {example['id']}: chosen and rejected are the same")
    return pairs


def _encode_labels(examples: Sequence[Example], tokenizer: Tokenizer, _train_on: str) -> list[list[Encoded]]:
    """Each judged answer, and its prompt with the answer of the last example before it that has another prompt."""
    prompts = [prompt_of(e) for e in examples]
    if all(p == prompts[0] for p in prompts):
        raise DataError(
            "all examples have one prompt, so none has a mismatched answer; objective=kto needs two prompts"
        )
    mixed = []
    for i, example in enumerate(examples):
        other = i - 1  # -1 is the last one: the examples stand in a circle
        while prompts[other] == prompts[i]:
            other -= 1
        before = examples[other]
        answer = before["messages"][-1] if "messages" in before else {"content": before["completion"]}
        if "messages" in example:
            told = {**example, "messages": [*example["messages"][:-1], {"role": "assistant", **answer}]}
        else:
            told = {"prompt": example["prompt"], "completion": answer["content"]}
        mixed += [example, {**told, "id": f"{example['id']}#mismatched"}]
    encoded = encode_examples(mixed, tokenizer, "last_turn")
    return [encoded[i : i + 2] for i in range(0, len(encoded), 2)]


_ENCODERS = {
    "text": _encode_texts,
    "chat": _encode_chats,
    "any": _encode_any,
    "pairs": _encode_pairs,
    "labels": _encode_labels,
}


def pack(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Best-fit decreasing: indices of documents, row by row.

    >>> pack(np.array([3, 5, 2, 4]), capacity=7)
    [[1, 2], [3, 0]]
    """
    rows: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # room left -> rows
    open_rooms = 0  # bit r is set where by_room[r] is not empty
    for d in np.argsort(-lengths, kind="stable").tolist():
        size = int(lengths[d])
        fits = open_rooms >> size
        if fits:
            room = size + (fits & -fits).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                open_rooms &= ~(1 << room)
            rows[row].append(d)
        else:
            row, room = len(rows), capacity
            rows.append([d])
        left = room - size
        by_room[left].append(row)
        if left:
            open_rooms |= 1 << left
    return rows


def plan(table: TokenTable, capacity: int, seed: int) -> list[list[int]]:
    """Rows of document numbers: shuffled once, packed inside windows; each epoch then permutes the rows.

    The documents of a group stay together and in their order.
    """
    sizes = table.lengths.reshape(-1, table.group).sum(1)
    order = permute(np.arange(len(sizes)), len(sizes), key_of("plan", seed, table.fingerprint))
    rows = []
    for start in range(0, len(order), WINDOW):
        window = order[start : start + WINDOW]
        for row in pack(sizes[window], capacity):
            rows.append((window[row][:, None] * table.group + np.arange(table.group)).flatten().tolist())
    return rows
