"""Text to token ids and back, over the `tokenizers` library; one folder holds all of it in Hugging Face's layout.

Text that people or files bring is never read as special tokens: "<|end|>" in a user's message is seven characters,
not the end of the turn. Only the chat template's own words may name special tokens.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from trivium.data.config import BPEConfig, UnigramConfig
from trivium.data.gguf_tokenizer import OWN_DIGITS, OWN_NUMBERS, keys_of, pieces_of
from trivium.data.hf_folder import NAMED, bare_settings, library_errors, read_core, settings_of
from trivium.data.template import render
from trivium.disk import make_folder, replace_file
from trivium.errors import DataError

BOS, EOS, PAD, END, UNK = "<|bos|>", "<|eos|>", "<|pad|>", "<|end|>", "<|unk|>"
SPECIAL = (PAD, BOS, EOS, "<|system|>", "<|user|>", "<|assistant|>", END)
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role not in ('system', 'user', 'assistant') %}"
    "{{ raise_exception('unknown role ' + message.role) }}{% endif %}"
    "<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CHATML_WITH_TOOLS = (
    "{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% if tools or system %}<|im_start|>system\n{{ system }}{% if tools %}{{ '\n\n' if system else '' }}"
    "Functions you may call, as JSON schemas:\n<tools>\n"
    "{% for tool in tools %}{{ tool | tojson + '\n' }}{% endfor %}</tools>\n"
    "To call one, write its name and arguments as JSON between <tool_call> and </tool_call>."
    "{% endif %}<|im_end|>\n{% endif %}"
    "{% for message in messages %}{% if not (loop.first and message.role == 'system') %}"
    "{{ '<|im_start|>' + message.role + '\n' }}{% if message.role == 'tool' %}"
    "{{ '<tool_response>\n' + message.content + '\n</tool_response>' }}{% else %}{{ message.content }}{% endif %}"
    "{% for call in message.tool_calls or [] %}{{ '\n' if message.content or not loop.first else '' }}"
    "{{ '<tool_call>\n' + {'name': call.function.name, 'arguments': call.function.arguments} | tojson "
    "+ '\n</tool_call>' }}{% endfor %}<|im_end|>{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML as Hermes and Qwen write tools: what may be called in the system turn, calls and results between tags."""
CHATML_TEMPLATES = {"chatml": CHATML, "chatml_tools": CHATML_WITH_TOOLS}
# Words carry their leading space; numbers are single digits; line breaks stay apart from words.
PIECES = r"""[^\S\r\n]?\p{L}+|\p{N}|[^\S\r\n]?[^\s\p{L}\p{N}]+|[\r\n]+|\s+(?!\S)|\s"""
WHOLE_NUMBERS = PIECES.replace(r"\p{N}|", r"[^\S\r\n]?\p{N}+|")

MOST_HOLES = 4096
"""Ids without a token, beyond as many as there are tokens, before a vocabulary is refused."""

_LOCK = threading.Lock()  # of the module: a tokenizer that holds one could not be sent to another process


def _own_lock() -> None:
    global _LOCK
    _LOCK = threading.Lock()


os.register_at_fork(after_in_child=_own_lock)  # the thread that held the parent's is not there

_PLAIN = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTES = {chr(b): b for b in _PLAIN} | {chr(256 + i): b for i, b in enumerate(sorted({*range(256)} - {*_PLAIN}))}
"""How byte-level vocabularies spell each byte (GPT-2's `bytes_to_unicode`)."""

PROBE = "Probe 12,\n\n  caf\u00e9 \U0001f600!"


