"""Token documents as flat arrays, in memory or mapped from files: what packing and batches are made from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trivium.errors import DataError

MOST_ORIGINS = 32
"""Names under which losses are counted apart; where examples have more, none is."""
NO_ORIGIN = MOST_ORIGINS + 1
KINDS = {"tokens": np.int32, "trained": np.bool_, "offsets": np.int64, "example": np.int64, "origin": np.int64,
         "ids": np.uint8, "id_ends": np.int64, "desirable": np.float32}  # fmt: skip
"""The arrays of a table, by name."""
COUNTS = ("num_bytes", "truncated", "lost_ends", "forked", "forks")
"""What a table's parts are added up to."""


class Ids(Sequence):
    """The id of each document, which is that of its example, out of arrays: `ids` holds all in UTF-8, one by one."""

    def __init__(self, ids: np.ndarray, id_ends: np.ndarray, example: np.ndarray) -> None:
        self._ids, self._ends, self._example = ids, id_ends, example

    def __len__(self) -> int:
        return len(self._example)

    def __getitem__(self, document: Any) -> Any:
        if isinstance(document, slice):
            return [self[d] for d in range(*document.indices(len(self)))]
        return self.of_example(int(self._example[document]))

    def of_example(self, number: int) -> str:
        """The id of an example, by its number in the source."""
        return self._ids[self._ends[number] : self._ends[number + 1]].tobytes().decode()

    def documents_before(self, example: int) -> int:
        """How many documents are of examples before this one."""
        return int(np.searchsorted(self._example, example))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]


@dataclass
class TokenTable:
    """Documents as one flat array. Document d is tokens[offsets[d]:offsets[d+1]]; `trained` is aligned with tokens.

    group: so many documents in a row belong together and share a row: 2 for the chosen and rejected of a pair.
    columns: by name, one fp32 figure for each document. origin: for each document the number of its name in `origins`,
    under which its loss is counted, or one more if it has none; None where all have the same. They change nothing that
    is learned. fingerprint: SHA-256 of tokens, trained, offsets and columns.
    """

    tokens: np.ndarray  # int32 (N,)
    trained: np.ndarray  # bool (N,)
    offsets: np.ndarray  # int64 (documents + 1,)
    ids: Sequence[str]
    num_bytes: int = 0
    truncated: int = 0  # documents cut at the row length
    lost_ends: int = 0  # of those, conversations whose last end-of-turn token went with it
    forked: int = 0  # conversations whose template rewrites earlier turns
    forks: int = 0  # documents that they became
    group: int = 1
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    origins: tuple[str, ...] = ()
    origin: np.ndarray | None = None  # int64 (documents,)
    talks: bool = False  # whether any example is a conversation
    fingerprint: str = ""
    ends: tuple[int, ...] = ()  # of a mixture, where each part's documents end: they are packed apart

    def __post_init__(self) -> None:
        if not self.fingerprint:
            content = (self.tokens, self.trained, self.offsets, *(self.columns[k] for k in sorted(self.columns)))
            self.fingerprint = digest_of_arrays(content)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document."""
        return np.diff(self.offsets)

    def document(self, d: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and mask of document `d`."""
        here = slice(self.offsets[d], self.offsets[d + 1])
        return self.tokens[here], self.trained[here]


