"""Passages of somebody's files that say what a query asks, and an answer from them that names its sources."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track
from rich.table import Table
from rich.text import Text

from trivium.build import build_backend, build_encoder
from trivium.data import passages as cutting
from trivium.data.config import FilesConfig
from trivium.data.passages import FoundFile, Passage, files_to_search, passages_of
from trivium.data.tokenizer import Tokenizer
from trivium.disk import kept, make_folder, replace_json, sweep
from trivium.errors import ConfigError, DataError
from trivium.evaluation.generation import complete
from trivium.inference import index as indexing
from trivium.inference.conversation import sampling_params
from trivium.inference.encoder import EncoderBackend
from trivium.inference.index import Entry, VectorIndex, read_entry, write_entry
from trivium.inference.protocol import Backend
from trivium.inference.terminal import Terminal
from trivium.lineage.figures import safe_text
from trivium.lineage.manifest import digest_of
from trivium.phases.run import Run
from trivium.phases.speak import prompt_ids, speaking_model

FOLDER, RECORD = "index", "INDEX.json"
LEAST = 16
"""Tokens of a passage; fewer say nothing, and a character alone may have four."""
SHOWN = 280
"""Characters of a passage that the table shows."""
TASK = (
    "Answer the question from the numbered passages alone, in a few sentences, and name the passages you used by their "
    "numbers, like [1]. If they do not answer it, say so."
)
CITED = re.compile(r"\[(\d{1,4}(?:\s*,\s*\d{1,4})*)\]")


@dataclass(frozen=True)
class Source:
    """A passage that was found. file: its name."""

    file: str
    passage: Passage
    score: float

    @property
    def place(self) -> str:
        """Where it is, as people and editors write it."""
        first, last = self.passage.first, self.passage.last
        if self.passage.unit == "row":
            return f"{self.file} row {first}"
        return f"{self.file}:{first}" if first == last else f"{self.file}:{first}-{last}"


def run_search(this: Run) -> int:
    """Bring the index up to date; then answer `query`, or those of a terminal."""
    config = this.config
    if config.data is None or not isinstance(config.data.config, FilesConfig):
        raise ConfigError("phase=search reads files: choose domain=files, which it does by itself, and data.path=")
    if config.query and not config.query.strip():
        raise ConfigError(f"query={config.query!r} has no words; write what to look for")
    encoder = build_encoder(config.search.encoder, config.trainer.accelerator, this.say)
    this.note_parent("encoder", config.search.encoder.path, encoder.sha256)
    library = Library(this, encoder, config.data.config)
    library.refresh()
    if config.query:
        sources = library.find(config.query)
        samples = [_told(this, config.query, sources, Answerer(this) if this.parent else None)]
    else:
        samples = _asked_in_terminal(this, library)
    this.write_samples(samples)
    return 0


def _counted(gone: Counter[str]) -> str:
    return ", ".join(f"{n:,} {reason}" for reason, n in sorted(gone.items()))


def _asked_in_terminal(this: Run, library: Library) -> list[dict[str, Any]]:
    terminal = Terminal(this.folder / "history")
    if not terminal.interactive:
        this.say("the index is ready; ask with query='...'")
        return []
    answerer, samples = (Answerer(this) if this.parent else None), []
    this.say("ask; Ctrl-D or /exit to leave")
    while (line := terminal.read()) is not None and line.strip() != "/exit":
        if not line.strip():
            continue
        try:
            samples.append(_told(this, line, library.find(line), answerer))
        except DataError as error:
            this.say(str(error))
    return samples


class Library:
    """The index of a run's folder: its files' entries, and what faiss made of them."""

    def __init__(self, this: Run, encoder: EncoderBackend, data: FilesConfig) -> None:
        self.this, self.encoder, self.data = this, encoder, data
        self.settings = this.config.search
        self.folder = this.folder / FOLDER
        before = len(encoder.tokenizer.encode(encoder.tokenizer.passage_prompt))
        room = encoder.tokenizer.room - before
        self.most = self.settings.tokens or room
        if not LEAST <= self.most <= room:
            raise ConfigError(
                f"search.tokens={self.settings.tokens} must be from {LEAST} to the {room} that the encoder reads of a "
                "passage"
            )
        read = {k: v for k, v in asdict(data).items() if k not in ("path", "split", "validation_path")}
        self.rules = {"tokens": self.most, "data": read, "version": [cutting.VERSION, indexing.VERSION]}
        self.passages: list[tuple[FoundFile, Passage]] = []

    def refresh(self) -> None:
        """Make the index that of the files as they are now: of a changed file alone is anything computed."""
        say = self.this.say
        self._check_record()
        files, left_out = files_to_search(self.data)
        entries = make_folder(self.folder / "entries")
        sweep(entries)
        keys = [digest_of([file.sha256, file.path.suffix, self.encoder.sha256, self.rules]) for file in files]
        made, damaged, gone = [], [], Counter(left_out)
        found: list[Entry] = []
        missing = [k for k in dict.fromkeys(keys) if not (entries / f"{k}.bin").is_file()]
        shown = len(missing) > 20 and self.this.console.is_terminal
        told = zip(files, keys, strict=True)
        for file, key in track(
            told, "reading", len(files), console=self.this.console, disable=not shown, transient=True
        ):
            path = entries / f"{key}.bin"
            entry = read_entry(path, self.encoder.width)
            if entry is None:
                damaged += [file.name] if path.is_file() else []
                entry, skipped = self._made(file)
                gone.update(skipped)
                write_entry(path, entry)
                made.append(file.name)
            found.append(entry)
            self.passages += [(file, passage) for passage in entry.passages]
        if not self.passages:
            raise DataError(
                f"{self.data.path} has no text to find: {len(files):,} files, and no passage in them"
                + (f" (left out: {_counted(gone)})" if gone else "")
            )
        vectors = np.concatenate([e.vectors for e in found])
        path, made_of, how = self.folder / "index.bin", digest_of([keys, self.settings.index]), "as it was"
        # the file itself says what it is of: one that was killed after writing it left the record of another
        index = VectorIndex.load(path, self.encoder.similarity, made_of)
        if index is None and path.is_file() and kept(path) is None:
            damaged.append(path.name)
        if index is None or len(index) != len(vectors):
            index, how = VectorIndex.of(vectors, self.settings.index, self.encoder.similarity), "made"
            index.save(path, made_of)
        self.index = index
        encoder = {"path": self.settings.encoder.path, "sha256": self.encoder.sha256}
        names = {file.name: file.sha256 for file in files}
        record = {
            "source": self._source, "encoder": encoder, "kind": self.settings.index, "rules": self.rules,
            "keys": keys, "files": names,
        }  # fmt: skip
        replace_json(self.folder / RECORD, record)
        for old in set(entries.glob("*.bin")) - {entries / f"{k}.bin" for k in keys}:
            old.unlink()
        facts = {
            "files": names, "passages": len(vectors), "embedded": made, "damaged": damaged, "left_out": dict(gone),
            "encoder": encoder, "rules": self.rules, "index": made_of,
        }  # fmt: skip
        self.this.manifest.update(search=facts)
        for name in damaged:
            say(f"{name}: what was kept of it is damaged, and was made anew")
        if gone:
            say(f"left out: {_counted(gone)}")
        say(
            f"{len(vectors):,} passages of {len(files):,} files: {len(made):,} embedded, {len(files) - len(made):,} as "
            f"they were; index {how}"
        )

    @property
    def _source(self) -> str:
        return str(Path(self.data.path).expanduser().absolute())

    def _check_record(self) -> None:
        """Raise ConfigError where the folder's index is another encoder's, or of other files."""
        path = self.folder / RECORD
        if not path.is_file():
            return
        try:
            known = json.loads(path.read_bytes())
            theirs, source = known["encoder"], known["source"]
            named, sha256 = theirs["path"], theirs["sha256"]
        except (ValueError, KeyError, TypeError):
            self.this.say(f"{path} is damaged; the index is made anew")
            shutil.rmtree(self.folder)
            return
        if sha256 != self.encoder.sha256:
            raise ConfigError(
                f"{self.folder} is an index of the encoder {named} ({sha256[:10]}), whose vectors say nothing to "
                f"{self.settings.encoder.path} with its settings ({self.encoder.sha256[:10]}); choose another name=, "
                "or remove that folder"
            )
        if source != self._source:
            raise ConfigError(
                f"{self.folder} is an index of {source}, not of data.path={self.data.path}; choose another name="
            )

    def _made(self, file: FoundFile) -> tuple[Entry, dict[str, int]]:
        tokenizer = self.encoder.tokenizer

        def count(texts: Sequence[str]) -> list[int]:
            return [len(ids) for ids in tokenizer.encode_batch(texts)]

        found, left_out = passages_of(file, self.data, self.most, count)
        ids = [tokenizer.input_ids(tokenizer.passage_prompt + passage.text) for passage in found]
        return Entry(found, self.encoder.embed(ids).numpy()), left_out

    def find(self, query: str) -> list[Source]:
        """The passages that are nearest to a query. Raises DataError for one that the encoder cannot read whole."""
        tokenizer, before = self.encoder.tokenizer, self.encoder.tokenizer.num_cut
        try:
            ids = tokenizer.input_ids(tokenizer.query_prompt + query)
        except DataError as error:
            told = str(error).replace("too_long=", "search.encoder.too_long=")
            raise DataError(f"the query is too long: {told}") from error
        if tokenizer.num_cut > before:
            self.this.say(f"the query is longer than the encoder reads; only its first {tokenizer.room} tokens count")
        found = []
        for number, score in self.index.nearest(self.encoder.embed([ids])[0], self.settings.top):
            file, passage = self.passages[number]
            found.append(Source(file.name, passage, score))
        return found


class Answerer:
    """The language model that answers from passages."""

    def __init__(self, this: Run) -> None:
        self.this, parent = this, this.needs_parent()
        config = this.config
        self.tokenizer: Tokenizer = parent.tokenizer
        self.chat = config.prompt_format == "chat" or (config.prompt_format == "auto" and parent.form == "chat")
        model = speaking_model(this)
        self.backend: Backend = build_backend(
            config.inference, model, self.tokenizer, config.trainer.accelerator, parent
        )
        self.params = sampling_params(config.inference.config.sampling, self.tokenizer.stop_ids)

    def answer(self, query: str, sources: Sequence[Source]) -> tuple[str, list[Source]]:
        """An answer, and those of the sources that the model was shown, the best, as many as fit its context."""
        context = self.backend.capabilities().context
        for count in range(len(sources), 0, -1):
            prompt = asked(query, sources[:count]) + ("" if self.chat else "\n\nAnswer:")
            (ids,) = prompt_ids(self.this, self.tokenizer, [prompt], chat=self.chat)
            if len(ids) + self.params.max_tokens <= context:
                (text,) = complete(self.backend, self.tokenizer, [ids], self.params)
                return text.strip(), list(sources[:count])
        raise ConfigError(
            f"not one passage fits: the question with the best one has {len(ids)} tokens, and the model's context is "
            f"{context} with inference.sampling.max_tokens={self.params.max_tokens}; lower that, or set search.tokens="
        )


def asked(query: str, sources: Sequence[Source]) -> str:
    """The question with its numbered passages, as the model reads it."""
    shown = [f"[{i}] {source.place}\n{source.passage.text}" for i, source in enumerate(sources, 1)]
    return "\n\n".join([TASK, *shown, f"Question: {query}"])


def cited(answer: str, count: int) -> tuple[list[int], list[int]]:
    """The numbers of passages that an answer names: those from 1 to `count`, and those that are none.

    >>> cited("Twice [2], as [1, 2] say; not [7].", 3)
    ([1, 2], [7])
    """
    named = sorted({int(n) for group in CITED.findall(answer) for n in group.split(",")})
    return [n for n in named if 1 <= n <= count], [n for n in named if not 1 <= n <= count]


def _told(this: Run, query: str, sources: Sequence[Source], answerer: Answerer | None) -> dict[str, Any]:
    """Show what was found, and the answer if there is one to make; the sample to keep."""
    _show(this, sources)
    rows = [{"file": s.file, "place": s.place, "score": round(s.score, 4), **asdict(s.passage)} for s in sources]
    places = "; ".join(f"[{i}] {source.place}" for i, source in enumerate(sources, 1))
    sample: dict[str, Any] = {"kind": "search", "prompt": query, "completion": places, "passages": rows}
    if answerer is None:
        return sample
    answer, shown = answerer.answer(query, sources)
    mine, none = cited(answer, len(shown))
    this.console.print()
    this.console.print(Text(safe_text(answer) or "(the model said nothing)"), soft_wrap=True)
    this.console.print()
    for i, source in enumerate(shown, 1):
        this.console.print(Text(f"  [{i}] {safe_text(source.place)}{'  named' if i in mine else ''}"), soft_wrap=True)
    if none:
        numbers = ", ".join(map(str, none))
        this.say(f"warning: the answer names [{numbers}], and {len(shown)} passages were shown to the model")
    return sample | {"completion": answer, "sources": [s.place for s in shown], "cited": mine, "invented": none}


def _show(this: Run, sources: Sequence[Source]) -> None:
    table = Table(box=None, padding=(0, 1), show_edge=False)
    table.add_column("", justify="right")
    table.add_column("score", justify="right")
    table.add_column("where", overflow="fold", ratio=2)
    table.add_column("passage", overflow="fold", ratio=5)
    for i, source in enumerate(sources, 1):
        text = safe_text(" ".join(source.passage.text.split()))
        text = text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"
        table.add_row(f"[{i}]".replace("[", r"\["), f"{source.score:.3f}", Text(safe_text(source.place)), Text(text))
    this.console.print(table, soft_wrap=False)
