"""Examples to token documents, documents to rows.

Best-fit decreasing (Ding et al. 2024, https://arxiv.org/abs/2404.10830): documents stay whole where they fit, rows are
almost full, and attention never crosses a document border. One policy for documents longer than a row: `split` for
text (every token but a document's first is a target, once), `truncate` for conversations (counted and reported,
end-of-turn losses apart).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from trivium.data.chat import Chat, Encoded
from trivium.data.position import key_of, permute
from trivium.data.source import FORM_WORDS, Example, Source, form_of, prompt_of
from trivium.data.table import Part, TokenTable, joined
from trivium.data.tokenizer import Tokenizer
from trivium.errors import DataError

WINDOW = 8192
"""Documents packed together: enough for full rows, few enough that a plan never needs the whole corpus."""

CHUNK = 256
"""Examples that are tokenised together."""
JUDGED = ("pairs", "labels")
"""What is read two answers at a time, that share a row."""
BATCH = 1_000_000


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
    turns: str = "refuse",
) -> TokenTable:
    """Tokenise a whole source, or some examples, into documents that fit rows of `length` tokens, in memory.

    form: what an objective reads: "text", "chat", "pairs", "labels", or "any" of text and chat. turns: what becomes of
    conversations whose template rewrites earlier turns, see `Chat.documents`. Raises DataError for examples of another
    form, naming the first, and when nothing would be trained on.
    """
    chunks = Chunks(source, tokenizer, length, form, train_on, turns)
    return joined((chunks[n] for n in range(len(chunks))), length)


class Chunks(Sequence):
    """The examples of a source, CHUNK at a time, as what they become: a pure function of the chunk's number."""

    def __init__(
        self,
        source: Source | Sequence[Example],
        tokenizer: Tokenizer,
        length: int,
        form: str,
        train_on: str,
        turns: str = "refuse",
    ) -> None:
        if not len(source):
            split = f" (split={source.config.split})" if isinstance(source, Source) else ""
            raise DataError(f"the data set is empty{split}")
        if form not in _ENCODERS:
            raise DataError(f"this objective reads {FORM_WORDS.get(form, form)}, and nothing makes tokens of that yet")
        self.source, self.tokenizer, self.length, self.form = source, tokenizer, length, form
        self.train_on, self.turns = train_on, turns
        # a judged answer is told apart from others' answers, so that all labels must be seen at once
        self.size = len(source) if form == "labels" else CHUNK

    def __len__(self) -> int:
        return -(-len(self.source) // self.size)

    def __getitem__(self, number: Any) -> Part:
        if not 0 <= number < len(self):
            raise IndexError(number)
        last = min(len(self.source), (number + 1) * self.size)
        examples = [self.source[i] for i in range(number * self.size, last)]
        wanted = {"any": ("text", "chat", "answers"), "chat": ("chat", "answers")}.get(self.form, (self.form,))
        for example in examples:
            if form_of(example) not in wanted:
                raise DataError(
                    f"example {example['id']} has {', '.join(k for k in example if k != 'id')}; "
                    f"this objective needs {FORM_WORDS[wanted[0]]}"
                )
        origin = self.source.origin if isinstance(self.source, Source) else lambda _: ""
        part = Part([e["id"] for e in examples], [origin(e) for e in examples], {})
        part.num_bytes = sum(len(e["text"].encode()) for e in examples if "text" in e)
        part.talks = any("text" not in e and "prompt" not in e for e in examples)
        self._fill(part, examples, _ENCODERS[self.form](examples, self.tokenizer, self.train_on, self.turns))
        return part

    def sample_id(self, number: int) -> str:
        """The id of a chunk's first example."""
        return self.source[number * self.size]["id"]

    def _fill(self, part: Part, examples: Sequence[Example], encoded: Sequence[Sequence[Encoded]]) -> None:
        """Cut documents to the rows' length, and put them into arrays."""
        part.group = 2 if self.form in JUDGED else 1
        most = self.length // part.group
        tokens, trained, lengths, numbers = [], [], [], []
        units = [  # what is kept or left out as one: both sides of a pair, each document of a conversation
            (number, documents[i : i + part.group])
            for number, documents in enumerate(encoded)
            for i in range(0, len(documents), part.group)
        ]
        forked = [len(documents) for documents in encoded if any(d.turns for d in documents)]
        part.forked, part.forks = len(forked), sum(forked)
        for number, unit in units:
            if "text" in examples[number]:
                pieces = [piece for document in unit for piece in _split(document, self.length)]
            else:
                pieces = [Encoded(d.ids[:most], d.trained[:most]) for d in unit]
                cut = [d for d in unit if len(d.ids) > most]
                part.truncated += len(cut)
                part.lost_ends += sum(d.trained[-1] or self.tokenizer.eot_id in d.ids[most:] for d in cut)
                if cut and not all(any(p.trained[1:]) for p in pieces):
                    continue  # nothing left to learn from: counted above
            tokens += [np.array(p.ids, np.int32) for p in pieces]
            trained += [np.array(p.trained, np.bool_) for p in pieces]
            lengths += [len(p.ids) for p in pieces]
            numbers += [number] * len(pieces)
        part.arrays = {
            "tokens": np.concatenate([np.empty(0, np.int32), *tokens]),
            "trained": np.concatenate([np.empty(0, np.bool_), *trained]),
            "lengths": np.array(lengths, np.int64),
            "example": np.array(numbers, np.int64),
        }
        if self.form == "labels":
            part.arrays["desirable"] = np.array([float(examples[n]["label"]) for n in numbers], np.float32)


def _split(document: Encoded, length: int) -> list[Encoded]:
    """A long text in pieces that share one token: the last of one is what the next one's first target follows from."""
    starts = range(0, len(document.ids) - 1, length - 1)
    return [Encoded(document.ids[s : s + length], document.trained[s : s + length]) for s in starts]


def _batches(examples: Sequence[Example]) -> Iterator[list[str]]:
    """Their texts, about BATCH characters at a time: what is encoded together takes many times its size."""
    batch, size = [], 0
    for example in examples:
        batch.append(example["text"])
        size += len(example["text"])
        if size > BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _text(ids: list[int], tokenizer: Tokenizer) -> Encoded:
    whole = np.array([*tokenizer.start, *ids, tokenizer.eos_id], np.int32)
    return Encoded(whole, np.ones(len(whole), np.bool_))  # type: ignore[arg-type]  # a list would take ten times as much


def encode_examples(examples: Sequence[Example], tokenizer: Tokenizer, train_on: str) -> list[Encoded]:
    """Conversations through the template; prompt/completion pairs as plain text ending in the end-of-text token."""
    return [document for [document] in encode_turns(examples, tokenizer, train_on, "refuse")]


def encode_turns(
    examples: Sequence[Example], tokenizer: Tokenizer, train_on: str, turns: str = "refuse"
) -> list[list[Encoded]]:
    """`encode_examples`, to the documents of each example: a conversation may be forked (see `Chat.documents`)."""
    chat = Chat(tokenizer)
    talks = [e for e in examples if "messages" in e]
    pairs = [e for e in examples if "messages" not in e]
    encoded = dict(zip((e["id"] for e in talks), chat.encode_turns(talks, train_on, turns), strict=True))
    prompts = tokenizer.encode_batch([e["prompt"] for e in pairs])
    completions = tokenizer.encode_batch([e["completion"] for e in pairs])
    for example, prompt, completion in zip(pairs, prompts, completions, strict=True):
        ids = [*tokenizer.start, *prompt, *completion, tokenizer.eos_id]
        num_prompt = 0 if train_on == "all" else len(ids) - len(completion) - 1
        encoded[example["id"]] = [Encoded(ids, [i >= num_prompt for i in range(len(ids))])]
    return [encoded[e["id"]] for e in examples]


def _encode_texts(examples: Sequence[Example], tokenizer: Tokenizer, *_: str) -> list[list[Encoded]]:
    return [[_text(ids, tokenizer)] for batch in _batches(examples) for ids in tokenizer.encode_batch(batch)]


def _encode_any(examples: Sequence[Example], tokenizer: Tokenizer, train_on: str, turns: str) -> list[list[Encoded]]:
    texts, chats = [e for e in examples if "text" in e], [e for e in examples if "text" not in e]
    found = iter(_encode_texts(texts, tokenizer)), iter(encode_turns(chats, tokenizer, train_on, turns))
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


def said_in(example: Example) -> str:
    """All text of an example."""
    if "text" in example:
        return example["text"]
    if "messages" in example:
        return "\n".join(m.get("content") or "" for m in example["messages"])
    if "chosen" in example:
        return "\n".join(map(said_in, pair_sides(example)))
    if "completions" in example:
        return "\n".join([example["prompt"], *example["completions"]])
    return example["prompt"] + example["completion"]


def _encode_pairs(examples: Sequence[Example], tokenizer: Tokenizer, *_: str) -> list[list[Encoded]]:
    """What is compared is each side's last turn."""
    encoded = encode_examples([side for e in examples for side in pair_sides(e)], tokenizer, "last_turn")
    pairs = [encoded[i : i + 2] for i in range(0, len(encoded), 2)]
    for example, (chosen, rejected) in zip(examples, pairs, strict=True):
        if chosen.ids == rejected.ids:
            raise DataError(f"example {example['id']}: chosen and rejected are the same")
    return pairs


def _encode_labels(examples: Sequence[Example], tokenizer: Tokenizer, *_: str) -> list[list[Encoded]]:
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
    "chat": encode_turns,
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


class Rows(Sequence):
    """The rows of a plan as two arrays; row r is an array of document numbers."""

    def __init__(self, documents: np.ndarray, ends: np.ndarray) -> None:
        """ends: (rows + 1,), where each row's documents end; 0 before the first."""
        self.documents, self.ends = documents, ends

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, row: Any) -> Any:
        if not -len(self) <= row < len(self):
            raise IndexError(row)
        return self.documents[self.ends[row] : self.ends[row + 1]] if row >= 0 else self[len(self) + row]

    def counts(self, ends: Sequence[int]) -> list[int]:
        """How many rows are of each part, whose documents end there."""
        firsts = self.documents[self.ends[:-1]]
        return np.diff([0, *(int((firsts < end).sum()) for end in ends)]).tolist()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Rows):
            return False
        return np.array_equal(self.ends, other.ends) and np.array_equal(self.documents, other.documents)

    __hash__ = None  # type: ignore[assignment]


def plan(table: TokenTable, capacity: int, seed: int) -> Rows:
    """Rows of document numbers: shuffled once, packed inside windows; each epoch then permutes the rows.

    The documents of a group stay together and in their order.
    """
    documents, sizes = [], [0]
    for some in plan_windows(table, capacity, seed):
        documents += some
        sizes += map(len, some)
    return Rows(np.concatenate(documents), np.cumsum(sizes))


def plan_windows(table: TokenTable, capacity: int, seed: int) -> Iterator[list[np.ndarray]]:
    """The rows of a plan, a window at a time: no more than a window is held. Parts of a mixture share no row."""
    group, key, first = table.group, key_of("plan", seed, table.fingerprint), 0
    for last in (end // group for end in table.ends or (len(table.offsets) - 1,)):
        count = last - first
        for start in range(0, count, WINDOW):
            window = first + permute(np.arange(start, min(start + WINDOW, count)), count, key)
            sizes = table.offsets[(window + 1) * group] - table.offsets[window * group]
            inside = np.arange(group)
            yield [(window[row][:, None] * group + inside).flatten() for row in pack(sizes, capacity)]
        first = last
