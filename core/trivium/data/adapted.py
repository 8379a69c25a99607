"""A source of somebody's rows: read, adapted to examples, bad ones refused or counted, a share of them held out."""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from trivium.data.arrow import ArrowRows
from trivium.data.checkers import READERS, is_right
from trivium.data.config import RowsConfig
from trivium.data.messages import misfit
from trivium.data.readers import CsvRecords
from trivium.data.rows import LostError, RowError, Rows, Slices
from trivium.data.schemas import ADAPTERS, FORM_OF, VERDICTS, schemas_of
from trivium.data.source import FORM_WORDS, READS, Example, Source, WrongForm, form_of, prompt_of, split_of
from trivium.disk import cache_folder, digest_file, keep, kept
from trivium.errors import DataError
from trivium.registry import near_misses
from trivium.types import Score

VERSION = 1
"""Of how rows become examples; raise it when others are made of the same bytes."""
PEEKED = 64
"""Rows whose columns together say which schema a file has."""


class Table(NamedTuple):
    """Rows with the schema they are read by."""

    rows: Rows
    schema: str


class Looked(NamedTuple):
    """What a reading of all rows finds. mine: rows of this split. said: SHA-256 of their examples."""

    mine: array
    read: int
    said: bytes


class Adapted(Source):
    """Rows of tables that a subclass opens. Every row is read once at the start, so a bad one is found before training
    is; then it is read again when it is asked for. What was found of a file is kept under the hash of its bytes."""

    phases: ClassVar[frozenset[str]] = frozenset(
        {"tokenizer", "pretrain", "sft", "preference", "reward", "rlhf", "distill", "evaluate"}
    )
    config: RowsConfig

    def __init__(self, config: RowsConfig) -> None:
        super().__init__(config)
        self._tables: list[Table] = []
        self._mine: list[Sequence[int]] = []
        self._ends: list[int] = []
        self._skipped: Counter[str] = Counter()
        self._lost: Counter[str] = Counter()
        self._left_out: Counter[str] = Counter()
        self._first_bad: RowError | None = None
        self._num_read = 0
        self._renamed = [(new, old) for new, _, old in (pair.partition("=") for pair in config.columns)]
        self._digest = hashlib.sha256()
        left_out = self._open()
        if not self._tables:
            raise WrongForm(self._unwanted(left_out))
        if not len(self):
            raise self._first_bad if self._first_bad and not self._num_read else DataError(self._nothing())
        self._fingerprint = self._digest.hexdigest()
        del self._digest, self._first_bad  # no process can be given them, and tokens are made by several

    @abstractmethod
    def _open(self) -> list[list[str]]:
        """`_add` every table; returns the schemas of those that were not wanted."""

    @property
    @abstractmethod
    def _where(self) -> str:
        """What the rows come from, for errors."""

    @property
    def _shared(self) -> bool:
        """Whether held-out rows are a share of the same rows."""
        return bool(self.config.validation_share)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"{self._where} has examples 0 to {len(self) - 1}, not {index}")
        which = bisect_right(self._ends, index)
        mine = self._mine[which]
        found = self._example(self._tables[which], mine[index - self._ends[which] + len(mine)])
        assert found is not None  # it was there when it was counted
        return found

    @property
    def notes(self) -> dict[str, Any]:
        """How many rows were read, which were skipped for what reason or lost in what part, and what was left out."""
        found: dict[str, Any] = {"rows": self._num_read}
        found |= {"skipped": dict(sorted(self._skipped.items()))} if self._skipped else {}
        found |= {"lost": dict(self._lost)} if self._lost else {}
        return found | ({"left_out": dict(sorted(self._left_out.items()))} if self._left_out else {})

    def origin(self, example: Example) -> str:
        """Its task or its file; of source code the language, by the file's ending."""
        file, _, row = example["id"].rpartition(":")
        return example.get("task") or (Path(file).name if row.isdigit() else Path(example["id"]).suffix)

    def expect(self, phase: str) -> None:
        """Refuse what `phase` cannot use, and steps everywhere: no objective learns from them yet."""
        if phase in READS and form_of(self[0]) == "steps":
            raise DataError(
                f"example {self[0]['id']} has verdicts on steps (prompt, completions, labels), which no objective "
                "reads yet"
            )
        super().expect(phase)

    def score(self, example: Example, completion: str) -> Score:
        """1.0 where data.checker finds the example's answer in the completion, else 0.0."""
        if "answer" not in example:
            raise DataError(f"example {example['id']} has no answer to score against; a column answer gives one")
        right = is_right(self.config.checker, example["answer"], completion, self.config.pattern)
        return Score(float(right), right)

    def _add(self, rows: Rows, columns: list[str] | None = None) -> list[str]:
        """Take a table's rows where its form is wanted; returns the schemas that it fits.

        columns: its own, where it has some; else the first rows say. Raises DataError naming file and row.
        """
        schemas = self._schemas(rows, columns)
        if not self._wants(schemas[0]):
            return schemas
        table = Table(rows, schemas[0])
        found = self._looked_at_before(table)
        if found is None:
            found = self._look_at(table)
        self._num_read += found.read
        self._digest.update(found.said)
        self._tables.append(table)
        self._mine.append(range(len(rows)) if len(found.mine) == len(rows) else found.mine)
        self._ends.append(len(self) + len(found.mine))
        return schemas

    def _look_at(self, table: Table) -> Looked:
        """Read every row of a table. Raises DataError for a bad one, unless it may be skipped and counted."""
        rows, mine, digest = table.rows, array("q"), hashlib.sha256()
        held_out, seen, bad, read, following = self.config.split != "train", False, 0, 0, 0
        while following < len(rows):
            row, following = following, following + 1
            try:
                example = self._example(table, row)
                if example is None:
                    continue
                seen, said = True, self._written(table, row, example)
            except RowError as error:
                if self.config.bad_rows == "fail":
                    raise error.with_way_out() from error
                seen = True
                self._first_bad = self._first_bad or error
                self._skipped[error.reason] += error.count
                if isinstance(error, LostError):
                    self._lost[error.where] += error.count
                bad += error.count
                following = row + error.count
                continue
            read += 1
            if not self._shared or self._is_mine(example, held_out):
                mine.append(row)
                digest.update(said)
        if not seen:
            raise DataError(f"{rows.path} has no rows")
        found = Looked(mine, read, digest.digest())
        if not bad and (path := self._kept_at(table)):
            keep(path, found.said + read.to_bytes(8, "little") + mine.tobytes())
        return found

    def _looked_at_before(self, table: Table) -> Looked | None:
        """What `_look_at` found of the same bytes with the same settings, where no row was bad."""
        path = self._kept_at(table)
        content = kept(path) if path else None
        if content is None:
            return None
        return Looked(array("q", content[40:]), int.from_bytes(content[32:40], "little"), content[:32])

    def _kept_at(self, table: Table) -> Path | None:
        if not isinstance(table.rows, Slices):
            return None
        settings = {k: v for k, v in asdict(self.config).items() if k not in ("path", "validation_path")}
        made_of = [
            VERSION,
            table.rows.path.as_posix(),
            digest_file(table.rows.held),
            table.schema,
            self._shared,
            settings,
        ]
        return cache_folder() / "read" / f"{hashlib.sha256(json.dumps(made_of).encode()).hexdigest()}.bin"

    def _wants(self, schema: str) -> bool:
        return not self.config.forms or FORM_OF[schema] in self.config.forms

    def _schemas(self, rows: Rows, columns: list[str] | None) -> list[str]:
        """What the rows are, by their columns; text has none."""
        if isinstance(rows, CsvRecords) and rows.misread:
            chosen = [self.config.text_column, *(old for _, old in self._renamed)]
            if not set(chosen) & set(rows.columns):  # somebody's column may be called so
                raise DataError(rows.misread)
        found = dict.fromkeys(columns or ())
        if columns is None:
            for row in islice(range(len(rows)), PEEKED):
                try:
                    values = rows[row]
                except RowError as error:
                    if self.config.bad_rows == "fail":
                        raise error.with_way_out() from error
                    self._first_bad = self._first_bad or error
                    if isinstance(rows, ArrowRows):  # the file names them apart from its rows
                        found |= dict.fromkeys(rows.columns)
                    continue
                if isinstance(values, str):
                    return ["text"]
                found |= dict.fromkeys(values or ())
            if not found:
                raise self._first_bad or DataError(f"{rows.path} has no rows")
        if self.config.text_column:
            if self.config.text_column not in found:
                raise DataError(
                    f"{rows.path} has the columns {', '.join(found)}, and none that is "
                    f"data.text_column={self.config.text_column}.{near_misses(self.config.text_column, found)}"
                )
            return ["text"]
        return schemas_of(self.config.schema, list(found), str(rows.path), self._renamed, self.config.forms)

    def _example(self, table: Table, row: int) -> dict[str, Any] | None:
        rows, schema = table
        values = rows[row]
        if values is None:
            return None
        if isinstance(values, str):
            return {"id": rows.name(row), "text": values}
        if self.config.text_column:
            values = {"text": values.get(self.config.text_column)}
        elif self._renamed:
            moved = {new: values[old] for new, old in self._renamed if old in values}
            gone = {old for _, old in self._renamed}
            values = {**{k: v for k, v in values.items() if k not in gone}, **moved}
        if isinstance(rows, CsvRecords) and schema == "labels":  # every cell is text
            values = {**values, "label": VERDICTS.get(str(values["label"]).lower(), values["label"])}
        try:
            found = ADAPTERS[schema](values, rows.at(row))
        except KeyError as error:  # a line that lacks a column of the others
            raise misfit(f"{rows.at(row)}: it has no {error.args[0]}; data.schema={schema} needs one") from error
        if "answer" in found:
            found["task"] = found["task"] or rows.title
            if READERS[self.config.checker](found["answer"], self.config.pattern) is None:
                raise misfit(
                    f"{rows.at(row)}: data.checker={self.config.checker} finds no answer in {found['answer'][-60:]!r}"
                )
        return {"id": rows.name(row), **found}

    def _written(self, table: Table, row: int, example: Mapping[str, Any]) -> bytes:
        """An example as `fingerprint_of` reads it; refused where it is too long, or no Unicode text."""
        said = json.dumps(example, sort_keys=True, ensure_ascii=False)
        if (
            len(said) > self.config.max_chars
            and (size := _characters(example) - len(example["id"])) > self.config.max_chars
        ):
            raise table.rows.too_long(row, size)
        try:
            return said.encode() + b"\n"
        except UnicodeEncodeError as error:
            raise RowError("not UTF-8", f"{table.rows.at(row)} holds half a character ({error.reason})") from error

    def _is_mine(self, example: Example, held_out: bool) -> bool:
        judged = form_of(example) in ("pairs", "labels")  # all answers to one prompt stay on one side
        content = {"prompt": prompt_of(example)} if judged else {k: v for k, v in example.items() if k != "id"}
        share = self.config.validation_share
        return (split_of(json.dumps(content, sort_keys=True), share, 0.0) == "validation") == held_out

    def _unwanted(self, left_out: list[list[str]]) -> str:
        found = list(dict.fromkeys(FORM_OF[schemas[0]] for schemas in left_out))
        holds = " and ".join(f"{form} ({FORM_WORDS[form]})" for form in found)
        reads = ", or ".join(FORM_WORDS[form] for form in self.config.forms)
        ways = ["name a file of that kind"]
        ways += [f"choose phase={phase}" for phase, forms in READS.items() if set(forms) & set(found)]
        fitting = {s for schemas in left_out for s in schemas if self._wants(s)}
        ways += [f"set data.schema={schema} to ignore the other columns" for schema in sorted(fitting)]
        forms = ", ".join(self.config.forms)
        return f"{self._where} holds {holds}; data.forms=[{forms}] reads {reads}: {', or '.join(ways)}"

    def _nothing(self) -> str:
        share = self.config.validation_share
        if self.config.split == "train":
            return f"{self._where} leaves nothing to train on: data.validation_share={share} holds all out"
        return (
            f"no row of {self._where} is held out at data.validation_share={share}: raise it, set "
            "data.validation_path, or validation.every_steps=0 to train without validation"
        )


def _characters(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return sum(map(_characters, inner))
