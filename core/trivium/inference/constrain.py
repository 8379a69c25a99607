"""Answers of a given form: a JSON schema or a regular expression as the tokens that may come next.

The grammar is llguidance's (https://github.com/guidance-ai/llguidance), which computes the exact set of tokens after
each token. Nothing is approximated and nothing ignored: what a schema or regex asks beyond what is held here is refused
by name before the first token. A schema's keywords are a list of ours, since the library lets unknown ones pass.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from trivium.data.tokenizer import Tokenizer
from trivium.errors import BackendError
from trivium.types import SamplingParams

CONSTRAINTS = frozenset({"json_schema", "regex"})
MOST_BYTES, MOST_DEPTH = 65536, 32
"""Of a schema or regex; deeper than people write, shallow enough for every parser that reads it."""
INSTALL = 'inference=native can where llguidance is installed: pip install -e ".[grammar]"'
COMPILED = 64
"""Grammars that are kept."""
LIMITS = {"initial_lexer_fuel": 200_000, "step_lexer_fuel": 100_000, "max_lexer_states": 50_000,
          "max_grammar_size": 100_000, "step_max_items": 50_000, "verbose_errors": False}  # fmt: skip
"""llguidance's, in its own units of work, so that the same grammar is refused on every machine: about 0.1 s to compile,
10 ms a token."""
PLAIN = frozenset({"title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment",
                   "$schema"})  # fmt: skip
"""Keywords that ask for nothing."""
HELD = frozenset({"type", "enum", "const", "required", "minItems", "maxItems", "minLength", "maxLength", "minimum",
                  "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "$ref"})  # fmt: skip
ONE, MANY, NAMED = ("items", "additionalProperties"), ("anyOf", "allOf", "oneOf", "prefixItems"), (
    "properties", "patternProperties", "$defs", "definitions",
)  # fmt: skip
"""Keywords that hold a schema, a list of them, schemas by name."""
FORMATS = frozenset({"uuid", "ipv4", "ipv6"})
"""Those that the grammar describes wholly; of a date it does not know how long February is."""
OPTIONS: Any = {
    "item_separator": ",", "key_separator": ":", "whitespace_flexible": True, "whitespace_pattern": "[ ]?",
    "coerce_one_of": False, "lenient": False, "json_allow_general_unicode_escapes": False,
}  # fmt: skip
"""At most one space between tokens of JSON: none of the endless ones that a model can fall into. All are told, so that
a schema's own "x-guidance" could not change them."""
ESCAPE = re.compile(r"\\(?:x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|[dDwWsSntrfv]|[^0-9a-zA-Z])")
GROUP = re.compile(r"\((?:\?:|\?P<\w+>|(?!\?))", re.ASCII)
REPEAT = re.compile(r"[*+?]|\{\d*,?\d*\}")
"""What a regex may say; of \\d, \\w and \\s only ASCII counts."""


def installed() -> bool:
    """Whether the grammar library is there (extra `grammar`)."""
    return importlib.util.find_spec("llguidance") is not None


def how_to_hold() -> str:
    """What to install for it, as the end of a sentence; empty where the library is there."""
    return "" if installed() else f"; {INSTALL}"


class Grammar:
    """A row's Constraint. stop_ids: tokens that end the answer, allowed exactly when its text may end."""

    def __init__(self, matcher: Any, never: Tensor, first: Tensor, stop_ids: Sequence[int]) -> None:
        self._matcher, self._never, self._first, self._stops = matcher, never, first, list(stop_ids)
        self._begun = False

    def forbid(self, logits: Tensor) -> None:
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._raise_error()
        allowed = torch.from_numpy(np.unpackbits(bits, bitorder="little")[: len(logits)].astype(bool))
        allowed &= ~(self._never if self._begun else self._first)
        allowed[self._stops] = self._matcher.is_accepting()
        logits.masked_fill_(~allowed.to(logits.device), -torch.inf)

    def accept(self, token: int) -> None:
        """`token` was drawn. An error shows when the next is asked for."""
        self._begun = True
        if token not in self._stops:
            self._matcher.consume_token(token)

    @property
    def done(self) -> bool:
        return not self._matcher.is_error() and self._matcher.is_stopped() and self._matcher.is_accepting()

    def _raise_error(self) -> None:
        if self._matcher.is_error():
            raise BackendError(f"the constraint cannot go on: {_first_line(self._matcher.get_error())}")


