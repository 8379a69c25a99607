"""Settings of sources and tokenizers. No torch here: `explain`, `--help` and validation read these."""

from __future__ import annotations

from dataclasses import dataclass, field

from trivium.errors import ConfigError
from trivium.registry import near_misses

SPLITS = ("train", "validation", "test")
SCHEMAS = ("auto", "text", "messages", "prompt_completion", "pairs", "labels")
FORMS = ("text", "chat", "pairs", "labels")
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
    contamination: str = "warn"  # warn | fail | off: when training data holds what is held out
    contamination_share: float = 0.0  # of held-out examples that may be in the training data before it warns or fails
    contamination_words: int = 13  # words in a row that make two texts the same; fewer raise more false alarms

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
        positive(self, "contamination_words")


@dataclass(frozen=True)
class FilesConfig(SourceConfig):
    """A user's own files: .txt and .md, .jsonl and .json, .csv, .parquet and .arrow."""

    path: str = ""  # a file, a folder or a glob
    validation_path: str = ""  # held-out files; without it a share of `path` is held out
    validation_share: float = 0.02  # held out by content hash when there is no validation_path
    schema: str = "auto"  # auto | text | messages | prompt_completion | pairs | labels; auto recognises the columns
    forms: list[str] = field(default_factory=list)  # of many files, read these: text | chat | pairs | labels; none: all

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, "schema", SCHEMAS)
        for form in self.forms:
            if form not in FORMS:
                raise ConfigError(
                    f"data.forms={list(self.forms)} has {form!r}, which is not one of {', '.join(FORMS)}."
                    f"{near_misses(str(form), FORMS)}"
                )
        if not 0 <= self.validation_share < 1:
            raise ConfigError(f"data.validation_share={self.validation_share} must be at least 0 and less than 1")


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
    chat_template: str = ""  # how conversations are written: chatml, or a .jinja file; empty is the tokenizer's own

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
