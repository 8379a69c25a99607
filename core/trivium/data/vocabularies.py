"""Vocabularies that others trained, in whichever file they come: `tokenizer.path=`.

A Hugging Face folder or tokenizer.json is read as it is. Two other kinds are rebuilt in the `tokenizers` library, with
the same ids for every text: tiktoken's ranks (https://github.com/openai/tiktoken) and SentencePiece models (Kudo &
Richardson 2018, https://arxiv.org/abs/1808.06226), whose protobuf is read here without their library.
"""

from __future__ import annotations

import base64
import binascii
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from trivium.data.hf_folder import library_errors
from trivium.data.tokenizer import Tokenizer
from trivium.errors import DataError
from trivium.registry import near_misses

MOST_BYTES = 64_000_000
"""Of a file; the largest in use has 5 MB."""


@dataclass(frozen=True)
class Encoding:
    """What a ranks file does not say: how text is cut, and the special tokens with their ids."""

    pattern: str
    special: Mapping[str, int]


END = "<|endoftext|>"
_FIM = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")
# The patterns of tiktoken_ext/openai_public.py, in the words of Oniguruma: there `$` is the end of a line, `\z` of the
# text, and a `+` after braces repeats them.
_R50K = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s"
_CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s++\z|\s*[\r\n]|\s+(?!\S)|\s"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_O200K = "|".join(
    [
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_SHORT}",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_SHORT}",
        r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ]
)
_CL100K_SPECIAL = {END: 100257, **dict(zip(_FIM, range(100258, 100261), strict=True)), "<|endofprompt|>": 100276}
ENCODINGS: dict[str, Encoding] = {
    "gpt2": Encoding(_R50K, {END: 50256}),
    "r50k_base": Encoding(_R50K, {END: 50256}),
    "p50k_base": Encoding(_R50K, {END: 50256}),
    "cl100k_base": Encoding(_CL100K, _CL100K_SPECIAL),
    "o200k_base": Encoding(_O200K, {END: 199999, "<|endofprompt|>": 200018}),
}


def load_tokenizer(path: str | Path, encoding: str = "") -> Tokenizer:
    """A tokenizer from a folder, a tokenizer.json, a tiktoken ranks file or a SentencePiece model.

    encoding: of a ranks file, one of ENCODINGS; without it the file's name says which. Raises DataError.
    """
    path = Path(path)
    if path.is_dir() or path.suffix == ".json" or not path.exists():
        return Tokenizer.load(path)
    if path.stat().st_size > MOST_BYTES:
        raise DataError(f"{path} has {path.stat().st_size:,} bytes; at most {MOST_BYTES:,} are read")
    content = path.read_bytes()
    if path.suffix == ".model" and not _are_ranks(content):
        return from_sentencepiece(content, str(path))
    if path.suffix == ".tiktoken" or _are_ranks(content):
        return from_ranks(content, str(path), encoding or path.name.split(".")[0])
    raise DataError(
        f"tokenizer.path={path} is neither a folder with a tokenizer.json, nor such a file, nor tiktoken ranks, nor a "
        "SentencePiece .model"
    )


def _are_ranks(content: bytes) -> bool:
    return re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\n", content[:4096]) is not None


