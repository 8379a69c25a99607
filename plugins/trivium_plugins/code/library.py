"""The running Python's standard library: its modules as text, and its functions with docstrings as things to write.

Files are read and parsed, never imported. A module belongs to one split by the hash of its text, and its functions go
with it; a function that stands in two modules is kept once. Encodings and their like copy one another: a held-out piece
of which the modules trained on have a fifth is left out.
"""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from trivium import DataError, copied, split_of

DOCUMENT = 6_000
"""Characters aimed at: a longer module is cut before the line of a top-level statement."""
TABLE = 30_000
"""Characters of one statement from which on it is a table (of an encoding, of help texts), and left out."""
LONGEST, SHORTEST = 1_200, 120
"""Characters of a function that is asked for."""
LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__", "turtledemo"}
SHARES = (0.05, 0.1)
"""Of modules, for validation and test."""


def folder() -> Path:
    """Where the standard library lies."""
    return Path(sysconfig.get_paths()["stdlib"])


@lru_cache(maxsize=1)
def modules() -> tuple[tuple[str, str], ...]:
    """(path within the library, text) of every module that can be read, by path; a copied file comes once."""
    found, seen = [], set()
    for path in sorted(folder().rglob("*.py")):
        name = path.relative_to(folder())
        if LEFT_OUT & set(name.parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if len(text) >= SHORTEST and text not in seen:
            seen.add(text)
            found.append((name.as_posix(), text))
    if not found:
        raise DataError(
            f"{folder()} has no modules of the standard library as text; install Python's library files, or leave "
            "modules and functions out of data.parts"
        )
    return tuple(found)


@lru_cache(maxsize=3)
def documents(split: str) -> tuple[dict[str, Any], ...]:
    """Modules of a split, long ones in pieces; held out is none that is for the most part in those trained on."""
    found = tuple(
        {"id": f"modules/{name}/{i}", "text": piece}
        for name, text in modules()
        if split_of(text, *SHARES) == split
        for i, piece in enumerate(_pieces(text))
    )
    twins = copied(documents("train"), found) if split != "train" else ()
    return tuple(one for one in found if one["id"] not in twins)


def _pieces(text: str) -> Iterator[str]:
    lines = text.splitlines(keepends=True)
    starts = [_first_line(node) - 1 for node in _statements(text)]
    begin = 0
    for start in [*starts, len(lines)]:
        if start == len(lines) or sum(map(len, lines[begin:start])) >= DOCUMENT:
            piece = "".join(lines[begin:start]).strip()
            begin = start
            if 0 < len(piece) < TABLE:
                yield piece


def _statements(text: str) -> list[ast.stmt]:
    """At the top of a module; none where Python cannot parse it."""
    try:
        return ast.parse(text).body
    except (SyntaxError, ValueError):
        return []


def _first_line(node: ast.stmt) -> int:
    decorators = getattr(node, "decorator_list", [])
    return min([node.lineno, *(d.lineno for d in decorators)])


@lru_cache(maxsize=3)
def functions(split: str) -> tuple[dict[str, Any], ...]:
    """Functions of a split's modules: the head with its docstring is asked, the whole function is the answer."""
    found, seen = [], set()
    for name, text in modules():
        here = split_of(text, *SHARES) == split
        for function, asked, answer in _functions(text):
            if answer in seen:
                continue
            seen.add(answer)
            if here:
                ask = {"role": "user", "content": f"Write the Python function {function}.\n\n{fenced(asked)}"}
                turns = [ask, {"role": "assistant", "content": fenced(answer)}]
                place = f"functions/{name}/{len(found)}/{function}"
                found.append({"id": place, "source": "functions", "messages": turns})
    return tuple(found)


def _functions(text: str) -> Iterator[tuple[str, str, str]]:
    """(name, head with docstring, the function without its docstring) of plain functions at the top of a module."""
    lines = text.splitlines()
    for node in _statements(text):
        if not isinstance(node, ast.FunctionDef) or node.decorator_list or not ast.get_docstring(node):
            continue
        first, *rest = node.body
        if not rest or first.lineno == node.lineno:
            continue
        head = lines[node.lineno - 1 : first.lineno - 1]
        asked = "\n".join([*head, *lines[first.lineno - 1 : first.end_lineno]])
        answer = "\n".join([*head, *lines[first.end_lineno or 0 : node.end_lineno]])
        if SHORTEST <= len(answer) <= LONGEST and len(asked) <= LONGEST:
            yield node.name, asked, answer


def fenced(code: str) -> str:
    """As a block of Markdown."""
    return f"```python\n{code.rstrip()}\n```"
