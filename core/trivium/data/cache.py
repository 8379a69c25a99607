"""Tokenised data sets and their plans, kept between runs under the hash of everything they follow from.

Each array is a file that is mapped, not read: memory stays as it is however much there is. Every byte is hashed before
it is used. Of much data, several processes make the parts.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from trivium.data.loader import StepLoader
from trivium.data.packing import Chunks, Rows, plan_windows
from trivium.data.source import Source
from trivium.data.table import Ids, Joiner, Part, TokenTable, digest_of_arrays, table_from
from trivium.data.tokenizer import Tokenizer
from trivium.disk import cache_folder, digest_file, keep, kept, make_folder, sync_folder
from trivium.errors import CheckpointError

VERSION = 5
"""Of how text becomes documents, and documents rows; raise it when either makes others of the same source."""
FACTS = "facts.bin"
ALONE = 3.0
"""Seconds of tokenising after which, if there is as much again to do, other processes are asked to help."""
START = 0.5
"""Seconds that those take to start, about; so much is made here meanwhile."""
BLOCK = 1 << 20
DAY = 86_400.0


def cached_table(
    source: Source,
    tokenizer: Tokenizer,
    length: int,
    *,
    form: str,
    train_on: str,
    turns: str = "refuse",
    workers: int | None = None,
) -> TokenTable:
    """A source as documents, from the cache where it was tokenised in the same way before.

    workers: processes that tokenise, if there is much to do; one a core unless given. They change nothing else.
    """
    made_of = [VERSION, source.fingerprint, tokenizer.fingerprint, length, form, train_on, turns]
    folder = _folder("tables", made_of)
    if (table := _read(folder)) is None:
        chunks = Chunks(source, tokenizer, length, form, train_on, turns)
        count = _cores() if workers is None else workers
        _write(folder, lambda here: _write_table(here, _parts(chunks, count), length))
        table = _read(folder)
    assert table is not None, folder  # it was written and synced
    return table


def cached_plan(table: TokenTable, capacity: int, seed: int) -> Rows:
    """`plan`, from the cache where the same documents were packed in the same way before."""
    folder = _folder("plans", [VERSION, table.fingerprint, table.group, table.ends, capacity, seed])
    if (found := _mapped(folder)) is None:
        _write(folder, lambda here: _write_plan(here, plan_windows(table, capacity, seed)))
        found = _mapped(folder)
    assert found is not None, folder
    return Rows(found[0]["documents"], found[0]["ends"])


def _cores() -> int:
    """Those that this process may use; not every system says."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _folder(kind: str, made_of: list[Any]) -> Path:
    return cache_folder() / kind / hashlib.sha256(json.dumps(made_of).encode()).hexdigest()