def from_ranks(content: bytes, origin: str, encoding: str) -> Tokenizer:
    """tiktoken's ranks, a base64 token and its id a line, as byte-level BPE with the same ids.

    tiktoken joins whichever neighbours make the token of the lowest rank, so every way of making a token is a merge,
    in the order of ranks; and a piece that is a token is one, whatever merges lead to it.
    """
    if encoding not in ENCODINGS:
        raise DataError(
            f"{origin} has tiktoken ranks of the unknown encoding {encoding!r}, so how text is cut is not known; set "
            f"tokenizer.encoding= to one of {', '.join(ENCODINGS)}.{near_misses(encoding, ENCODINGS)}"
        )
    chosen = ENCODINGS[encoding]
    ranks = _ranks(content, origin)
    letters = _byte_letters()
    if any(bytes([b]) not in ranks for b in range(256)):
        raise DataError(f"{origin} has no rank for some of the 256 bytes, so some texts would have no tokens")
    vocab = {"".join(letters[b] for b in token): rank for token, rank in ranks.items()}
    taken = set(vocab.values())
    if len(taken) < len(vocab) or taken & set(chosen.special.values()):
        raise DataError(f"{origin} is not encoding {encoding}: two of its tokens have one id")
    special = dict(chosen.special)
    holes = set(range(max(*taken, *special.values()))) - taken - set(special.values())
    if len(holes) > 64:
        raise DataError(f"{origin} is not encoding {encoding}: {len(ranks):,} ranks, with ids up to {max(taken):,}")
    for hole in holes:
        special[f"<|unused_{hole}|>"] = hole  # ids run without holes, so that they can be saved
    merges = []
    for token, rank in ranks.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ranks and right in ranks:
                merges.append((rank, ranks[left], left, right))
    merges.sort()
    spelled = [tuple("".join(letters[b] for b in part) for part in (left, right)) for _, _, left, right in merges]
    core = tokenizers.Tokenizer(models.BPE(vocab | special, spelled, ignore_merges=True))  # type: ignore[arg-type]
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(chosen.pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(t, normalized=False) for t in sorted(special, key=special.__getitem__)])
    return Tokenizer(core, {"eos_token": END, "tokenizer_class": "PreTrainedTokenizerFast"})


