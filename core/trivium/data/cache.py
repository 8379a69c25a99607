"""Tokenised data sets, kept between runs under the hash of everything they follow from."""

from __future__ import annotations

import hashlib
import json

import numpy as np
from safetensors.numpy import load, save

from trivium.data.packing import TokenTable, tokenise
from trivium.data.source import Source
from trivium.data.tokenizer import Tokenizer
from trivium.disk import cache_folder, keep, kept

VERSION = 3
"""Of how text becomes documents; raise it when `tokenise` makes others of the same source."""


def cached_table(source: Source, tokenizer: Tokenizer, length: int, *, form: str, train_on: str) -> TokenTable:
    """`tokenise`, from the cache where the same source was tokenised in the same way before."""
    made_of = [VERSION, source.fingerprint, tokenizer.fingerprint, length, form, train_on]
    path = cache_folder() / "tables" / f"{hashlib.sha256(json.dumps(made_of).encode()).hexdigest()}.bin"
    content = kept(path)
    if content is not None:
        return _read(content)
    table = tokenise(source, tokenizer, length, form=form, train_on=train_on)
    keep(path, _write(table))
    return table


def _write(table: TokenTable) -> bytes:
    facts = [table.ids, table.num_bytes, table.truncated, table.lost_ends, table.group, table.origins]
    arrays = {"tokens": table.tokens, "trained": table.trained, "offsets": table.offsets}
    if table.origin is not None:
        arrays["origin"] = table.origin
    arrays |= {f"column {name}": values for name, values in table.columns.items()}
    return save({**arrays, "facts": np.frombuffer(json.dumps(facts).encode(), np.uint8)})


def _read(content: bytes) -> TokenTable:
    arrays = load(content)
    ids, num_bytes, truncated, lost_ends, group, origins = json.loads(arrays.pop("facts").tobytes())
    columns = {name.removeprefix("column "): arrays.pop(name) for name in list(arrays) if name.startswith("column ")}
    tokens, trained, offsets = arrays["tokens"], arrays["trained"], arrays["offsets"]
    shown = tuple(origins), arrays.get("origin")
    return TokenTable(tokens, trained, offsets, ids, num_bytes, truncated, lost_ends, group, columns, *shown)