class Tokenizer:
    """Ids for text, the special ids, and the chat template that goes with them.

    config: bos_token, eos_token, pad_token, eot_token, stop_tokens (further ends), chat_template, add_bos_token; all
    but eos_token may be missing. `hf_folder.settings_of` makes one of a Hugging Face folder.
    """

    query_prompt = passage_prompt = text_prompt = ""
    """What an encoder wants before queries, before passages, and before texts that may be either."""

    def __init__(self, core: tokenizers.Tokenizer, config: Mapping[str, Any]) -> None:
        self._core = core
        top = max(core.get_vocab(with_added_tokens=True).values(), default=0)  # writing one counts through every id
        if top >= 2 * self.num_tokens + MOST_HOLES:
            raise DataError(
                f"the tokenizer's ids go up to {top:,} for {self.num_tokens:,} tokens, which is no vocabulary"
            )
        core.no_truncation()
        core.no_padding()
        self.config = dict(config)
        named = [self._token(key) for key in NAMED if self.config.get(key) is not None]
        named += [self._known(str(token), "stop_tokens") for token in self.config.get("stop_tokens", ())]
        if self.config.get("eos_token") is None:
            raise DataError("the tokenizer has no eos_token, so no text would end; set it in tokenizer_config.json")
        special = {t.content for t in core.get_added_tokens_decoder().values() if t.special}
        unmarked = [token for token in named if token not in special]
        if unmarked:  # in the vocabulary as a word: the ids stay, but text must not be read as it
            core.add_special_tokens([AddedToken(token, normalized=False) for token in unmarked])
        self.vocab_size = top + 1
        """Ids run from 0 to one less: what a model's embedding needs. Ids without a token count, too."""

    @property
    def num_tokens(self) -> int:
        """Entries of the vocabulary, special ones included."""
        return self._core.get_vocab_size(with_added_tokens=True)

    @cached_property
    def bos_id(self) -> int | None:
        """First token of every document and conversation; None where they begin without one (Qwen, GPT-2)."""
        wanted = self.config.get("bos_token") is not None and self.config.get("add_bos_token", True)
        return self._id("bos_token") if wanted else None

    @property
    def start(self) -> list[int]:
        """What a document begins with: the beginning token, or nothing."""
        return [] if self.bos_id is None else [self.bos_id]

    @cached_property
    def eos_id(self) -> int:
        """Last token of a document."""
        return self._id("eos_token")

    @cached_property
    def pad_id(self) -> int:
        """Fills rows; the end-of-text token where there is none. Masks never look at ids, so it cannot hide a token."""
        return self.eos_id if self.config.get("pad_token") is None else self._id("pad_token")

    @cached_property
    def eot_id(self) -> int:
        """Last token of a turn: the one stated, or the special token that the template writes after an answer."""
        if self.config.get("eot_token") is not None:
            return self._id("eot_token")
        found = self._end_of_probe() if self.has_template else None
        return self.eos_id if found is None else found

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Every token that ends a turn or a text."""
        further = [self._id_of(token) for token in self.config.get("stop_tokens", ())]
        return tuple(dict.fromkeys([self.eot_id, self.eos_id, *further]))

    def _end_of_probe(self) -> int | None:
        talk = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "\ue004"}]
        try:
            text = render(self.template, {"messages": talk, "add_generation_prompt": False, **self.words})
        except DataError:
            return None
        special = {i for i, token in self._core.get_added_tokens_decoder().items() if token.special}
        with self._reading(special=True) as core:
            after = core.encode(text.rpartition("\ue004")[2], add_special_tokens=False).ids
        return next((i for i in after if i in special), None)

    def _token(self, name: str) -> str:
        return self._known(self.config[name], name)

    def _known(self, token: Any, name: str) -> str:
        if not isinstance(token, str) or self._core.token_to_id(token) is None:
            raise DataError(f"the tokenizer's {name} {str(token)[:80]!r} is not in its vocabulary")
        return token

    def _id(self, name: str) -> int:
        return self._id_of(self._token(name))

    def _id_of(self, token: str) -> int:
        found = self._core.token_to_id(token)
        assert found is not None, token  # looked up when this was built
        return found

    @property
    def has_template(self) -> bool:
        """Whether it can write conversations."""
        return bool(self.config.get("chat_template"))

    @property
    def template(self) -> str:
        """The chat template (Jinja). Raises DataError where there is none."""
        return self.template_for(tools=False)

    def template_for(self, *, tools: bool) -> str:
        """The chat template for conversations with or without tools."""
        if not self.has_template:
            raise DataError(
                "this tokenizer has no chat template, so it cannot write conversations; add one as chat_template.jinja "
                "beside its tokenizer.json, or use plain text",
                "template",
            )
        found = self.config["chat_template"]
        if isinstance(found, str):
            return found
        named = {entry["name"]: entry["template"] for entry in found}
        return named["tool_use"] if tools and "tool_use" in named else named["default"]

    @property
    def words(self) -> dict[str, str]:
        """The special tokens that templates know by name, as text."""
        return {key: self.config[key] for key in NAMED if self.config.get(key) is not None}

    @property
    def text(self) -> str:
        """What its tokenizer.json says."""
        return self._core.to_str()

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of vocabulary, merges, special tokens and template."""
        content = self.text + json.dumps(self.config, sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    @contextmanager
    def _reading(self, special: bool) -> Iterator[tokenizers.Tokenizer]:
        """The core, set to read special tokens in text or not. One for both takes half the memory of two, and half the
        time to load; whoever encodes waits for who does."""
        with _LOCK:
            self._core.encode_special_tokens = not special
            try:
                yield self._core
            finally:
                self._core.encode_special_tokens = False

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; nothing in it is read as a special token."""
        with self._reading(special=False) as core:
            return core.encode(text, add_special_tokens=False).ids

    def input_ids(self, text: str) -> list[int]:
        """Ids of a plain text as a model is given it whole, at least one."""
        return [*self.start, *self.encode(text)] or [self.eos_id]

    def encode_batch(self, texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
        """Ids of many texts, on all cores. special: read special tokens in them (rendered templates only)."""
        with self._reading(special) as core:
            return [e.ids for e in core.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Text of ids; bytes that are no UTF-8 become U+FFFD. special: show special tokens."""
        return self._core.decode(list(ids), skip_special_tokens=not special)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of special tokens, which `decode` leaves out."""
        return frozenset(i for i, token in self._core.get_added_tokens_decoder().items() if token.special)

    @cached_property
    def longest(self) -> int:
        """Characters of the longest token as it is spelled: a text of n times as many has more than n tokens."""
        return max(map(len, self._core.get_vocab(with_added_tokens=True)))

    def bytes_of(self, token_id: int) -> list[int] | None:
        """The bytes of a token that may be part of a character; None where its spelling does not tell them."""
        piece = self._core.id_to_token(token_id)
        if piece is None:
            return None
        if fallback := re.fullmatch("<0x([0-9A-F]{2})>", piece):
            return [int(fallback[1], 16)]
        return [BYTES[c] for c in piece] if all(c in BYTES for c in piece) else None

    def decode_batch(self, sequences: Sequence[Sequence[int]]) -> list[str]:
        """Texts of many sequences of ids, on all cores."""
        return self._core.decode_batch([list(ids) for ids in sequences])

    def add_tokens(self, tokens: Sequence[str]) -> Tokenizer:
        """This tokenizer with further special tokens after all others. Raises DataError for one that it has."""
        known = [token for token in tokens if self._core.token_to_id(token) is not None]
        if known or len(set(tokens)) < len(tokens) or not all(tokens):
            raise DataError(f"add_tokens={list(tokens)}: each must be new, and {known or 'one of them'} is not")
        core = tokenizers.Tokenizer.from_str(self._core.to_str())
        core.add_special_tokens([AddedToken(token, normalized=False) for token in tokens])
        return Tokenizer(core, self.config)

    def extended(self, tokens: Sequence[str], template: str = "") -> Tokenizer:
        """This tokenizer with those of `tokens` that are no special tokens of it yet, and another chat template.

        template: "chatml" or "chatml_tools" (with their two tokens), or a file of Jinja; empty is its own.
        Raises DataError.
        """
        settings = dict(self.config)
        if template in CHATML_TEMPLATES:
            tokens = [*tokens, *(token for token in CHATML_TOKENS if token not in tokens)]
            settings |= {"chat_template": CHATML_TEMPLATES[template], "eot_token": CHATML_TOKENS[1]}
        elif template:
            try:
                settings["chat_template"] = Path(template).read_text(encoding="utf-8")
            except (OSError, ValueError) as error:
                raise DataError(f"tokenizer.chat_template={template} is neither chatml nor a file ({error})") from error
            settings.pop("eot_token", None)  # what ends a turn is the new template's to say
        special = {token.content for token in self._core.get_added_tokens_decoder().values() if token.special}
        new = [token for token in tokens if token not in special]
        grown = self.add_tokens(new) if new else self
        return Tokenizer(grown._core, settings) if settings != self.config else grown

    def gguf_keys(self, size: int) -> dict[str, Any]:
        """The tokenizer.* keys of a GGUF file with `size` rows in its embedding. Raises DataError if there are none."""
        said: dict[str, Any] = {
            "add_bos_token": self.bos_id is not None,
            "eot_token": self._core.id_to_token(self.eot_id),
        }
        ends = [self._core.id_to_token(i) for i in self.stop_ids]
        return keys_of(self._core, {**self.config, **said, "stop_tokens": ends}, size)

    def save(self, folder: Path) -> list[str]:
        """Write tokenizer.json, then tokenizer_config.json; a folder that has the second is complete.

        transformers' AutoTokenizer loads it with the same ids. Returns the names of the files.
        """
        make_folder(folder)
        said = {"clean_up_tokenization_spaces": False, **self.config}  # transformers would take spaces away
        files = {"tokenizer.json": self._core.to_str(), "tokenizer_config.json": json.dumps(said, indent=1)}
        for name, content in files.items():
            replace_file(folder / name, content.encode())
        return [*files]

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """Read a Hugging Face folder, one that `save` wrote, or a tokenizer.json that stands alone.

        Raises DataError naming what is missing or damaged.
        """
        file = path if path.is_file() else path / "tokenizer.json"
        if not file.is_file():
            raise DataError(f"no tokenizer.json in {path}")
        alone = path.is_file() and not (path.parent / "tokenizer_config.json").is_file()
        try:
            core = read_core(file)
            with library_errors():
                found = cls(core, bare_settings(core) if alone else settings_of(file.parent, core))
                found.decode(found.encode(PROBE))  # some damage shows only when it is used
                return found
        except DataError as error:
            raise DataError(f"the tokenizer in {path} cannot be used: {error}") from error


def train_bpe(config: BPEConfig, texts: Iterable[str]) -> Tokenizer:
    """Train byte-level BPE (Sennrich et al. 2016, https://arxiv.org/abs/1508.07909) on `texts`.

    rules=gguf cuts text as other models do whose rules llama.cpp has a name for, so that the model can leave as a GGUF
    file; what the primer's recipes are measured with are our own.
    """
    core = tokenizers.Tokenizer(models.BPE())
    if config.rules == "gguf":
        core.pre_tokenizer = pieces_of(OWN_DIGITS if config.split_digits else OWN_NUMBERS)
    else:
        pieces = pre_tokenizers.Split(Regex(PIECES if config.split_digits else WHOLE_NUMBERS), behavior="isolated")
        bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        core.pre_tokenizer = pre_tokenizers.Sequence([pieces, bytes_])
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(_at_most(texts, config.max_bytes), trainer)
    settings = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD, "eot_token": END, "chat_template": TEMPLATE}
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    return Tokenizer(core, settings)


def train_unigram(config: UnigramConfig, texts: Iterable[str]) -> Tokenizer:
    """Train a unigram model (Kudo 2018, https://arxiv.org/abs/1804.10959) on `texts`, with bytes for what it lacks.

    Spaces stay spaces (SentencePiece writes them as "▁", and a typed "▁" then comes back as a space), so every string
    survives. Bytes are the pieces <0x00> to <0xFF>, which no text spells: words are cut at "<" and at letters.
    """
    core = tokenizers.Tokenizer(models.Unigram())
    core.pre_tokenizer = pre_tokenizers.Split(
        Regex(PIECES if config.split_digits else WHOLE_NUMBERS), behavior="isolated"
    )
    special = [*SPECIAL, UNK]
    trainer = trainers.UnigramTrainer(
        vocab_size=config.vocab_size - 256, special_tokens=special, unk_token=UNK, show_progress=False
    )
    with library_errors():  # too little text is a panic
        core.train_from_iterator(_at_most(texts, config.max_bytes), trainer)
    pieces = json.loads(core.to_str())["model"]["vocab"]
    # The trainer adds up, and orders the rare characters that it must keep, as a hash table has them: the last digits
    # differ from one training to the next, and so do the scores of those characters, each 1e-4 below the one before.
    lowest = round(min(score for _, score in pieces), 6)
    rare = lowest + 1e-4 * sum(len(text) == 1 for text, _ in pieces)
    scores = {text: lowest if score < rare else round(score, 6) for text, score in pieces[len(special) :]}
    words = sorted(scores.items(), key=lambda piece: (-piece[1], piece[0]))
    byte_pieces = [(f"<0x{b:02X}>", lowest) for b in range(256)]
    vocab = [*((text, 0.0) for text in special), *byte_pieces, *words]
    core.model = models.Unigram(vocab, len(special) - 1, byte_fallback=True)
    core.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    settings = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD, "eot_token": END, "chat_template": TEMPLATE}
    return Tokenizer(core, {**settings, "unk_token": UNK, "tokenizer_class": "PreTrainedTokenizerFast"})


def _at_most(texts: Iterable[str], max_bytes: int) -> Iterator[str]:
    left = max_bytes
    for text in texts:
        left -= len(text.encode())
        yield text
        if left <= 0:
            return