def _ranks(content: bytes, origin: str) -> dict[bytes, int]:
    found = {}
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            token, rank = line.split()
            found[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise DataError(f"{origin}:{number} is no base64 token and its rank ({error})") from error
    if not found or min(found.values()) < 0 or max(found.values()) > 2**24:
        raise DataError(f"{origin} has no tiktoken ranks, or ranks beyond {2**24:,}")
    return found


def _byte_letters() -> list[str]:
    """The letter of each byte in byte-level vocabularies (GPT-2): itself where it prints, else one above 255."""
    prints = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    above = iter(range(256, 512))
    return [chr(b) if b in prints else chr(next(above)) for b in range(256)]


# ---- SentencePiece

NORMAL, UNKNOWN, CONTROL, USER, _UNUSED, _BYTE = range(1, 7)
"""Types of pieces in sentencepiece_model.proto."""
_MODEL_TYPES = {1: "unigram", 2: "bpe"}


def from_sentencepiece(content: bytes, origin: str) -> Tokenizer:
    """A SentencePiece model (unigram or BPE) with the ids that SentencePieceProcessor.encode gives.

    Where two ways of cutting a word have one and the same probability, either may be taken.
    """
    try:
        fields = _grouped(content)
        pieces = [_piece(raw) for raw in fields.get(1, [])]
        trainer, normalizer = (_grouped(fields.get(n, [b""])[-1]) for n in (2, 3))
        kind, unk = _number(trainer, 3, 1), _number(trainer, 40, 0)
        named = {k: _number(trainer, n, d) for k, n, d in (("bos", 41, 1), ("eos", 42, 2), ("pad", 43, -1))}
        flags = [bool(_number(normalizer, n, 1)) for n in (3, 4, 5)]
        charsmap = bytes(normalizer.get(2, [b""])[-1])
        byte_fallback = bool(_number(trainer, 35, 0))
    except (ValueError, IndexError, TypeError, struct.error) as error:
        raise DataError(f"{origin} is no SentencePiece model ({error})") from error
    if kind not in _MODEL_TYPES or not pieces or not 0 <= unk < len(pieces):
        raise DataError(
            f"{origin} is a SentencePiece model of another type than unigram and bpe, or without an unk piece"
        )
    texts = [text for text, _, _ in pieces]
    whole = sorted((text for text, _, kind in pieces if kind == USER), key=len, reverse=True)
    words = {f"{name}_token": texts[i] for name, i in named.items() if 0 <= i < len(pieces)}
    with library_errors():
        if kind == 1:
            model = models.Unigram([(text, score) for text, score, _ in pieces], unk, byte_fallback)
        else:
            vocab = {text: i for i, text in enumerate(texts)}
            model = models.BPE(vocab, _merges(pieces), unk_token=texts[unk], fuse_unk=True, byte_fallback=byte_fallback,
                               ignore_merges=bool(whole))  # fmt: skip
        core = tokenizers.Tokenizer(model)
        core.normalizer = _normalizer(charsmap, *flags)
        if whole:  # never cut and never joined with their neighbours
            core.pre_tokenizer = pre_tokenizers.Split(Regex("|".join(map(re.escape, whole))), behavior="isolated")
        fallback = [decoders.ByteFallback()] if byte_fallback else []
        strip = [decoders.Strip(content=" ", left=1, right=0)] if flags[0] else []
        core.decoder = decoders.Sequence([decoders.Replace("▁", " "), *fallback, decoders.Fuse(), *strip])
        core.add_special_tokens([AddedToken(t, normalized=False) for t, _, k in pieces if k in (UNKNOWN, CONTROL)])
        return Tokenizer(core, {**words, "unk_token": texts[unk], "tokenizer_class": "PreTrainedTokenizerFast"})


def _normalizer(charsmap: bytes, prefix: bool, trim: bool, escape: bool) -> Any:
    """SentencePiece's order: characters, spaces, a space before the text, spaces as "▁" (only spaces: breaks stay).

    A "▁" that was typed at the end goes with the spaces there, since it looks for them when they are written so.
    """
    steps: list[Any] = [normalizers.Precompiled(charsmap)] if charsmap else []
    if trim:
        steps += [
            normalizers.Replace(Regex(r"\A +|[ ▁]+\z" if escape else r"\A +| +\z"), ""),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    if prefix:
        steps.append(normalizers.Prepend(" "))
    if escape:
        steps.append(normalizers.Replace(" ", "▁"))
    return normalizers.Sequence(steps)


def _merges(pieces: list[tuple[str, float, int]]) -> list[tuple[str, str]]:
    """Every way of making a piece of two, the best score first: neighbours join while they make a piece."""
    normal = {text: (-score, i) for i, (text, score, kind) in enumerate(pieces) if kind == NORMAL}
    found = []
    for text, order in normal.items():
        for cut in range(1, len(text)):
            if text[:cut] in normal and text[cut:] in normal:
                found.append((*order, text[:cut], text[cut:]))
    return [(left, right) for _, _, left, right in sorted(found)]


def _piece(raw: bytes) -> tuple[str, float, int]:
    fields = _grouped(raw)
    (score,) = struct.unpack("<f", fields.get(2, [b"\0\0\0\0"])[-1])
    return bytes(fields[1][-1]).decode() if 1 in fields else "", score, _number(fields, 3, NORMAL)


def _number(fields: Mapping[int, list[Any]], field: int, default: int) -> int:
    value = fields.get(field, [default])[-1]
    if not isinstance(value, int):
        raise ValueError(f"field {field} is no number")
    return value - 2**64 if value >= 2**63 else value


def _grouped(raw: bytes) -> dict[int, list[Any]]:
    found: dict[int, list[Any]] = {}
    for field, value in _wire(raw):
        found.setdefault(field, []).append(value)
    return found


def _wire(raw: bytes) -> Iterator[tuple[int, Any]]:
    """Fields of one protobuf message: numbers as int, everything else as bytes. Raises ValueError where it is none."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = raw[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7
            if shift > 63:
                raise ValueError("a number is too long")

    while at < len(raw):
        key = varint()
        if key & 7 == 0:
            yield key >> 3, varint()
            continue
        if key & 7 not in (1, 2, 5):
            raise ValueError(f"a field has the unknown wire type {key & 7}")
        size = varint() if key & 7 == 2 else 8 if key & 7 == 1 else 4
        if at + size > len(raw):
            raise ValueError("it ends in the middle of a field")
        yield key >> 3, raw[at : at + size]
        at += size
