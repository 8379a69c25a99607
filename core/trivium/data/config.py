"""Settings of sources and tokenizers. No torch here: `explain`, `--help` and validation read these."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

from trivium.errors import ConfigError
from trivium.registry import near_misses

SPLITS = ("train", "validation", "test")
SCHEMAS = (
    *("auto", "text", "messages", "sharegpt", "alpaca", "prompt_completion"),
    *("answers", "choices", "pairs", "labels", "steps"),
)
FORMS = ("text", "chat", "answers", "pairs", "labels", "steps")
CHECKERS = ("exact", "number", "choice", "regex")
CLEANING_STEPS = ("unicode", "whitespace", "pii", "length", "language", "quality", "exact", "near")
"""The first three change texts, the others remove examples; see docs/cleaning.md."""
CONTAMINATION = ("warn", "fail", "off")


def one_of(owner: object, field: str, allowed: tuple[str, ...]) -> None:
    """Refuse a value of `owner.field` outside `allowed`; used by every Config's `__post_init__`."""
    value = getattr(owner, field)
    if value not in allowed:
        raise ConfigError(f"{field}={value!r} is not one of {', '.join(allowed)}.{near_misses(str(value), allowed)}")


def positive(owner: object, *names: str) -> None:
    """Refuse zero and negative values of the named fields."""
    for name in names:
        if getattr(owner, name) <= 0:
            raise ConfigError(f"{name}={getattr(owner, name)} must be greater than 0")


@dataclass(frozen=True)
class CleaningConfig:
    """What the steps of `data.clean` go by; a step that is not named there reads none of it."""

    mojibake: bool = True  # unicode: undo text that was decoded wrongly (by ftfy); false needs no ftfy
    min_chars: int = 1  # length: an example that says less is removed
    max_chars: int = 1_000_000  # length: an example that says more is removed
    languages: list[str] = field(default_factory=lambda: ["en"])  # language: ISO 639-1 codes that are kept
    language_min_chars: int = 50  # language: shorter texts are kept as undecided; fewer makes more mistakes
    language_confidence: float = 0.5  # language: surer than this it must be to remove; less sure is undecided, kept
    min_words: int = 50  # quality: fewer are no document; chats and short answers need 1
    max_words: int = 100_000  # quality: more words are no document
    stop_words: int = 2  # quality: of eight common English words a text must hold; 0 for other languages
    repetition: bool = True  # quality: the rules on repeated lines, paragraphs and phrases, too
    near_threshold: float = 0.8  # near: Jaccard similarity from which on two are duplicates; less removes more
    near_words: int = 5  # near: words in a row that are compared; fewer find looser copies

    def __post_init__(self) -> None:
        if not 0 <= self.min_chars <= self.max_chars:
            raise ConfigError(
                f"data.cleaning.min_chars={self.min_chars} and max_chars={self.max_chars} leave no length to keep"
            )
        if not 1 <= self.min_words <= self.max_words:
            raise ConfigError(
                f"data.cleaning.min_words={self.min_words} and max_words={self.max_words} leave no text to keep; "
                "min_words must be 1 or more"
            )
        if not self.languages:
            raise ConfigError("data.cleaning.languages=[] would keep nothing; name codes such as [en, de]")
        if not 0 <= self.language_confidence < 1:
            raise ConfigError(f"data.cleaning.language_confidence={self.language_confidence} must be in [0, 1)")
        if not 0.5 < self.near_threshold <= 1:
            raise ConfigError(f"data.cleaning.near_threshold={self.near_threshold} must be above 0.5 and at most 1")
        positive(self, "near_words")
        if not 0 <= self.stop_words <= 8:
            raise ConfigError(f"data.cleaning.stop_words={self.stop_words} must be 0 to 8")


