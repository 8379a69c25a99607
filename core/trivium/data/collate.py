"""Documents to a batch: the only place where labels, positions and segments are made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from trivium.data.table import TokenTable
from trivium.types import IGNORE, TokenBatch


def collate(
    table: TokenTable,
    rows: Sequence[Sequence[int]],
    length: int,
    pad_id: int,
    batch: type[TokenBatch] = TokenBatch,
    **facts: Any,
) -> TokenBatch:
    """Rows of document numbers -> (B, length) batch of a type, whose fields the table's columns and `facts` fill.

    Positions restart at 0 in each document; the first label of each document is -100; padding has segment 0, label
    -100 and position 0. `segments` is None when every row is one whole document, the fast path of attention.
    """
    shape = (len(rows), length)
    tokens, labels = np.full(shape, pad_id, np.int64), np.full(shape, IGNORE, np.int64)
    positions, segments = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    for b, row in enumerate(rows):
        start = 0
        for number, d in enumerate(row, start=1):
            ids, trained = table.document(d)
            here = slice(start, start + len(ids))
            tokens[b, here] = ids
            labels[b, here] = np.where(trained, ids, IGNORE)
            labels[b, start] = IGNORE
            positions[b, here] = np.arange(len(ids))
            segments[b, here] = number
            start += len(ids)
    plain = bool((segments == 1).all())
    columns = {name: torch.from_numpy(by_segment(values, rows)) for name, values in table.columns.items()}
    if table.origin is not None:
        facts |= {"origins": table.origins, "origin": torch.from_numpy(by_segment(table.origin, rows))}
    return batch(
        torch.from_numpy(tokens),
        torch.from_numpy(labels),
        torch.from_numpy(positions),
        None if plain else torch.from_numpy(segments),
        **columns,
        **facts,
    )


def by_segment(values: np.ndarray, rows: Sequence[Sequence[int]]) -> np.ndarray:
    """One figure a document -> (B, S): column s-1 of a row is its segment s, 0 where it has fewer."""
    out = np.zeros((len(rows), max(map(len, rows))), values.dtype)
    for b, row in enumerate(rows):
        out[b, : len(row)] = values[row]
    return out
