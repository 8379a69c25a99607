"""Vectors of passages, kept by content, and the nearest of them to a query: what phase=search asks.

Each file's passages and vectors are one entry, whose name is the hash of all that decides them: the file's bytes, how
it is cut, and the encoder. So what is unchanged is never computed again, what has changed has another name, and no
vector can be taken for another encoder's. The index over all entries is faiss's (Douze et al. 2024,
https://arxiv.org/abs/2401.08281) and is made from them, so it can always be made again.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from trivium.data.passages import Passage
from trivium.disk import keep, kept
from trivium.errors import ConfigError

VERSION = 1
"""Of how entries and the index are written."""
INSTALL = 'phase=search needs faiss: pip install "trivium-llm[search]"'
KINDS = {"exact": "Flat", "hnsw": "HNSW32"}
"""search.index, and what faiss calls it."""
BREADTH = 200
"""Of a search in the graph, and of its making: more misses fewer and takes longer."""


class Entry(NamedTuple):
    """The passages of a file and their vectors, (N, C) fp32."""

    passages: list[Passage]
    vectors: np.ndarray


class Hit(NamedTuple):
    """A passage that was found. number: its place among all. score: the similarity."""

    number: int
    score: float


def write_entry(path: Path, entry: Entry) -> None:
    """Keep an entry, with a digest that `read_entry` checks."""
    head = json.dumps([asdict(p) for p in entry.passages], ensure_ascii=False).encode()
    keep(path, head + b"\n" + entry.vectors.astype("<f4").tobytes())


def read_entry(path: Path, width: int) -> Entry | None:
    """What `write_entry` kept there; None if there is nothing, or if a byte of it has changed."""
    content = kept(path)
    if content is None:
        return None
    head, _, rest = content.partition(b"\n")
    passages = [Passage(**p) for p in json.loads(head)]
    return Entry(passages, np.frombuffer(rest, "<f4").reshape(len(passages), width))


class VectorIndex:
    """faiss's index over vectors of one width. Scores are cosines, or dot products where the encoder wants those."""

    def __init__(self, inner: Any, similarity: str) -> None:
        self._inner, self.similarity = inner, similarity

    @classmethod
    def of(cls, vectors: np.ndarray, kind: str, similarity: str) -> VectorIndex:
        """Over (N, C) fp32. kind: of KINDS. Raises ConfigError without faiss."""
        faiss = _faiss()
        inner = faiss.index_factory(vectors.shape[1], KINDS[kind], faiss.METRIC_INNER_PRODUCT)
        if kind == "hnsw":
            inner.hnsw.efConstruction = inner.hnsw.efSearch = BREADTH
        made = cls(inner, similarity)
        inner.add(made._ready(vectors))
        return made

    def _ready(self, vectors: np.ndarray | Tensor) -> np.ndarray:
        found = np.ascontiguousarray(vectors, dtype=np.float32)
        if self.similarity == "dot":
            return found
        lengths = np.linalg.norm(found, axis=1, keepdims=True)
        return found / np.where(lengths > 0, lengths, 1)

    def __len__(self) -> int:
        return self._inner.ntotal

    def nearest(self, query: np.ndarray | Tensor, count: int) -> list[Hit]:
        """The `count` vectors that are most similar to (C,), the most similar first."""
        scores, numbers = self._inner.search(self._ready(np.asarray(query)[None]), min(count, len(self)))
        pairs = zip(numbers[0].tolist(), scores[0].tolist(), strict=True)
        return [Hit(number, score) for number, score in pairs if number >= 0]

    def save(self, path: Path, made_of: str) -> None:
        """Keep it, with a digest that `load` checks. made_of: says which vectors these are."""
        keep(path, made_of.encode() + b"\n" + _faiss().serialize_index(self._inner).tobytes())

    @classmethod
    def load(cls, path: Path, similarity: str, made_of: str) -> VectorIndex | None:
        """What `save` kept; None if there is nothing, if a byte of it has changed, or if it is of other vectors."""
        content, head = kept(path), made_of.encode() + b"\n"
        if content is None or not content.startswith(head):
            return None
        return cls(_faiss().deserialize_index(np.frombuffer(content, np.uint8, offset=len(head))), similarity)


def _faiss() -> Any:
    if find_spec("faiss") is None:
        raise ConfigError(INSTALL)
    import faiss

    return faiss
