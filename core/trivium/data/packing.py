"""Examples to token documents, documents to rows.

Best-fit decreasing (Ding et al. 2024, https://arxiv.org/abs/2404.10830): documents stay whole where they fit, rows are
almost full, and attention never crosses a document border. One policy for documents longer than a row: `split` for
text (every token but a document's first is a target, once), `truncate` for conversations (counted and reported,
end-of-turn losses apart).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np

from trivium.data.chat import Chat, Encoded
from trivium.data.position import key_of, permute
from trivium.data.source import Source
from trivium.data.tokenizer import Tokenizer
from trivium.errors import DataError

WINDOW = 8192
"""Documents packed together: enough for full rows, few enough that a plan never needs the whole corpus."""


@dataclass
class TokenTable:
    """Documents as one flat array. Document d is tokens[offsets[d]:offsets[d+1]]; `trained` is aligned with tokens."""

    tokens: np.ndarray  # int32 (N,)
    trained: np.ndarray  # bool (N,)
    offsets: np.ndarray  # int64 (documents + 1,)
    ids: list[str]
    num_bytes: int = 0
    truncated: int = 0  # documents cut at the row length
    lost_ends: int = 0  # of those, conversations whose last end-of-turn token went with it
    fingerprint: str = field(default="")

    def __post_init__(self) -> None:
        digest = hashlib.sha256()
        for array in (self.tokens, self.trained, self.offsets):
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


def tokenise(
    source: Source, tokenizer: Tokenizer, length: int, *, chats: bool, train_on: str = "assistant"
) -> TokenTable:
    """Tokenise a whole source into documents of at most `length` tokens.

    chats: expect conversations or prompt/completion (tuning), else text (pretraining). Raises DataError for examples
    of the other form, naming the first, and when nothing would be trained on.
    """
    if not len(source):
        raise DataError(f"the data set is empty (split={source.config.split})")
    examples = [source[i] for i in range(len(source))]
    seen: set[str] = set()
    for example in examples:
        if example["id"] in seen:
            raise DataError(f"two examples have the id {example['id']!r}; a source must give each its own")
        seen.add(example["id"])
    for example in examples:
        form = "text" if "text" in example else "chat"
        if form != ("chat" if chats else "text"):
            wanted = "messages or prompt and completion" if chats else "text"
            raise DataError(
                f"example {example['id']} has {', '.join(k for k in example if k != 'id')}; this phase needs {wanted}"
            )
    if chats:
        encoded = encode_examples(examples, tokenizer, train_on)
    else:
        texts = tokenizer.encode_batch([e["text"] for e in examples])
        encoded = [_text(ids, tokenizer) for ids in texts]
    tokens, trained, lengths, ids = [], [], [], []
    truncated = lost_ends = 0
    for example, document in zip(examples, encoded, strict=True):
        if chats and len(document.ids) > length:
            truncated += 1
            lost_ends += document.trained[-1] or tokenizer.eot_id in document.ids[length:]
            document = Encoded(document.ids[:length], document.trained[:length])
            if not any(document.trained[1:]):
                continue  # nothing left to learn from: counted above
        # pieces of a long text share one token: the last of one is what the next one's first target follows from
        for start in range(0, len(document.ids) - 1, length - 1):
            piece = document.ids[start : start + length]
            tokens.append(np.asarray(piece, dtype=np.int32))
            trained.append(np.asarray(document.trained[start : start + length], dtype=bool))
            lengths.append(len(piece))
            ids.append(example["id"])
    if not ids or not any(t[1:].any() for t in trained):
        raise DataError(
            f"no token of {len(examples)} examples would be trained on; raise batch.length={length} or look at the data"
        )
    num_bytes = sum(len(e["text"].encode()) for e in examples) if not chats else 0
    offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
    return TokenTable(np.concatenate(tokens), np.concatenate(trained), offsets, ids, num_bytes, truncated, lost_ends)


def _text(ids: list[int], tokenizer: Tokenizer) -> Encoded:
    whole = [tokenizer.bos_id, *ids, tokenizer.eos_id]
    return Encoded(whole, [True] * len(whole))


def encode_examples(examples: list, tokenizer: Tokenizer, train_on: str) -> list[Encoded]:
    """Conversations through the template; prompt/completion pairs as plain text ending in the end-of-text token."""
    chat = Chat(tokenizer)
    talks = [e for e in examples if "messages" in e]
    pairs = [e for e in examples if "messages" not in e]
    encoded = dict(zip((e["id"] for e in talks), chat.encode(talks, train_on), strict=True))
    prompts = tokenizer.encode_batch([e["prompt"] for e in pairs])
    completions = tokenizer.encode_batch([e["completion"] for e in pairs])
    for example, prompt, completion in zip(pairs, prompts, completions, strict=True):
        ids = [tokenizer.bos_id, *prompt, *completion, tokenizer.eos_id]
        num_prompt = 0 if train_on == "all" else len(prompt) + 1
        encoded[example["id"]] = Encoded(ids, [i >= num_prompt for i in range(len(ids))])
    return [encoded[e["id"]] for e in examples]


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
    """Rows of document numbers: shuffled once, packed inside windows; each epoch then permutes the rows."""
    order = permute(np.arange(len(table.ids)), len(table.ids), key_of("plan", seed, table.fingerprint))
    rows = []
    for start in range(0, len(order), WINDOW):
        window = order[start : start + WINDOW]
        rows += [window[row].tolist() for row in pack(table.lengths[window], capacity)]
    return rows