class Grammars:
    """Constraints for a tokenizer and a model's vocabulary, each compiled once."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self.tokenizer, self.vocab_size = tokenizer, vocab_size
        self._compiled = lru_cache(maxsize=COMPILED)(self._compile)

    def constraint(self, params: SamplingParams) -> Grammar | None:
        """What a request asks for, at its beginning. Raises BackendError naming what cannot be held."""
        if not (params.json_schema or params.regex):
            return None
        kind, text = ("json_schema", params.json_schema) if params.json_schema else ("regex", params.regex)
        _, never, first = self._words()
        return Grammar(self._compiled(kind, text).deep_copy(), never, first, params.stop_ids)

    def _words(self) -> Words:
        found = table_of(self.tokenizer, self.vocab_size)
        if isinstance(found, str):
            raise BackendError(found)
        return found

    def _compile(self, kind: str, text: str) -> Any:
        import llguidance

        if (size := len(text.encode())) > MOST_BYTES:
            raise BackendError(f"{kind} has {size} bytes; at most {MOST_BYTES} are taken")
        if kind == "regex":
            if told := unsupported_in_regex(text):
                raise BackendError(f"regex {text[:80]!r}: {told} is not supported")
            grammar = llguidance.LLMatcher.grammar_from_lark(f"start: /{llguidance.regex_to_lark(text, 'dws')}/")
        else:
            schema = _schema_of(text)
            if told := unsupported_in_schema(schema):
                raise BackendError(f"json_schema: {told} is not supported")
            grammar = llguidance.LLMatcher.grammar_from_json_schema(schema, overrides=OPTIONS)
        matcher = llguidance.LLMatcher(
            self._words().words, grammar, log_level=0, limits=llguidance.LLParserLimits(**LIMITS)
        )
        told = matcher.get_error() or "; ".join(matcher.get_grammar_warnings()) or _tried(matcher.deep_copy())
        if told:
            raise BackendError(f"{kind} cannot be held: {_first_line(told)}")
        return matcher


def _tried(matcher: Any) -> str:
    """What is wrong with a grammar by its first two tokens; much of it is only built when it is used."""
    for _ in range(2):
        allowed = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8), bitorder="little")
        if matcher.is_error() or matcher.is_stopped() or not allowed.any():
            break
        matcher.consume_token(int(allowed.argmax()))
    return matcher.get_error()


class Words(NamedTuple):
    """words: the vocabulary as llguidance has it. never, first: (V,) tokens whose text is not what their bytes say,
    anywhere, and as an answer's first."""

    words: Any
    never: Tensor
    first: Tensor


@lru_cache(maxsize=4)
def table_of(tokenizer: Tokenizer, vocab_size: int) -> Words | str:
    """The vocabulary for constraints, or why there can be none. Of 128,000 tokens it takes 4 s, so it is made once.

    The grammar is about bytes, the answer is text: a token counts only where both agree, also at the beginning, where
    some tokenizers drop a space.
    """
    import llguidance

    try:
        words = llguidance.LLTokenizer(
            tokenizer.text, n_vocab=max(vocab_size, tokenizer.vocab_size), eos_token=tokenizer.eos_id
        )
    except Exception as error:  # its own code raises anything for a tokenizer that it does not know
        return f"constraints cannot be held with this tokenizer: {_first_line(str(error))}"
    ids = range(min(vocab_size, tokenizer.vocab_size))
    said = [words.decode_bytes([i]) for i in ids]
    alone = tokenizer.decode_batch([[i] for i in ids])
    plain = [i for i in ids if alone[i].isalpha() and alone[i].encode() == said[i]]
    if not plain:
        return "constraints cannot be held with this tokenizer: no token of it is a plain word"
    anchor = max(plain, key=lambda i: len(alone[i]))  # no piece that is a byte: those are read together
    after = tokenizer.decode_batch([[anchor, i] for i in ids])
    never, first = torch.ones(vocab_size, dtype=torch.bool), torch.ones(vocab_size, dtype=torch.bool)
    for i in ids:
        text = said[i].decode("utf-8", "replace")  # as decoders do with a part of a character
        never[i] = after[i] != alone[anchor] + text
        first[i] = never[i] or alone[i] != text
    return Words(words, never, first)


def _first_line(text: str) -> str:
    return (text.strip().splitlines() or ["unknown error"])[0][:300]


def _schema_of(text: str) -> dict[str, Any]:
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BackendError(f"json_schema is no JSON ({error})") from error
    if not isinstance(schema, dict):
        raise BackendError("json_schema must be an object")
    return schema


