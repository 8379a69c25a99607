"""A user's own files as a source, read by the `datasets` library: text, conversations, prompt and completion.

Plain text is cut into documents at blank lines, about 4,000 characters each, so that a share of it can be held out.
"""

from __future__ import annotations

import csv
import glob
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import datasets

from trivium.data.config import FilesConfig
from trivium.data.source import Example, Source, split_of
from trivium.disk import cache_folder
from trivium.errors import DataError
from trivium.registry import near_misses

KINDS = {
    ".txt": "text",
    ".md": "text",
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
SCHEMAS = {"messages": ("messages",), "prompt_completion": ("prompt", "completion"), "text": ("text",)}
DOCUMENT = 4000
"""Characters after which a plain text file is cut, at the next blank line."""


class Files(Source):
    """Reads files once; rows stay memory-mapped in Arrow, examples are made when asked for."""

    phases: ClassVar[frozenset[str]] = frozenset({"tokenizer", "pretrain", "sft", "evaluate"})
    config: FilesConfig

    def __init__(self, config: FilesConfig) -> None:
        super().__init__(config)
        if not config.path and not (config.split != "train" and config.validation_path):
            raise DataError("domain=files needs data.path=FILE, a folder or a glob")
        held_out = config.split != "train"
        path = config.validation_path if held_out and config.validation_path else config.path
        whole = bool(config.validation_path) or not config.validation_share
        self._tables: list[tuple[Path, str, Any]] = []
        self._index: list[tuple[int, int]] = []
        for file in find_files(path):
            schema, rows = self._read(file)
            self._tables.append((file, schema, rows))
            for row in range(len(rows)):
                if whole or self._is_mine(self._example(len(self._tables) - 1, row), held_out):
                    self._index.append((len(self._tables) - 1, row))
        if held_out and not config.validation_path and not config.validation_share:
            self._index = []
        if not self._index:
            raise DataError(self._nothing(path, held_out))

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> Example:
        return self._example(*self._index[index])

    def _is_mine(self, example: Example, held_out: bool) -> bool:
        content = json.dumps({k: v for k, v in example.items() if k != "id"}, sort_keys=True)
        return (split_of(content, self.config.validation_share, 0.0) == "validation") == held_out

    def _read(self, file: Path) -> tuple[str, Any]:
        """A file's schema and rows. Raises DataError naming the file (and row) for anything that cannot be used."""
        try:
            if not file.stat().st_size:
                raise DataError(f"{file} is empty")
            if KINDS[file.suffix] == "text":
                return "text", list(documents(file.read_text(encoding="utf-8")))
            rows = _load(file)
        except OSError as error:
            raise DataError(f"{file} cannot be read: {error.strerror or error}") from error
        except UnicodeDecodeError as error:
            raise DataError(f"{file} is not UTF-8: byte {error.start} is {error.object[error.start]:#04x}") from error
        if not len(rows):
            raise DataError(f"{file} has no rows")
        return self._schema(file, rows.column_names), rows

    def _schema(self, file: Path, columns: Sequence[str]) -> str:
        wanted = [self.config.schema] if self.config.schema != "auto" else list(SCHEMAS)
        for name in wanted:
            if set(SCHEMAS[name]) <= set(columns):
                return name
        known = "; ".join(f"{name}: {', '.join(SCHEMAS[name])}" for name in wanted)
        near = "".join(near_misses(c, [k for name in wanted for k in SCHEMAS[name]]) for c in columns)
        raise DataError(f"{file} has the columns {', '.join(columns)}; known are {known}.{near}")

    def _example(self, table: int, row: int) -> dict[str, Any]:
        file, schema, rows = self._tables[table]
        name = f"{file.as_posix()}:{row + 1}"
        if isinstance(rows, list):
            return {"id": name, "text": rows[row]}
        values = rows[row]
        if schema == "messages":
            if not isinstance(values["messages"], list) or not all(isinstance(m, dict) for m in values["messages"]):
                raise DataError(f"{file} row {row + 1}: messages must be a list of {{role, content}}")
            return {
                "id": name,
                "messages": [{"role": m.get("role"), "content": m.get("content")} for m in values["messages"]],
            }
        for column in SCHEMAS[schema]:
            if not isinstance(values[column], str) or not values[column]:
                raise DataError(f"{file} row {row + 1}: {column} is {values[column]!r}, not text")
        return {"id": name, **{column: values[column] for column in SCHEMAS[schema]}}

    def _nothing(self, path: str, held_out: bool) -> str:
        if not held_out:
            return (
                f"{path} leaves nothing to train on: data.validation_share={self.config.validation_share} holds all out"
            )
        return (
            f"no row of {path} is held out at data.validation_share={self.config.validation_share}: raise it, set "
            "data.validation_path, or validation.every_steps=0 to train without validation"
        )


def find_files(path: str) -> list[Path]:
    """The files that a path, folder or glob names, sorted. Raises DataError if there is none of a known kind."""
    place = Path(path).expanduser()
    if place.is_file():
        if place.suffix not in KINDS:
            raise DataError(f"{place}: {place.suffix or 'no suffix'} is not a known kind; known are {', '.join(KINDS)}")
        return [place]
    if place.is_dir():
        found = [p for p in place.rglob("*") if p.is_file()]
    else:
        found = [Path(p) for p in glob.glob(str(place), recursive=True) if Path(p).is_file()]
        if not found:
            raise DataError(f"data.path={path} does not exist and matches no file")
    known = sorted(p for p in found if p.suffix in KINDS)
    if not known:
        raise DataError(f"no file under {path} is of a known kind ({', '.join(KINDS)})")
    return known


def documents(text: str) -> Iterator[str]:
    """Cut text at blank lines into pieces of about DOCUMENT characters; only the blank lines at the cuts are lost."""
    piece: list[str] = []
    size = 0
    for paragraph in text.split("\n\n"):
        piece.append(paragraph)
        size += len(paragraph) + 2
        if size >= DOCUMENT:
            yield "\n\n".join(piece)
            piece, size = [], 0
    if "".join(piece).strip():
        yield "\n\n".join(piece)


def _load(file: Path) -> datasets.Dataset:
    if KINDS[file.suffix] in ("json", "csv"):  # Arrow would notice bad bytes only when the row is read
        with open(file, "rb") as f:
            for number, line in enumerate(f, start=1):
                try:
                    line.decode()
                except UnicodeDecodeError as error:
                    raise DataError(f"{file} line {number} is not UTF-8") from error
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what is wrong is said once, by us
    cache = str(cache_folder() / "datasets")
    how: dict[str, Any] = {}
    if KINDS[file.suffix] == "csv":  # cells are text as they stand: "5", "NA" and "null" are answers too
        with open(file, encoding="utf-8", newline="") as f:
            columns = next(csv.reader(f))
        how = {
            "features": datasets.Features(dict.fromkeys(columns, datasets.Value("string"))),
            "keep_default_na": False,
        }
    try:
        rows = datasets.load_dataset(KINDS[file.suffix], data_files=str(file), split="train", cache_dir=cache, **how)
        guessed = [c for c in rows.column_names if str(getattr(rows.features[c], "dtype", "")).startswith("timestamp")]
        if guessed and KINDS[file.suffix] == "json":  # Arrow takes text that looks like a date for one
            text = file.read_text(encoding="utf-8")
            whole = (
                json.loads(text)
                if text.lstrip().startswith("[")
                else [json.loads(t) for t in text.split("\n") if t.strip()]
            )
            rows = datasets.Dataset.from_list(whole)
        return rows  # type: ignore[return-value]
    except Exception as error:  # the library wraps whatever its readers raise
        raise DataError(_reason(file, error)) from error


def _reason(file: Path, error: BaseException) -> str:
    """Why a file cannot be read, by line where a line is to blame."""
    if KINDS[file.suffix] == "json":
        raw = file.read_bytes()
        for number, line in enumerate(raw.splitlines(), start=1):
            try:
                if line.strip() and not isinstance(json.loads(line), dict):
                    return f"{file} line {number} is not a JSON object"
            except ValueError as bad:
                return f"{file} line {number} is not JSON: {bad}"
    while error.__cause__ is not None:
        error = error.__cause__
    said = str(error).splitlines() or [type(error).__name__]
    return f"{file} cannot be read as {KINDS[file.suffix]}: {said[0]}"