@dataclass(frozen=True)
class SourceConfig:
    """What every source can be told."""

    split: str = "train"  # train | validation | test; a source cuts them by content hash, so they never overlap
    seed: int = 0  # of what the source makes itself (generated tasks); order has the run's own seed
    clean: list[str] = field(default_factory=list)  # steps in order, such as [unicode, whitespace, pii, exact, near]
    cleaning: CleaningConfig = field(default_factory=CleaningConfig)  # what those steps go by
    held_out: list[str] = field(default_factory=list)  # files that must not be trained on, beside the validation split
    contamination: str = "fail"  # warn | fail | off: when training data holds what is held out
    contamination_share: float = 0.0  # of held-out examples that may be in the training data before it warns or fails
    contamination_words: int = 13  # words in a row that are compared; fewer raise more false alarms
    contamination_text: float = 0.2  # of a held-out text that makes it one of the training data; 0: any such words

    def __post_init__(self) -> None:
        one_of(self, "split", SPLITS)
        one_of(self, "contamination", CONTAMINATION)
        for step in self.clean:
            if step not in CLEANING_STEPS:
                raise ConfigError(
                    f"data.clean={list(self.clean)} has {step!r}, which is not one of {', '.join(CLEANING_STEPS)}."
                    f"{near_misses(str(step), CLEANING_STEPS)}"
                )
        if len(set(self.clean)) < len(self.clean):
            raise ConfigError(f"data.clean={list(self.clean)} names a step twice; name each once")
        if not 0 <= self.contamination_share < 1:
            raise ConfigError(f"data.contamination_share={self.contamination_share} must be at least 0 and less than 1")
        if not 0 <= self.contamination_text <= 1:
            raise ConfigError(f"data.contamination_text={self.contamination_text} must be at least 0 and at most 1")
        positive(self, "contamination_words")


@dataclass(frozen=True)
class RowsConfig(SourceConfig):
    """What every source of a user's rows can be told, wherever they come from."""

    validation_share: float = 0.02  # held out by content hash where there is no held-out data of its own
    schema: str = "auto"  # what a row means: auto recognises the columns; docs/data.md shows each
    forms: list[str] = field(default_factory=list)  # of many files, read these: text | chat | pairs | ...; none: all
    columns: list[str] = field(default_factory=list)  # KNOWN=FOUND reads the column FOUND as KNOWN, as prompt=question
    text_column: str = ""  # read this column as text and no other, as content or code
    max_chars: int = 10_000_000  # of one row; a longer one is refused by name, or skipped
    bad_rows: str = "fail"  # fail at the first row that cannot be used | skip them, counted by reason
    checker: str = "exact"  # when an answer is right: exact | number | choice | regex
    pattern: str = ""  # for checker=regex: its first group, where it matches last, is the answer

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, "schema", SCHEMAS)
        one_of(self, "bad_rows", ("fail", "skip"))
        one_of(self, "checker", CHECKERS)
        positive(self, "max_chars")
        for form in self.forms:
            if form not in FORMS:
                raise ConfigError(
                    f"data.forms={list(self.forms)} has {form!r}, which is not one of {', '.join(FORMS)}."
                    f"{near_misses(str(form), FORMS)}"
                )
        if not 0 <= self.validation_share < 1:
            raise ConfigError(f"data.validation_share={self.validation_share} must be at least 0 and less than 1")
        for pair in self.columns:
            if not all(pair.partition("=")[::2]):
                raise ConfigError(f"data.columns={list(self.columns)} has {pair!r}; write KNOWN=FOUND")
        if self.text_column and (self.schema not in ("auto", "text") or self.columns):
            raise ConfigError(f"data.text_column={self.text_column} reads one column as text; leave schema and columns")
        try:
            groups = re.compile(self.pattern).groups
        except re.error as error:
            raise ConfigError(f"data.pattern={self.pattern!r} is no regular expression: {error}") from error
        if (self.checker == "regex") != bool(self.pattern) or (self.pattern and groups < 1):
            raise ConfigError(
                f"data.checker={self.checker} with data.pattern={self.pattern!r}: checker=regex needs a pattern with a "
                "(group) around the answer, and no other checker takes one"
            )


@dataclass(frozen=True)
class FilesConfig(RowsConfig):
    """A user's own files: text, JSON, CSV, Parquet and Arrow, also compressed, and trees of source code."""

    path: str = ""  # a file, a folder or a glob
    validation_path: str = ""  # held-out files; without it a share of `path` is held out
    code: bool = False  # read a folder as a tree of source files, each a document; true is meant for mixed folders
    max_unpacked_gb: float = 50.0  # that one compressed file may unpack to in the cache

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "max_unpacked_gb")


@dataclass(frozen=True)
class HubConfig(RowsConfig):
    """A data set of the Hugging Face hub, or a folder in the same layout, through `datasets`."""

    dataset: str = ""  # owner/name on the hub, or a folder
    subset: str = ""  # its configuration, such as main or sample-10BT
    hub_split: str = "train"
    validation_split: str = ""  # its own held-out split; without one a share of hub_split is held out
    revision: str = ""  # a commit, branch or tag; a commit alone stays the same for ever
    streaming: bool = False  # read no more than max_rows from the hub; false fetches the whole set
    max_rows: int = 0  # the first so many rows; 0 is all, which streaming refuses

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_rows < 0 or (self.streaming and not self.max_rows):
            raise ConfigError(
                f"data.max_rows={self.max_rows}: data.streaming=true needs how many rows to read, above 0"
                if self.streaming
                else f"data.max_rows={self.max_rows} must not be negative (0 is all)"
            )


