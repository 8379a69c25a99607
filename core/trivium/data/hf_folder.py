"""What a Hugging Face tokenizer folder says, in the few words that `Tokenizer` uses.

tokenizer.json holds the vocabulary and how text is cut; everything else is spread over files that grew over the years:
tokenizer_config.json (special tokens as text or as dicts, the chat template as text or as a list of named ones),
special_tokens_map.json, chat_template.jinja (which wins), and generation_config.json (further ids that end an answer).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from trivium.errors import DataError

NAMED = ("bos_token", "eos_token", "pad_token", "eot_token", "unk_token")
"""The special tokens that have a role. eot_token, the end of a turn, is this project's word."""
ENDS = ("<|eos|>", "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "<|eot_id|>", "[SEP]")
BEGINNINGS = ("<|bos|>", "<|begin_of_text|>", "<s>", "<bos>")
"""How the ends and beginnings of texts are commonly spelled, for a tokenizer.json that comes without settings."""
MOST_BYTES = 64_000_000
"""Of a tokenizer.json; the largest in use (262,144 tokens) has 33 MB."""
MOST_OTHER_BYTES = 8_000_000


def read_core(file: Path) -> tokenizers.Tokenizer:
    """A tokenizer.json as the library's object. Raises DataError for anything that it cannot read, panics included."""
    text = _text(file, MOST_BYTES)
    with library_errors():
        return tokenizers.Tokenizer.from_str(text)


@contextmanager
def library_errors() -> Iterator[None]:
    """Turn what the `tokenizers` library raises into DataError: bare Exceptions, and panics, which are none."""
    try:
        yield
    except (DataError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise DataError(f"tokenizer.json cannot be read ({str(error)[:200]})") from error


def settings_of(folder: Path, core: tokenizers.Tokenizer) -> dict[str, Any]:
    """The settings of the tokenizer in a folder. Tokens that only tokenizer_config.json knows are added to `core`.

    Raises DataError naming the file and the entry that is of no use.
    """
    given = _json(folder / "tokenizer_config.json")
    marked = "tokenizer_config.json"
    tokens = {key: _token(given[key], key, marked) for key in NAMED if key in given}
    if (other := folder / "special_tokens_map.json").is_file():
        words = _json(other)
        tokens = {key: _token(words[key], key, other.name) for key in NAMED if key in words} | tokens
    found: dict[str, Any] = {key: token for key, token in tokens.items() if token is not None}
    _add_missing(core, given.get("added_tokens_decoder") or {})
    template = _template(folder, given.get("chat_template"))
    if template:
        found["chat_template"] = template
    stops = [*_words(given.get("stop_tokens")), *_generation_ends(folder, core)]
    stops = [s for s in dict.fromkeys(stops) if s not in (found.get("eos_token"), found.get("eot_token"))]
    if stops:
        found["stop_tokens"] = stops
    if isinstance(given.get("add_bos_token"), bool):
        found["add_bos_token"] = given["add_bos_token"]
    elif "bos_token" in found and "eot_token" not in found:  # not written here: does its own way of encoding begin so?
        found["add_bos_token"] = begins_with(core, found["bos_token"])
    found["tokenizer_class"] = "PreTrainedTokenizerFast"  # reads tokenizer.json as it is; others rebuild it
    return found


def bare_settings(core: tokenizers.Tokenizer) -> dict[str, Any]:
    """Settings for a tokenizer.json alone: its ends and beginnings, known by their common spellings."""
    special = [token.content for token in core.get_added_tokens_decoder().values() if token.special]
    end = next((token for token in ENDS if token in special), None)
    if end is None:
        raise DataError(
            f"it has no tokenizer_config.json, and none of its special tokens ({', '.join(special[:4]) or 'none'}) is "
            'a known end of text; write {"eos_token": "..."} into a tokenizer_config.json beside it'
        )
    found: dict[str, Any] = {"eos_token": end, "tokenizer_class": "PreTrainedTokenizerFast"}
    begin = next((token for token in BEGINNINGS if token in special), None)
    if begin is not None:
        found |= {"bos_token": begin, "add_bos_token": begins_with(core, begin)}
    return found


def begins_with(core: tokenizers.Tokenizer, token: str) -> bool:
    """Whether the post-processor of `core` puts a token before a text."""
    ids = core.encode("a", add_special_tokens=True).ids
    return ids[:1] == [core.token_to_id(token)] and core.encode("a", add_special_tokens=False).ids[:1] != ids[:1]


def _add_missing(core: tokenizers.Tokenizer, decoder: Any) -> None:
    """Older folders keep some added tokens in tokenizer_config.json only: id -> token with its flags."""
    if not isinstance(decoder, Mapping) or not all(k.isdecimal() and len(k) < 10 for k in decoder):
        raise DataError("tokenizer_config.json has an added_tokens_decoder that is no mapping of ids to tokens")
    for key in sorted(decoder, key=int):
        entry = decoder[key]
        token = _added(entry)
        wanted, there = int(key), core.token_to_id(token.content)
        if there is None:
            (core.add_special_tokens if token.special else core.add_tokens)([token])
            there = core.token_to_id(token.content)
        if there != wanted:
            raise DataError(f"tokenizer_config.json gives {token.content[:80]!r} the id {key}, tokenizer.json {there}")


def _added(entry: Any) -> AddedToken:
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    content = entry.get("content") if isinstance(entry, Mapping) else None
    chosen = {flag: entry[flag] for flag in flags if flag in entry} if isinstance(entry, Mapping) else {}
    if not isinstance(content, str) or not content or not all(isinstance(value, bool) for value in chosen.values()):
        raise DataError(f"tokenizer_config.json has an added token that is none: {str(entry)[:80]}")
    return AddedToken(content, **chosen)


def _token(value: Any, key: str, file: str) -> str | None:
    """A special token written as text, as a dict with its content, or as null."""
    found = value.get("content") if isinstance(value, Mapping) else value
    if found is not None and not (isinstance(found, str) and found):
        raise DataError(f"{file} has no usable {key}: {str(value)[:80]}; text is needed")
    return found


def _words(value: Any) -> list[str]:
    if not isinstance(value or [], list) or not all(isinstance(word, str) for word in value or []):
        raise DataError(f"tokenizer_config.json has stop_tokens that are no list of text: {str(value)[:80]}")
    return value or []


def _template(folder: Path, given: Any) -> str | list[dict[str, str]]:
    if (file := folder / "chat_template.jinja").is_file():
        return _text(file, MOST_OTHER_BYTES)
    if isinstance(given, list):
        known = all(
            isinstance(e, Mapping) and isinstance(e.get("name"), str) and isinstance(e.get("template"), str)
            for e in given
        )
        named = {e["name"]: e["template"] for e in given} if known else {}
        if "default" not in named:
            raise DataError("tokenizer_config.json has a list of chat templates without one named default")
        return named["default"] if len(named) == 1 else [{"name": n, "template": t} for n, t in named.items()]
    if not isinstance(given or "", str):
        raise DataError(f"tokenizer_config.json has a chat_template that is neither text nor a list: {str(given)[:80]}")
    return given or ""


def _generation_ends(folder: Path, core: tokenizers.Tokenizer) -> list[str]:
    file = folder / "generation_config.json"
    if not file.is_file():
        return []
    ends = _json(file).get("eos_token_id")
    ids = ends if isinstance(ends, list) else [] if ends is None else [ends]
    tokens = [core.id_to_token(i) if type(i) is int and 0 <= i < 2**31 else None for i in ids]
    if None in tokens:
        raise DataError(f"generation_config.json has eos_token_id={str(ends)[:80]}, which its vocabulary does not")
    return [token for token in tokens if token is not None]


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(_text(file, MOST_OTHER_BYTES))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file.name} cannot be read ({str(error)[:200]})") from error
    if not isinstance(found, dict):
        raise DataError(f"{file.name} cannot be read (it is no mapping)")
    return found


def _text(file: Path, most: int) -> str:
    try:
        if file.stat().st_size > most:
            raise DataError(f"{file.name} has {file.stat().st_size:,} bytes; at most {most:,} are read")
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file.name} cannot be read ({error})") from error