def unsupported_in_schema(schema: Any, path: str = "", depth: int = 0) -> str:
    """The first keyword of a schema that is not held, and where; "" where all are."""
    at = path or "its root"
    if isinstance(schema, bool):
        return ""
    if not isinstance(schema, dict):
        return f"{json.dumps(schema)[:40]} at {at}, which is no schema,"
    if depth > MOST_DEPTH:
        return f"a schema deeper than {MOST_DEPTH}"
    for key, value in schema.items():
        here = f"{path}/{key}"
        inner: list[tuple[str, Any]] = []
        if key in ONE:
            inner = [(here, value)]
        elif key in MANY and isinstance(value, list):
            inner = [(f"{here}/{i}", part) for i, part in enumerate(value)]
        elif key in NAMED and isinstance(value, dict):
            inner = [(f"{here}/{name}", part) for name, part in value.items()]
            if key == "patternProperties" and (told := next(filter(None, map(_in_pattern, value)), "")):
                return f"{told} in {key} at {at}"
        elif key == "pattern" and isinstance(value, str):
            if told := _in_pattern(value):
                return f"{told} in {key}={value[:80]!r} at {at}"
        elif key == "format":
            if value not in FORMATS:
                return f"format={value!r} at {at} (only {', '.join(sorted(FORMATS))} can be held wholly)"
        elif key == "$ref" and not str(value).startswith("#"):
            return f"$ref={value!r} at {at} (only references within the schema, #/...)"
        elif key == "multipleOf" and (not isinstance(value, int) or isinstance(value, bool)):
            return f"multipleOf={value!r} at {at} (only whole numbers)"
        elif key.startswith("exclusiveM") and isinstance(value, bool):
            return f"{key}={json.dumps(value)} at {at} (of draft 4; it is a number since)"
        elif key not in PLAIN and key not in HELD:
            return f"{key} at {at}"
        for where, part in inner:
            if told := unsupported_in_schema(part, where, depth + 1):
                return told
    return ""


def _in_pattern(text: str) -> str:
    """A pattern of a schema is found anywhere, so it may say where it begins and ends."""
    return unsupported_in_regex(text, anchors=True)


def unsupported_in_regex(text: str, anchors: bool = False) -> str:
    r"""What in a regex the grammar cannot hold, or reads otherwise than Python's `re` with re.ASCII; "" for nothing.
    anchors: whether ^ may be its first character and $ its last.

    >>> unsupported_in_regex(r"(ab|[^\d-]{2,3})+"), unsupported_in_regex(r"a(?=b)"), unsupported_in_regex(r"^a$")
    ('', '(?=', '^ (a regex is always of the whole answer)')
    """
    at, depth, repeated, word = 0, 0, False, 0
    while at < len(text):
        if part := ESCAPE.match(text, at):
            word, repeated = len(part[0]), False
        elif text[at] == "\\":
            return text[at : at + 2]
        elif text[at] == "[":
            end, told = _class_end(text, at)
            if told:
                return told
            word, repeated = end - at, False
        elif text[at] == "(":
            part = GROUP.match(text, at)
            if not part:
                return text[at : at + 3]
            word, depth, repeated = len(part[0]), depth + 1, False
        elif part := REPEAT.match(text, at):
            if repeated:
                return f"{text[at - 1 : at + 1]} (a lazy or possessive repetition)"
            word, repeated = len(part[0]), True
        elif text[at] in "^$":
            if not anchors or at != (0 if text[at] == "^" else len(text) - 1):
                return f"{text[at]} (a regex is always of the whole answer)" if not anchors else f"{text[at]} inside"
            word = 1
        else:
            depth -= text[at] == ")"
            word, repeated = 1, False
        if depth > MOST_DEPTH:
            return f"more than {MOST_DEPTH} groups in one another"
        at += word
    try:
        re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        return f"what is no regular expression ({error})"
    return ""


def _class_end(text: str, start: int) -> tuple[int, str]:
    """Where the character class that begins at `start` ends, and what in it is read differently."""
    at = start + 1 + text.startswith("^", start + 1)
    first = at
    while at < len(text) and (text[at] != "]" or at == first):
        pair = text[at : at + 2]
        if text[at] == "[":
            return at, "[ in a character class (write \\[)"
        if pair in ("&&", "--", "~~", "||"):
            return at, f"{pair} in a character class"
        if text[at] == "\\":
            if not ESCAPE.match(text, at):
                return at, f"{pair} in a character class"
            at += 1
        at += 1
    return at + 1, ""