@dataclass(frozen=True)
class PartConfig:
    """One part of a mixture. weights: (step, weight) in order of steps, empty for its size's own.

    epochs, tokens: the most that is read of it, repeats counted; 0 is no limit. settings: of its data.
    """

    domain: str
    weights: tuple[tuple[int, float], ...]
    epochs: float
    tokens: int
    settings: tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class MixtureConfig(SourceConfig):
    """Several domains in one run, in chosen shares of its tokens."""

    # NAME: {domain (else NAME), weight (a number, or {step: number}; else by size), epochs, tokens (the most of it),
    # and settings of its data, such as path}
    parts: dict[str, Any] = field(default_factory=dict)
    temperature: float = 1.0  # of parts without a weight: 1 takes them by their size, more takes them more alike

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "temperature")
        weighed = [name for name in self.parts if self.part(name).weights]
        if weighed and (without := [name for name in self.parts if name not in weighed]):
            raise ConfigError(
                f"data.parts: {', '.join(weighed)} has a weight and {', '.join(without)} has none; weigh all parts, or "
                "none for shares by their size"
            )

    def part(self, name: str) -> PartConfig:
        """A part's settings. Raises ConfigError naming what is wrong."""
        given = {} if self.parts[name] is None else self.parts[name]
        at = f"data.parts.{name}"
        if not re.fullmatch(r"[\w.-]+", name) or not isinstance(given, dict):
            raise ConfigError(f"{at}={given!r}: a part is NAME: {{weight: 1, ...}}, NAME of letters, digits, _ . -")
        settings = dict(given)
        domain = settings.pop("domain", name)
        weight, epochs, tokens = settings.pop("weight", None), settings.pop("epochs", 0), settings.pop("tokens", 0)
        for key, value in (("epochs", epochs), ("tokens", tokens)):
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < math.inf:
                raise ConfigError(f"{at}.{key}={value!r} must be a number, 0 (no limit) or more")
        points = weight if isinstance(weight, dict) else {} if weight is None else {0: weight}
        try:
            weights = tuple(sorted((int(step), float(value)) for step, value in points.items()))
        except (TypeError, ValueError):
            weights = ((-1, 0.0),)
        if any(step < 0 or not 0 <= value < math.inf for step, value in weights):
            raise ConfigError(f"{at}.weight={weight!r} must be a number, 0 or more, or such by step: {{0: 1, 500: 2}}")
        return PartConfig(str(domain), weights, float(epochs), int(tokens), tuple(settings.items()))


@dataclass(frozen=True)
class BPEConfig:
    """Byte-level BPE trained on the data: every string has tokens, every token sequence has bytes."""

    vocab_size: int = 4096  # more makes texts shorter and the embedding larger
    path: str = ""  # use this instead: a folder, a tokenizer.json, tiktoken ranks or a SentencePiece .model
    encoding: str = ""  # of tiktoken ranks: gpt2, cl100k_base, ...; empty is by the file's name
    rules: str = "own"  # own | gguf: how text is cut into words first; a GGUF file has names for the second only
    split_digits: bool = True  # one token a digit: numbers of any length read the same way
    max_bytes: int = 20_000_000  # of text read for training; more changes little and takes longer
    add_tokens: list[str] = field(default_factory=list)  # further special tokens; a model that is there grows with them
    chat_template: str = (
        ""  # chatml, chatml_tools (with calls of functions) or a .jinja file; empty is the tokenizer's own
    )

    def __post_init__(self) -> None:
        if self.vocab_size < 300:
            raise ConfigError(
                f"tokenizer.vocab_size={self.vocab_size} must be at least 300 (256 bytes and special tokens)"
            )
        positive(self, "max_bytes")
        one_of(self, "rules", ("own", "gguf"))


@dataclass(frozen=True)
class UnigramConfig(BPEConfig):
    """A unigram language model over pieces of words, trained on the data; characters that it lacks are bytes."""

    vocab_size: int = 8192  # more makes texts shorter and the embedding larger; small data may give fewer

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vocab_size < 400:
            raise ConfigError(
                f"tokenizer.vocab_size={self.vocab_size} must be at least 400 (256 bytes, specials and characters)"
            )