def digest_of_arrays(arrays: Iterable[np.ndarray]) -> str:
    """SHA-256 of their bytes, one after the other."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


@dataclass
class Part:
    """What some examples in a row become. names: the id of each; origins: the name of each.

    arrays: tokens, trained, and for each document its length (`lengths`), its example's number among these (`example`)
    and maybe `desirable`. truncated, lost_ends, forked, forks, num_bytes: see TokenTable.
    """

    names: list[str]
    origins: list[str]
    arrays: dict[str, np.ndarray]
    num_bytes: int = 0
    truncated: int = 0
    lost_ends: int = 0
    forked: int = 0
    forks: int = 0
    group: int = 1
    talks: bool = False


class Joiner:
    """Parts, one after the other, to what a table's arrays grow by; then the table's facts.

    It holds a hash of each id, so that two examples of one id are found, and nothing else that grows with the data.
    """

    def __init__(self) -> None:
        self.facts: dict[str, Any] = {**dict.fromkeys(COUNTS, 0), "group": 1, "talks": False}
        self._examples = self._tokens = self._id_bytes = 0
        self._learns = False
        self._hashes: list[np.ndarray] = []
        self._numbers: dict[str, int] = {"": NO_ORIGIN}  # a name's number, by when it came
        self._unnamed = self._many = False

    def add(self, part: Part) -> dict[str, np.ndarray]:
        """What each array grows by. Those that say where things end begin with 0, once."""
        first = self._examples == 0
        lengths, names = part.arrays["lengths"], [name.encode() for name in part.names]
        grown = {key: values for key, values in part.arrays.items() if key != "lengths"}
        grown["example"] = part.arrays["example"] + self._examples
        grown["offsets"] = _ends(lengths, self._tokens, first)
        grown["ids"] = np.frombuffer(b"".join(names), np.uint8)
        grown["id_ends"] = _ends(np.fromiter(map(len, names), np.int64, len(names)), self._id_bytes, first)
        grown["origin"] = np.fromiter(map(self._number, part.origins), np.int64, len(names))[part.arrays["example"]]
        self._hashes.append(np.fromiter(map(hash, part.names), np.int64, len(names)))
        for key in COUNTS:
            self.facts[key] += getattr(part, key)
        self.facts["group"] = part.group
        self.facts["talks"] |= part.talks
        starts = grown["offsets"][:-1] - self._tokens if first else grown["offsets"] - lengths - self._tokens
        targets = part.arrays["trained"].copy()
        targets[starts] = False  # nothing comes before a document's first token
        self._learns |= bool(targets.any())
        self._examples += len(names)
        self._tokens += int(lengths.sum())
        self._id_bytes += len(grown["ids"])
        return {key: values.astype(KINDS[key], copy=False) for key, values in grown.items()}

    def finish(self, ids: Ids, length: int) -> tuple[str, ...]:
        """The names under which losses are counted, in the order of `lookup`; none where all are under one, or too
        many. Raises DataError where two examples share an id, or nothing would be learned from.
        """
        self._check_ids(ids)
        if not self._learns:
            raise DataError(
                f"no token of {self._examples} examples would be trained on; raise batch.length={length} or look at "
                "the data"
            )
        named = [name for name in self._numbers if name]
        return () if self._many or len(named) + self._unnamed < 2 else tuple(sorted(named))

    def lookup(self, origins: Sequence[str]) -> np.ndarray:
        """An origin's number as `add` gave it -> its number in `origins`."""
        found = np.full(NO_ORIGIN + 1, len(origins), np.int64)
        for name, number in self._numbers.items():
            if name:
                found[number] = origins.index(name)
        return found

    def _number(self, name: str) -> int:
        if not name:
            self._unnamed = True
        elif name not in self._numbers:
            if self._many or len(self._numbers) > MOST_ORIGINS:
                self._many = True
                return NO_ORIGIN
            self._numbers[name] = len(self._numbers) - 1
        return self._numbers[name]

    def _check_ids(self, ids: Ids) -> None:
        hashes = np.concatenate(self._hashes)
        order = np.argsort(hashes, kind="stable")
        same = np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]])
        for one, other in zip(order[same], order[same + 1], strict=True):
            if (name := ids.of_example(one)) == ids.of_example(other):
                raise DataError(f"two examples have the id {name!r}; a source must give each its own")


def _ends(sizes: np.ndarray, start: int, first: bool) -> np.ndarray:
    ends = start + np.cumsum(sizes)
    return np.concatenate(([0], ends)) if first else ends


def joined(parts: Iterable[Part], length: int) -> TokenTable:
    """A table in memory."""
    joiner = Joiner()
    grown = [joiner.add(part) for part in parts]
    arrays = {key: np.concatenate([g[key] for g in grown]) for key in grown[0]}
    ids = Ids(arrays["ids"], arrays["id_ends"], arrays["example"])
    origins = joiner.finish(ids, length)
    origin = joiner.lookup(origins)[arrays["origin"]] if origins else None
    return table_from(arrays, {**joiner.facts, "origins": origins}, origin)


def table_from(arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any], origin: np.ndarray | None) -> TokenTable:
    """A table of its arrays by name, and of its other fields."""
    columns = {"desirable": arrays["desirable"]} if "desirable" in arrays else {}
    ids = Ids(arrays["ids"], arrays["id_ends"], arrays["example"])
    more = {**facts, "origins": tuple(facts["origins"])}
    tokens, trained, offsets = arrays["tokens"], arrays["trained"], arrays["offsets"]
    return TokenTable(tokens, trained, offsets, ids, columns=columns, origin=origin, **more)
