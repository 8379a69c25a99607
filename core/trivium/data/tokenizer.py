"""Text to token ids and back, over the `tokenizers` library; one folder holds all of it in Hugging Face's layout.

Text that people or files bring is never read as special tokens: "<|end|>" in a user's message is seven characters,
not the end of the turn. Only the chat template's own words may name special tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from trivium.data.config import BPEConfig
from trivium.disk import make_folder, replace_file
from trivium.errors import DataError

BOS, EOS, PAD, END = "<|bos|>", "<|eos|>", "<|pad|>", "<|end|>"
SPECIAL = (PAD, BOS, EOS, "<|system|>", "<|user|>", "<|assistant|>", END)
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role not in ('system', 'user', 'assistant') %}"
    "{{ raise_exception('unknown role ' + message.role) }}{% endif %}"
    "<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Words carry their leading space; the pieces of numbers are single digits; line breaks stay apart from words.
PIECES = r"""[^\S\r\n]?\p{L}+|\p{N}|[^\S\r\n]?[^\s\p{L}\p{N}]+|[\r\n]+|\s+(?!\S)|\s"""
WHOLE_NUMBERS = PIECES.replace(r"\p{N}|", r"[^\S\r\n]?\p{N}+|")


class Tokenizer:
    """Ids for text, the special ids, and the chat template that goes with them."""

    def __init__(self, core: tokenizers.Tokenizer, config: dict[str, str]) -> None:
        self._core = core
        self._literal = tokenizers.Tokenizer.from_str(core.to_str())
        self._literal.encode_special_tokens = True
        self.config = config
        for key in ("bos_token", "eos_token", "pad_token", "eot_token"):
            self._id(key)

    @property
    def vocab_size(self) -> int:
        """Entries of the vocabulary, special ones included."""
        return self._core.get_vocab_size(with_added_tokens=True)

    @cached_property
    def bos_id(self) -> int:
        """First token of every document and conversation."""
        return self._id("bos_token")

    @cached_property
    def eos_id(self) -> int:
        """Last token of a document."""
        return self._id("eos_token")

    @cached_property
    def pad_id(self) -> int:
        """Fills rows; never a token of any text, so a mask by padding cannot hide a real one."""
        return self._id("pad_token")

    @cached_property
    def eot_id(self) -> int:
        """Last token of a turn."""
        return self._id("eot_token")

    def _id(self, name: str) -> int:
        found = self._core.token_to_id(self.config.get(name, ""))
        if found is None:
            raise DataError(f"the tokenizer's {name} {self.config.get(name)!r} is not in its vocabulary")
        return found

    @property
    def template(self) -> str:
        """The chat template (Jinja)."""
        return self.config["chat_template"]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of vocabulary, merges, special tokens and template."""
        content = self._core.to_str() + json.dumps(self.config, sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; nothing in it is read as a special token."""
        return self._literal.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
        """Ids of many texts, on all cores. special: read special tokens in them (rendered templates only)."""
        core = self._core if special else self._literal
        return [e.ids for e in core.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Text of ids; bytes that are no UTF-8 become U+FFFD. special: show special tokens."""
        return self._core.decode(list(ids), skip_special_tokens=not special)

    def save(self, folder: Path) -> None:
        """Write tokenizer.json, then tokenizer_config.json; a folder that has the second is complete."""
        make_folder(folder)
        replace_file(folder / "tokenizer.json", self._core.to_str().encode())
        replace_file(folder / "tokenizer_config.json", json.dumps(self.config, indent=1).encode())

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Read a folder that `save` wrote. Raises DataError naming what is missing or damaged."""
        if not (folder / "tokenizer.json").is_file():
            raise DataError(f"no tokenizer.json in {folder}")
        try:
            core = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
            config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"the tokenizer in {folder} cannot be read ({error})") from error
        words = {k: config.get(k) for k in ("bos_token", "eos_token", "pad_token", "eot_token", "chat_template")}
        wrong = [k for k, v in words.items() if not isinstance(v, str)]
        if wrong:
            raise DataError(f"{folder}/tokenizer_config.json has no usable {', '.join(wrong)}; text is needed")
        return cls(core, config)


def train_bpe(config: BPEConfig, texts: Iterable[str]) -> Tokenizer:
    """Train byte-level BPE (Sennrich et al. 2016, https://arxiv.org/abs/1508.07909) on `texts`."""
    core = tokenizers.Tokenizer(models.BPE())
    pattern = PIECES if config.split_digits else WHOLE_NUMBERS
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
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


def _at_most(texts: Iterable[str], max_bytes: int) -> Iterator[str]:
    left = max_bytes
    for text in texts:
        left -= len(text.encode())
        yield text
        if left <= 0:
            return
