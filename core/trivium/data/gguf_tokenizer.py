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

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""Of `tokenizer.ggml.token_type`; the others (unknown, byte) are ordinary entries here, and so are unused ones but for
those that fill a file's ids up to the rows of the embedding, [PAD300] for id 300: they are left out."""
TOKENS = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown", "eot_token": "eot"}
"""tokenizer_config.json's name -> the middle of tokenizer.ggml.*_token_id."""
ENDS = ("eos_token", "eot_token")
MOST_FILLERS = 4096
FURTHER_END = "tokenizer.ggml.eom_token_id"
TEMPLATE = "tokenizer.chat_template"
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
    "stablelm2": _Pre(lambda: _split(r"\p{N}")),
}
OWN_DIGITS, OWN_NUMBERS = "stablelm2", "gpt-2"
"""The rules of tokenizers that are trained with rules=gguf: of those that GGUF has names for, and keep every byte."""


def pieces_of(name: str) -> pre_tokenizers.PreTokenizer:
    """How text is cut before the merges under the rules of this name."""
    return PRE[name].pieces()


def tokenizer_of(keys: Mapping[str, Any]) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """The tokenizer of a file's tokenizer.* keys, and its tokenizer_config.json (special tokens, chat template).

    A file that names no end of turn ends its turns with its end of text. Raises DataError naming what is unknown,
    missing or damaged.
    """
    if (kind := keys.get("tokenizer.ggml.model")) != "gpt2":
        raise DataError(f"the GGUF file's tokenizer is of the kind {kind!r}; byte-level BPE ('gpt2') is read")
    pre = _known(keys.get("tokenizer.ggml.pre"))
    if keys.get("tokenizer.ggml.add_eos_token"):
        raise DataError(
            "the GGUF file's tokenizer ends every text with its end-of-text token (tokenizer.ggml.add_eos_token), "
            "prompts too; such models are not read"
        )
    tokens = _texts(keys, "tokenizer.ggml.tokens")
    types = keys.get("tokenizer.ggml.token_type", [NORMAL] * len(tokens))
    if not isinstance(types, list) or len(types) != len(tokens):
        raise DataError(
            f"the GGUF file's tokenizer.ggml.token_type does not have one type for each of {len(tokens):,} tokens"
        )
    if twice := len(tokens) - len(set(tokens)):
        raise DataError(f"the GGUF file's tokenizer has {twice:,} tokens twice")
    used = [
        not (kind == UNUSED and token == _filler(id))
        for id, (token, kind) in enumerate(zip(tokens, types, strict=True))
    ]
    vocabulary = {token: id for id, token in enumerate(tokens) if used[id]}
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


def keys_of(core: tokenizers.Tokenizer, config: Mapping[str, Any], size: int = 0) -> dict[str, Any]:
    """The tokenizer.* keys that `tokenizer_of` makes this tokenizer from, for a GGUF file to be written.

    size: the rows of the model's embedding; llama.cpp wants a token for each, and ids without one get a filler. Raises
    DataError where the keys cannot say it exactly: no byte-level BPE, more than three ends, or a way to cut text that
    GGUF has no name for.
    """
    state = json.loads(core.to_str())
    model, name = state["model"], _name_of(state)
    added = {entry["id"]: entry for entry in state["added_tokens"]}
    names = {id: token for token, id in model["vocab"].items()} | {i: e["content"] for i, e in added.items()}
    count = max(size, max(names) + 1)
    if count > 2 * len(names) + MOST_FILLERS:
        raise DataError(f"the tokenizer has {len(names):,} entries for {count:,} ids, which are too many without one")
    keys: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": name,
        "tokenizer.ggml.tokens": [names.get(i, _filler(i)) for i in range(count)],
        "tokenizer.ggml.token_type": [_type(added.get(i)) if i in names else UNUSED for i in range(count)],
        "tokenizer.ggml.merges": [m if isinstance(m, str) else " ".join(m) for m in state["model"]["merges"]],
        "tokenizer.ggml.add_bos_token": bool(config.get("add_bos_token", False)),
    }
    ids = {token: id for id, token in names.items()}
    for name, middle in TOKENS.items():
        if isinstance(token := config.get(name), str):
            if token not in ids:
                raise DataError(f"the tokenizer's {name} {token!r} is not in its vocabulary")
            keys[f"tokenizer.ggml.{middle}_token_id"] = ids[token]
    further = [token for token in config.get("stop_tokens", ()) if token not in (config.get(end) for end in ENDS)]
    if len(further) > 1:
        raise DataError(f"a GGUF file names three ends, and this tokenizer has {', '.join(further[1:])} besides")
    if further:
        keys[FURTHER_END] = ids[further[0]]
    return keys | _templates(config.get("chat_template"))


