"""Cleaning steps that change one text and need no other: characters and blanks.

A step is a pure function: text in; out come the text and how often each thing was done, nothing where it is as it was.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from typing import Any

from trivium.data.config import CleaningConfig
from trivium.data.pii import without_pii
from trivium.errors import ConfigError

Change = Callable[[str], tuple[str, Mapping[str, int]]]

CONTROL = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f-\x84\x86-\x9f\ufeff\ufffe\uffff]")
"""Characters that are no text: C0 and C1 but for tab, line feed, carriage return, form feed and next line; the mark
that some files begin with."""
SURROGATE = re.compile("[\ud800-\udfff]")
LINE_ENDS = re.compile("\r\n?")
TRAILING = re.compile("[ \t\u00a0]+(?=\n)")
BLANK_LINES = re.compile("\n{4,}")


def optional(module: str, setting: str) -> Any:
    """A package that only some steps need. Raises ConfigError saying which step asks for it and how it is had."""
    try:
        return import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ConfigError(
            f"{setting} needs {package}, which is not installed: pip install trivium-llm[clean]"
        ) from error


def normal_unicode(text: str, fix: Callable[[str], str] | None = None) -> tuple[str, dict[str, int]]:
    """NFC, no control characters, no halves of characters. fix: undoes wrong decoding first.

    >>> normal_unicode("cafe\\u0301\\x00")
    ('café', {'control characters': 1, 'not composed': 1})
    """
    counts: dict[str, int] = {}
    if fix is not None and not text.isascii() and (fixed := fix(text)) != text:
        text, counts["mojibake"] = fixed, 1
    text, found = CONTROL.subn("", text)
    if found:
        counts["control characters"] = found
    if text.isascii():
        return text, counts
    text, found = SURROGATE.subn("\ufffd", text)
    if found:
        counts["half characters"] = found
    composed = unicodedata.normalize("NFC", text)
    if composed != text:
        counts["not composed"] = 1
    return composed, counts


def tidy_whitespace(text: str) -> tuple[str, dict[str, int]]:
    """One kind of line end, no blanks before it, at most two blank lines in a row; indentation stays.

    The two ends of a text stay too: the blank that a completion begins with is part of what is learned.

    >>> tidy_whitespace("if a:\\r\\n    b  \\n\\n\\n\\n\\nc ")
    ('if a:\\n    b\\n\\n\\nc ', {'line ends': 1, 'trailing blanks': 1, 'blank lines': 1})
    """
    counts = {}
    for name, pattern, put in (
        ("line ends", LINE_ENDS, "\n"), ("trailing blanks", TRAILING, ""), ("blank lines", BLANK_LINES, "\n\n\n"),
    ):  # fmt: skip
        text, found = pattern.subn(put, text)
        if found:
            counts[name] = found
    return text, counts


def change_of(step: str, settings: CleaningConfig) -> Change:
    """The changing step of this name."""
    if step == "unicode":
        wrong = "data.clean=[unicode] with data.cleaning.mojibake=true"
        return partial(normal_unicode, fix=optional("ftfy", wrong).fix_encoding if settings.mojibake else None)
    return {"whitespace": tidy_whitespace, "pii": without_pii}[step]
