"""A data set of the Hugging Face hub as a source, through `datasets`; a folder in the same layout goes the same way.

`datasets` fetches the whole set and keeps it as Arrow, memory-mapped. With data.streaming the first data.max_rows rows
alone are read, into Arrow files in the cache that a stopped fetch goes on from. A set that needs somebody's code to be
run is refused by `datasets` itself (4 and later).
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from huggingface_hub import HfApi

from trivium.data.adapted import Adapted
from trivium.data.arrow import ArrowRows, open_arrow
from trivium.data.config import HubConfig
from trivium.disk import alone, cache_folder, digest_file, make_folder, replace_file, sweep
from trivium.errors import DataError, TriviumError

SHARD = 10_000
"""Streamed rows in one file: what a fetch that was stopped reads again at most."""
BATCH = 500
COMMIT = re.compile("[0-9a-f]{40}")


class HubRows(ArrowRows):
    """Rows whose name is the data set's and the split's."""

    @property
    def title(self) -> str:
        return self.path.parent.name


class Hub(Adapted):
    """One split of a data set, and as held-out data another or a share of it."""

    config: HubConfig

    def _open(self) -> list[list[str]]:
        config = self.config
        if not config.dataset:
            raise DataError(
                "domain=hub needs data.dataset=OWNER/NAME or a folder, or one of the known, such as dataset=gsm8k"
            )
        if COMMIT.fullmatch(config.revision) and Path(config.dataset).is_dir():
            raise DataError(
                f"data.dataset={config.dataset} is a folder, which has no commits; leave data.revision away, or name "
                "the data set as OWNER/NAME"
            )
        for name in ("datasets", "huggingface_hub", "fsspec"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # what is wrong is said once, by us
        datasets.disable_progress_bars()
        try:
            batches = self._streamed() if config.streaming else self._loaded()
        except TriviumError:
            raise
        except Exception as error:  # of the network, of a server, of the set itself: the library has one for each
            raise DataError(self._unreachable(error)) from error
        rows = HubRows(Path(config.dataset) / self._split, config.max_chars, batches)
        if not len(rows):
            raise DataError(f"{self._where} has no rows")
        schemas = self._add(rows, rows.columns)
        return [] if self._wants(schemas[0]) else [schemas]

    @property
    def _split(self) -> str:
        held_out = self.config.split != "train" and self.config.validation_split
        return self.config.validation_split if held_out else self.config.hub_split

    @property
    def _where(self) -> str:
        return f"data.dataset={self.config.dataset} (split {self._split})"

    @property
    def _shared(self) -> bool:
        return bool(self.config.validation_share) and not self.config.validation_split

    @property
    def notes(self) -> dict[str, Any]:
        """Rows as of every source, and which commit of the data set they are of, where that is known."""
        return {**super().notes, "dataset": self.config.dataset, "commit": self._commit}

    def _load(self, revision: str, **more: Any) -> Any:
        config = self.config
        return datasets.load_dataset(
            config.dataset,
            config.subset or None,
            split=self._split,
            revision=revision or None,
            cache_dir=str(cache_folder() / "datasets"),
            **more,
        )

    def _loaded(self) -> list[pa.RecordBatch]:
        wanted = self.config.revision
        found = self._load(wanted)
        self._commit = commit_of(file["filename"] for file in found.cache_files)
        if COMMIT.fullmatch(wanted) and self._commit != wanted:  # out of reach, `datasets` takes what it fetched last
            raise DataError(self._unreachable(LookupError(f"not commit {wanted}, only {self._commit or 'another'}")))
        table = found.data.table
        return table.slice(0, self.config.max_rows or None).to_batches()

    def _streamed(self) -> list[pa.RecordBatch]:
        config = self.config
        self._commit = self._resolved()
        made_of = [config.dataset, config.subset, self._split, self._commit, config.max_rows, SHARD]
        folder = cache_folder() / "hub" / hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:32]
        done = folder / "DONE"
        if not done.is_file():
            with alone(make_folder(folder)):
                if not done.is_file():  # another process was quicker
                    sweep(folder)
                    self._fetch(folder)
                    replace_file(done, b"")
        shards = (open_arrow(path, config.max_chars) for path in sorted(folder.glob("*.arrow")))
        return [batch for shard in shards for batch in shard.batches]

    def _fetch(self, folder: Path) -> None:
        """Shards, each with the state of the stream behind it; those that are whole are not read again."""
        revision = self._commit if COMMIT.fullmatch(self._commit) else self.config.revision
        stream = self._load(revision, streaming=True).with_format("arrow")
        number = done = 0
        while (state := folder / f"{number:05d}.json").is_file():
            said = json.loads(state.read_bytes())
            stream.load_state_dict(said["state"])
            number, done = number + 1, said["rows"]
        for shard in _shards(stream, self.config.max_rows - done):
            done += sum(batch.num_rows for batch in shard)
            replace_file(folder / f"{number:05d}.arrow", _as_file(shard))
            said = {"rows": done, "state": stream.state_dict()}
            replace_file(folder / f"{number:05d}.json", json.dumps(said).encode())
            number += 1

    def _resolved(self) -> str:
        """What the rows follow from: the commit of the revision, or of a folder the hash of what it holds."""
        config, place = self.config, Path(self.config.dataset)
        if place.is_dir():
            files = sorted(p for p in place.rglob("*") if p.is_file())
            said = [[p.relative_to(place).as_posix(), *digest_file(p)] for p in files]
            return hashlib.sha256(json.dumps(said).encode()).hexdigest()
        if COMMIT.fullmatch(config.revision):
            return config.revision
        return HfApi().dataset_info(config.dataset, revision=config.revision or None).sha or config.revision

    def _unreachable(self, error: BaseException) -> str:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        if Path(self.config.dataset).is_dir():
            return f"{self._where} cannot be read: {reason}"
        return (
            f"{self._where} cannot be had from the Hugging Face hub ({reason}); connect to a network and, for a gated "
            "set, log in with `hf auth login`; or fetch it elsewhere and set data.dataset to that folder"
        )


def _shards(stream: Any, most: int) -> Iterator[list[pa.RecordBatch]]:
    """At most so many rows of a stream, some thousands at a time."""
    waiting: list[pa.RecordBatch] = []
    if most <= 0:
        return
    for table in stream.iter(batch_size=BATCH):
        kept = table.slice(0, most)
        waiting += kept.combine_chunks().to_batches()
        most -= kept.num_rows
        if most <= 0:
            break
        if sum(batch.num_rows for batch in waiting) >= SHARD:
            yield waiting
            waiting = []
    if waiting:
        yield waiting


def _as_file(batches: list[pa.RecordBatch]) -> bytes:
    """Batches as an Arrow file; columns whose types differ are brought to one that holds both."""
    tables = [pa.Table.from_batches([batch]) for batch in batches]
    table = pa.concat_tables(tables, promote_options="permissive")
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def commit_of(files: Iterable[str]) -> str:
    """The commit whose rows these files are: `datasets` keeps those of each in a folder of its own.

    >>> commit_of(["datasets/openai___gsm8k/main/0.0.0/e53f048856ff4f594e959d75785d2c2d37b678ee/gsm8k-train.arrow"])
    'e53f048856ff4f594e959d75785d2c2d37b678ee'
    >>> commit_of(["datasets/sums/main-9f86d081884c7d65/0.0.0/f01aad97f78cdfbb/sums-train.arrow"])  # of a folder
    ''
    """
    names = (Path(file).parent.name for file in files)
    return next((name for name in names if COMMIT.fullmatch(name)), "")
