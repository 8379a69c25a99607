"""A user's own files as a source, read by the `datasets` library: text, conversations, pairs and labelled answers.

One folder may hold files of every form: each phase reads those that `data.forms` names and leaves the others. Plain
text is cut into documents at blank lines, about 4,000 characters each, so that a share of it can be held out.
"""

from __future__ import annotations

import csv
import glob
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import datasets

from trivium.data.config import FilesConfig
from trivium.data.source import FORM_WORDS, READS, Example, Source, form_of, prompt_of, split_of
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
SCHEMAS = {
    "pairs": (("chosen", "rejected"),),
    "labels": (("messages", "label"), ("prompt", "completion", "label")),
    "messages": (("messages",),),
    "prompt_completion": (("prompt", "completion"),),
    "text": (("text",),),
}
"""The columns that make a schema; the most specific first, since a bad answer must never be read as one to imitate."""
FORM_OF = {"pairs": "pairs", "labels": "labels", "messages": "chat", "prompt_completion": "chat", "text": "text"}
CSV_LABELS = {"true": True, "1": True, "false": False, "0": False}
DOCUMENT = 4000
"""Characters after which a plain text file is cut, at the next blank line."""


class Files(Source):
    """Reads files once; rows stay memory-mapped in Arrow, examples are made when asked for."""

    phases: ClassVar[frozenset[str]] = frozenset(
        {"tokenizer", "pretrain", "sft", "preference", "reward", "distill", "evaluate"}
    )
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
        left_out: list[list[str]] = []
        for file in find_files(path):
            schemas, rows = self._read(file)
            if not self._wants(schemas[0]):
                left_out.append(schemas)
                continue
            self._tables.append((file, schemas[0], rows))
            for row in range(len(rows)):
                if whole or self._is_mine(self._example(len(self._tables) - 1, row), held_out):
                    self._index.append((len(self._tables) - 1, row))
        if not self._tables:
            raise DataError(self._unwanted(path, left_out))
        if held_out and not config.validation_path and not config.validation_share:
            self._index = []
        if not self._index:
            raise DataError(self._nothing(path, held_out))

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> Example:
        return self._example(*self._index[index])

    def origin(self, example: Example) -> str:
        """Its file."""
        return Path(example["id"].rpartition(":")[0]).name

    def _is_mine(self, example: Example, held_out: bool) -> bool:
        judged = form_of(example) in ("pairs", "labels")  # all answers to one prompt stay on one side
        content = {"prompt": prompt_of(example)} if judged else {k: v for k, v in example.items() if k != "id"}
        share = self.config.validation_share
        return (split_of(json.dumps(content, sort_keys=True), share, 0.0) == "validation") == held_out

    def _wants(self, schema: str) -> bool:
        return not self.config.forms or FORM_OF[schema] in self.config.forms

    def _read(self, file: Path) -> tuple[list[str], Any]:
        """The schemas a file fits, and its rows (none of text that is not wanted).

        Raises DataError naming the file (and row) for anything that cannot be used.
        """
        try:
            if KINDS[file.suffix] == "text" and not self._wants("text"):
                return ["text"], []
            if not file.stat().st_size:
                raise DataError(f"{file} is empty")
            if KINDS[file.suffix] == "text":
                return ["text"], list(documents(file.read_text(encoding="utf-8")))
            rows, columns = _load(file)
        except OSError as error:
            raise DataError(f"{file} cannot be read: {error.strerror or error}") from error
        except UnicodeDecodeError as error:
            raise DataError(f"{file} is not UTF-8: byte {error.start} is {error.object[error.start]:#04x}") from error
        if not len(rows):
            raise DataError(f"{file} has no rows")
        return self._schemas(file, columns), rows

    def _schemas(self, file: Path, columns: Sequence[str]) -> list[str]:
        wanted = [self.config.schema] if self.config.schema != "auto" else list(SCHEMAS)
        fitting = [name for name in wanted if any(set(needed) <= set(columns) for needed in SCHEMAS[name])]
        if fitting:
            return fitting
        known = "; ".join(f"{name}: {' or '.join(', '.join(c) for c in SCHEMAS[name])}" for name in wanted)
        words = list(dict.fromkeys(c for name in wanted for needed in SCHEMAS[name] for c in needed))
        near = "".join(near_misses(c, words) for c in columns)
        raise DataError(f"{file} has the columns {', '.join(columns)}; known are {known}.{near}")

    def _example(self, table: int, row: int) -> dict[str, Any]:
        file, schema, rows = self._tables[table]
        name = f"{file.as_posix()}:{row + 1}"
        values = rows[row]
        if isinstance(values, str):
            return {"id": name, "text": values}
        if file.suffix == ".csv" and schema == "labels":  # every cell is text
            values = {**values, "label": CSV_LABELS.get(str(values["label"]).lower(), values["label"])}
        return {"id": name, **READERS[schema](values, f"{file} row {row + 1}")}

    def _unwanted(self, path: str, left_out: list[list[str]]) -> str:
        found = list(dict.fromkeys(FORM_OF[schemas[0]] for schemas in left_out))
        holds = " and ".join(f"{form} ({FORM_WORDS[form]})" for form in found)
        reads = ", or ".join(FORM_WORDS[form] for form in self.config.forms)
        ways = ["name a file of that kind"]
        ways += [f"choose phase={phase}" for phase, forms in READS.items() if set(forms) & set(found)]
        fitting = {s for schemas in left_out for s in schemas if self._wants(s)}
        ways += [f"set data.schema={schema} to ignore the other columns" for schema in sorted(fitting)]
        return f"{path} holds {holds}; data.forms=[{', '.join(self.config.forms)}] reads {reads}: {', or '.join(ways)}"

    def _nothing(self, path: str, held_out: bool) -> str:
        if not held_out:
            return (
                f"{path} leaves nothing to train on: data.validation_share={self.config.validation_share} holds all out"
            )
        return (
            f"no row of {path} is held out at data.validation_share={self.config.validation_share}: raise it, set "
            "data.validation_path, or validation.every_steps=0 to train without validation"
        )