def _templates(given: Any) -> dict[str, str]:
    """The chat template, or several by name, of which "default" is the nameless one."""
    if not given:
        return {}
    named = {"default": given} if isinstance(given, str) else {entry["name"]: entry["template"] for entry in given}
    return {TEMPLATE if name == "default" else f"{TEMPLATE}.{name}": text for name, text in named.items()}


def _filler(id: int) -> str:
    return f"[PAD{id}]"


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
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for name, middle in TOKENS.items():
        if keys.get(key := f"tokenizer.ggml.{middle}_token_id") is not None:
            config[name] = _token(keys, key, tokens)
    if "eos_token" in config:
        config.setdefault("eot_token", config["eos_token"])
    config["add_bos_token"] = keys.get("tokenizer.ggml.add_bos_token") is True
    if FURTHER_END in keys:
        config["stop_tokens"] = [_token(keys, FURTHER_END, tokens)]
    if isinstance(template := keys.get(TEMPLATE), str):
        others = {
            key.removeprefix(f"{TEMPLATE}."): text for key, text in keys.items() if key.startswith(f"{TEMPLATE}.")
        }
        named = [{"name": name, "template": text} for name, text in ({"default": template} | others).items()]
        config["chat_template"] = named if others else template
    return config


def _token(keys: Mapping[str, Any], key: str, tokens: list[str]) -> str:
    if not isinstance(id := keys[key], int) or not 0 <= id < len(tokens):
        raise DataError(f"the GGUF file's {key} is {id!r}; its tokens are 0 to {len(tokens) - 1:,}")
    return tokens[id]


def _type(added: Mapping[str, Any] | None) -> int:
    return NORMAL if added is None else CONTROL if added["special"] else USER_DEFINED


def _name_of(state: Mapping[str, Any]) -> str:
    """The name under which GGUF knows how this tokenizer cuts text. Raises DataError where it has none."""
    model = state["model"]
    if (kind := model["type"]) != "BPE":
        raise DataError(f"a tokenizer of the kind {kind} cannot be written into a GGUF file; byte-level BPE can")
    odd = [key for key in ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback") if model.get(key)]
    for entry in state["added_tokens"]:
        odd += [f"{entry['content']} with {flag}" for flag in ("lstrip", "rstrip", "single_word") if entry[flag]]
    if odd:
        raise DataError(f"the tokenizer has {odd[0]}, for which GGUF has no key")
    for name, pre in PRE.items():
        if _rules(json.loads(_core({}, [], pre).to_str())) == _rules(state):
            return name
    raise DataError(
        f"GGUF has no name for how this tokenizer cuts text, so llama.cpp would read other tokens; it has names for "
        f"the rules of {', '.join(PRE)}; tokenizer.rules=gguf trains one that cuts by {OWN_DIGITS}'s"
    )


def _rules(state: Mapping[str, Any]) -> tuple[Any, ...]:
    """What decides where text is cut. trim_offsets is about places in the text, which nobody asks for."""
    cuts = state["pre_tokenizer"] or {}
    parts = [{k: v for k, v in part.items() if k != "trim_offsets"} for part in cuts.get("pretokenizers", [cuts])]
    return state["normalizer"], parts, state["model"]["ignore_merges"]
