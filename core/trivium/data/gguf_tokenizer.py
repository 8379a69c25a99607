"""The tokenizer inside a GGUF file: byte-level BPE from its tokens and merges, and back into a file's keys.

GGUF names the pre-tokenizer (`tokenizer.ggml.pre`) and does not hold it, so that each name has its parts here, as the
model's own tokenizer.json has them. Another name is refused: near enough is another tokenizer. The usual conversion
drops the digits' splitting for "smollm", and what the model then reads is not what it learned.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from trivium.errors import DataError

CONTROL, USER_DEFINED, NORMAL = 3, 4, 1
"""Of `tokenizer.ggml.token_type`; the others (unknown, unused, byte) are ordinary entries here."""
TOKENS = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown", "eot_token": "eot"}
"""tokenizer_config.json's name -> the middle of tokenizer.ggml.*_token_id."""
LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _split(numbers: str) -> pre_tokenizers.PreTokenizer:
    pattern = Regex(LETTERS + numbers + REST)
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(pattern, behavior="isolated"), bytes_only])


def _byte_level() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _digits_apart() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _byte_level()])


@dataclass(frozen=True)
class _Pre:
    """What happens to text before the merges. whole_words: a word that is an entry is one token, merges or not."""

    pieces: Callable[[], pre_tokenizers.PreTokenizer]
    nfc: bool = False
    whole_words: bool = False


PRE: Mapping[str, _Pre] = {
    "smollm": _Pre(_digits_apart),
    "gpt-2": _Pre(_byte_level),
    "llama-bpe": _Pre(lambda: _split(r"\p{N}{1,3}"), whole_words=True),
    "qwen2": _Pre(lambda: _split(r"\p{N}"), nfc=True),
}


def tokenizer_of(keys: Mapping[str, Any]) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """The tokenizer of a file's tokenizer.* keys, and its tokenizer_config.json (special tokens, chat template).

    A file that names no end of turn ends its turns with its end of text. Raises DataError naming what is unknown,
    missing or damaged.
    """
    if (kind := keys.get("tokenizer.ggml.model")) != "gpt2":
        raise DataError(f"the GGUF file's tokenizer is of the kind {kind!r}; byte-level BPE ('gpt2') is read")
    pre = _known(keys.get("tokenizer.ggml.pre"))
    tokens = _texts(keys, "tokenizer.ggml.tokens")
    types = keys.get("tokenizer.ggml.token_type", [NORMAL] * len(tokens))
    if not isinstance(types, list) or len(types) != len(tokens):
        raise DataError(
            f"the GGUF file's tokenizer.ggml.token_type does not have one type for each of {len(tokens):,} tokens"
        )
    vocabulary = {token: id for id, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise DataError(f"the GGUF file's tokenizer has {len(tokens) - len(vocabulary):,} tokens twice")
    merges = [tuple(merge.split(" ")) for merge in _texts(keys, "tokenizer.ggml.merges")]
    if wrong := next((m for m in merges if len(m) != 2 or not {*m, "".join(m)} <= vocabulary.keys()), None):
        raise DataError(
            f"the GGUF file's tokenizer merges {' '.join(wrong)[:60]!r}, which are not two tokens that make a third"
        )
    core = _core(vocabulary, merges, pre)
    special = [
        AddedToken(t, special=True, normalized=False) for t, n in zip(tokens, types, strict=True) if n == CONTROL
    ]
    core.add_special_tokens(special)
    core.add_tokens([AddedToken(t, normalized=False) for t, n in zip(tokens, types, strict=True) if n == USER_DEFINED])
    return core, _config(keys, tokens)


def keys_of(core: tokenizers.Tokenizer, config: Mapping[str, Any]) -> dict[str, Any]:
    """The tokenizer.* keys that `tokenizer_of` makes this tokenizer from, for a GGUF file to be written.

    Raises DataError where they cannot say it exactly: no byte-level BPE, holes in its ids, or a pre-tokenizer that GGUF
    has no name for.
    """
    state = json.loads(core.to_str())
    if (kind := state["model"]["type"]) != "BPE":
        raise DataError(f"a tokenizer of the kind {kind} cannot be written into a GGUF file; byte-level BPE can")
    added = {entry["id"]: entry for entry in state["added_tokens"]}
    names = {id: token for token, id in state["model"]["vocab"].items()} | {i: e["content"] for i, e in added.items()}
    if sorted(names) != list(range(len(names))):
        raise DataError(
            f"the tokenizer has {len(names):,} entries and ids up to {max(names):,}; GGUF numbers without holes"
        )
    keys: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": _name_of(state),
        "tokenizer.ggml.tokens": [names[i] for i in range(len(names))],
        "tokenizer.ggml.token_type": [_type(added.get(i)) for i in range(len(names))],
        "tokenizer.ggml.merges": [m if isinstance(m, str) else " ".join(m) for m in state["model"]["merges"]],
        "tokenizer.ggml.add_bos_token": bool(config.get("add_bos_token", False)),
    }
    ids = {token: id for id, token in names.items()}
    for name, middle in TOKENS.items():
        if isinstance(token := config.get(name), str):
            if token not in ids:
                raise DataError(f"the tokenizer's {name} {token!r} is not in its vocabulary")
            keys[f"tokenizer.ggml.{middle}_token_id"] = ids[token]
    return keys | ({"tokenizer.chat_template": config["chat_template"]} if config.get("chat_template") else {})


def _known(name: Any) -> _Pre:
    if name not in PRE:
        raise DataError(f"the GGUF file's tokenizer splits text by the rules of {name!r}; read are {', '.join(PRE)}")
    return PRE[name]


def _texts(keys: Mapping[str, Any], key: str) -> list[str]:
    found = keys.get(key)
    if not isinstance(found, list) or not found or not all(isinstance(text, str) and text for text in found):
        raise DataError(f"the GGUF file's {key} is not a list of texts")
    return found


def _core(vocabulary: dict[str, int], merges: list[Any], pre: _Pre) -> tokenizers.Tokenizer:
    try:
        core = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=pre.whole_words))
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"the GGUF file's tokens and merges make no tokenizer ({error})") from error
    if pre.nfc:
        core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre.pieces()
    core.decoder = decoders.ByteLevel()
    return core


def _config(keys: Mapping[str, Any], tokens: list[str]) -> dict[str, Any]:
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for name, middle in TOKENS.items():
        key = f"tokenizer.ggml.{middle}_token_id"
        id = keys.get(key)
        if id is None:
            continue
        if not isinstance(id, int) or not 0 <= id < len(tokens):
            raise DataError(f"the GGUF file's {key} is {id!r}; its tokens are 0 to {len(tokens) - 1:,}")
        config[name] = tokens[id]
    if "eos_token" in config:
        config.setdefault("eot_token", config["eos_token"])
    config["add_bos_token"] = keys.get("tokenizer.ggml.add_bos_token") is True
    if isinstance(template := keys.get("tokenizer.chat_template"), str):
        config["chat_template"] = template
    return config


def _type(added: Mapping[str, Any] | None) -> int:
    return NORMAL if added is None else CONTROL if added["special"] else USER_DEFINED


def _name_of(state: Mapping[str, Any]) -> str:
    """The name under which GGUF knows this pre-tokenizer."""

    def rules(of: Mapping[str, Any]) -> tuple[Any, ...]:
        return of["normalizer"], of["pre_tokenizer"], of["model"]["ignore_merges"]

    for name, pre in PRE.items():
        if rules(json.loads(_core({}, [], pre).to_str())) == rules(state):
            return name
    raise DataError(f"GGUF has no name for how this tokenizer splits text; it has names for {', '.join(PRE)}")
