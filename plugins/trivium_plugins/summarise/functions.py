"""Functions and methods of the standard library, without their docstring, and the first sentence of it."""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterator

from trivium import split_of
from trivium_plugins.code.library import SHARES, modules

SENTENCE = re.compile(r"([A-Z].*?\.)(?=\s|\Z)", re.S)
"""The first one: it begins with a capital and ends with a full stop."""


def said(max_characters: int, split: str) -> Iterator[tuple[str, str, str]]:
    """(place, code, first sentence). A function belongs to its module's split, as in the plugin `code`."""
    seen: set[str] = set()
    for name, text in modules():
        here = split_of(text, *SHARES) == split
        for code, sentence in _functions(text, max_characters):
            if code not in seen:
                seen.add(code)
                if here:
                    yield name, code, sentence


def _functions(text: str, most: int) -> Iterator[tuple[str, str]]:
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return
    lines = text.splitlines()
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or len(node.body) < 2 or not (said := ast.get_docstring(node)):
            continue
        first = node.body[0]
        found = SENTENCE.match(" ".join(said.split("\n\n")[0].split()))
        if first.lineno == node.lineno or not found or not 3 <= len(found[1].split()) <= 20:
            continue
        kept = [*lines[node.lineno - 1 : first.lineno - 1], *lines[first.end_lineno or 0 : node.end_lineno]]
        code = textwrap.dedent("\n".join(kept)).strip()
        if len(code) <= most:
            yield code, found[1]