def _text(values: Mapping[str, Any], column: str, at: str) -> str:
    value = values.get(column)
    if not isinstance(value, str) or not value:
        raise DataError(f"{at}: {column} is {_short(value)}, not text")
    return value


def _messages(values: Mapping[str, Any], column: str, at: str) -> list[dict[str, str]]:
    """Role and content of each message; Arrow gives every message the keys of all, None where it had none."""
    value: Any = values[column]
    if not isinstance(value, list) or not value or not all(isinstance(m, dict) for m in value):
        raise DataError(f"{at}: {column} must be a list of {{role, content}}, not {_short(value)}")
    for m in value:
        if not isinstance(m.get("role"), str) or not isinstance(m.get("content"), str):
            raise DataError(
                f"{at}: {column} has a message with role {_short(m.get('role'))} and content "
                f"{_short(m.get('content'))}; both must be text"
            )
    return [{"role": m["role"], "content": m["content"]} for m in value]


def _short(value: Any) -> str:
    said = repr(value)
    return said if len(said) <= 80 else f"{said[:77]}..."


def _pair(values: Mapping[str, Any], at: str) -> dict[str, Any]:
    """Two answers to one prompt, as text or as conversations."""
    text = isinstance(values["chosen"], str) and isinstance(values["rejected"], str)
    if text and values.get("prompt") is None:
        raise DataError(f"{at}: chosen and rejected are text and need the prompt they answer, in a column prompt")
    columns = ("prompt", "chosen", "rejected")
    pair = {column: _text(values, column, at) for column in columns} if text else _conversations(values, at)
    if pair["chosen"] == pair["rejected"]:
        raise DataError(f"{at}: chosen and rejected are the same")
    shared = len(prompt_of(pair))
    answers: list[Any] = [] if text else [pair[column][shared:] for column in ("chosen", "rejected")]
    if not shared or not all(a and a[0]["role"] == a[-1]["role"] == "assistant" for a in answers):
        raise DataError(
            f"{at}: chosen and rejected must begin with the same prompt, go on with an assistant turn and end in one; "
            f"the first {shared} messages are the same"
        )
    return pair


def _conversations(values: Mapping[str, Any], at: str) -> dict[str, Any]:
    """Both whole conversations: many data sets have the prompt in them and beside them, others only beside them."""
    pair = {column: _messages(values, column, at) for column in ("chosen", "rejected")}
    prompt = values.get("prompt")
    if prompt is None:
        return pair
    ahead = _messages(values, "prompt", at) if isinstance(prompt, list) else []
    ahead = ahead or [{"role": "user", "content": _text(values, "prompt", at)}]
    if all(said[0]["role"] == "assistant" for said in pair.values()):
        return {column: ahead + said for column, said in pair.items()}
    shared = list(prompt_of(pair))
    if any(m not in shared for m in ahead):
        raise DataError(f"{at}: chosen and rejected must both begin with an assistant turn, or both with the prompt")
    return pair


def _labelled(values: Mapping[str, Any], at: str) -> dict[str, Any]:
    label = values["label"]
    if not isinstance(label, int) or label not in (0, 1):
        raise DataError(f"{at}: label is {_short(label)}; it must be true (desirable) or false (undesirable)")
    if "messages" not in values:
        return {**_completion(values, at), "label": bool(label)}
    messages = _messages(values, "messages", at)
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise DataError(f"{at}: messages must be a prompt and, last, the assistant turn that label judges")
    return {"messages": messages, "label": bool(label)}


def _completion(values: Mapping[str, Any], at: str) -> dict[str, Any]:
    return {column: _text(values, column, at) for column in ("prompt", "completion")}


READERS: dict[str, Callable[[Mapping[str, Any], str], dict[str, Any]]] = {
    "pairs": _pair,
    "labels": _labelled,
    "messages": lambda values, at: {"messages": _messages(values, "messages", at)},
    "prompt_completion": _completion,
    "text": lambda values, at: {"text": _text(values, "text", at)},
}


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


def _load(file: Path) -> tuple[Any, list[str]]:
    """Rows by number, and their columns."""
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
        # Arrow takes text that looks like a date for one, and in a column of mixed types "5" and "true" for values
        if KINDS[file.suffix] == "json" and re.search(r"timestamp\[|(?<!List\()Json\(", str(rows.features)):
            text = file.read_text(encoding="utf-8")
            lines = (t for t in text.split("\n") if t.strip())
            whole = json.loads(text) if text.lstrip().startswith("[") else [json.loads(t) for t in lines]
            return [{c: row.get(c) for c in rows.column_names} for row in whole], rows.column_names
        return rows, rows.column_names
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