def _write(folder: Path, fill: Callable[[Path], None]) -> None:
    """A folder whole or not at all. Another process that made the same meanwhile is as good."""
    temporary = make_folder(folder.with_name(f"{folder.name}.tmp-{os.getpid()}"))
    try:
        for left in folder.parent.glob("*.tmp-*"):  # by a killed process, of this machine or another
            if time.time() - max(path.stat().st_mtime for path in (left, *left.iterdir())) > DAY:
                shutil.rmtree(left, ignore_errors=True)
        fill(temporary)
        sync_folder(temporary)
        if folder.exists() and _mapped(folder) is None:  # damaged
            shutil.rmtree(folder)
        if not folder.exists():
            temporary.rename(folder)
            sync_folder(folder.parent)
    except OSError as error:
        if _mapped(folder) is None:
            raise CheckpointError(f"{folder} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class _Files:
    """Arrays that grow, each in a file of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[str, BinaryIO] = {}

    def append(self, arrays: Mapping[str, np.ndarray]) -> None:
        for name, values in arrays.items():
            if name not in self._open:
                self._open[name] = open(self.folder / f"{name}.bin", "wb")
            self._open[name].write(np.ascontiguousarray(values).data)

    def close(self) -> None:
        for file in self._open.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()
        self._open = {}

    def keep_facts(self, facts: Mapping[str, Any], kinds: Mapping[str, str]) -> None:
        """What the arrays are, and their hashes: by these a reader knows that nothing has changed."""
        files = {name: [kind, *digest_file(self.folder / f"{name}.bin")] for name, kind in kinds.items()}
        keep(self.folder / FACTS, json.dumps({"facts": facts, "files": files}).encode())


def _write_table(folder: Path, parts: Iterator[Part], length: int) -> None:
    files, joiner = _Files(folder), Joiner()
    kinds: dict[str, str] = {}
    try:
        for part in parts:
            grown = joiner.add(part)
            kinds = {name: values.dtype.str for name, values in grown.items()}
            files.append(grown)
    finally:
        files.close()
    arrays = {name: _map(folder, name, kind) for name, kind in kinds.items()}
    origins = joiner.finish(Ids(arrays["ids"], arrays["id_ends"], arrays["example"]), length)
    if origins:
        lookup, numbers = joiner.lookup(origins), arrays["origin"]
        for start in range(0, len(numbers), BLOCK):
            files.append({"named": lookup[numbers[start : start + BLOCK]]})
        files.close()
        os.replace(folder / "named.bin", folder / "origin.bin")
    else:
        (folder / "origin.bin").unlink()
        kinds.pop("origin")
    content = [arrays[name] for name in ("tokens", "trained", "offsets", "desirable") if name in arrays]
    files.keep_facts({**joiner.facts, "origins": origins, "fingerprint": digest_of_arrays(content)}, kinds)


def _write_plan(folder: Path, windows: Iterator[list[np.ndarray]]) -> None:
    files, end = _Files(folder), 0
    try:
        files.append({"ends": np.zeros(1, np.int64)})
        for rows in windows:
            sizes = np.fromiter(map(len, rows), np.int64, len(rows))
            files.append({"documents": np.concatenate(rows).astype(np.int64), "ends": end + np.cumsum(sizes)})
            end += int(sizes.sum())
    finally:
        files.close()
    files.keep_facts({}, {"documents": "<i8", "ends": "<i8"})


def _map(folder: Path, name: str, kind: str) -> np.ndarray:
    path = folder / f"{name}.bin"
    if not path.stat().st_size:  # nothing to map
        return np.empty(0, kind)
    return np.memmap(path, kind, "r")


def _mapped(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
    """The arrays and facts of a folder; None if it is not there, or a byte of it has changed."""
    content = kept(folder / FACTS)
    if content is None:
        return None
    told = json.loads(content)
    try:
        if any([*digest_file(folder / f"{name}.bin")] != said for name, (_, *said) in told["files"].items()):
            return None
        return {name: _map(folder, name, kind) for name, (kind, *_) in told["files"].items()}, told["facts"]
    except (CheckpointError, OSError):
        return None


def _read(folder: Path) -> TokenTable | None:
    found = _mapped(folder)
    return None if found is None else table_from(*found, found[0].get("origin"))


def _parts(chunks: Chunks, workers: int) -> Iterator[Part]:
    """The parts in order: made here, and by other processes once that turns out to take long."""
    began, done = time.monotonic(), 0
    for done in range(len(chunks)):
        spent = time.monotonic() - began
        if workers > 1 and spent > ALONE and len(chunks) > 2 * done and _travels(chunks):
            here = -(-done * START // max(spent, START))
            break
        yield chunks[done]
    else:
        return
    left = range(done, len(chunks))
    loader = StepLoader(chunks, left, workers=min(workers, len(left)), here=int(here))
    try:
        yield from loader
    finally:
        loader.close()


def _travels(chunks: Chunks) -> bool:
    """Whether another process can be given the source: one that holds an open file, say, cannot."""
    if type(chunks.source).__module__ == "__main__":  # which no other process imports
        return False
    try:
        pickle.dumps(chunks.source, protocol=5)
    except Exception:
        return False
    return True
