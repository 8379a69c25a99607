"""Sections of documentation: the running text under a title, from reStructuredText and from Python's help topics."""

from __future__ import annotations

import ast
import gzip
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path

from trivium import DataError, FetchEntry, fetch, files_of
from trivium_plugins.code.library import folder

CATALOGUE: Mapping[str, FetchEntry] = {
    "python3.11-doc": FetchEntry(
        kind="debian",
        package="python3.11-doc",
        version="3.11.2-6+deb12u8",
        file="",
        sha256="50eb63e7f636c4281e9ce1b8f10386f1def42159eddce34fc1f41c46261df71b",
        size=12_642_400,
        licence="PSF-2.0",
        pool="pool/main/p/python3.11/python3.11-doc_3.11.2-6+deb12u8_all.deb",
    )
}
SAMPLE = Path(__file__).with_name("data") / "manual"
UNDERLINE = re.compile(r"([=\-~^\"'*#+`:.])\1{2,}\s*")
ROLE = re.compile(r":[\w:+.-]+:`[~!]?([^`<]*?)(?:\s*<[^`]*>)?`")
QUOTED = re.compile(r"``(.+?)``|`([^`<]+?)(?:\s*<[^`]*>)?`_{0,2}|\*\*(.+?)\*\*|(?<!\w)\*(\S(?:.*?\S)?)\*(?!\w)")
SAYS_NOTHING = frozenset(
    "introduction overview example examples notes note summary see also usage footnotes references contents description"
    " background miscellaneous history conclusion rationale other functions".split()
)
SHORTEST = 25
"""Words of a section."""


def plain(text: str) -> str:
    """Without the marks of reStructuredText.

    >>> plain("Use :func:`~os.path.join` and ``x + 1``, *not* `this <there>`_::")
    'Use os.path.join and x + 1, not this:'
    """
    text = QUOTED.sub(lambda m: next(g for g in m.groups() if g is not None), ROLE.sub(r"\1", text))
    return " ".join(text.replace("::", ":").split())


def sections(document: str) -> Iterator[tuple[str, str]]:
    """(title, running text before the first sub-title) of every section; lists, code and directives are left out."""
    lines = document.splitlines()
    starts = [
        i
        for i in range(len(lines) - 1)
        if lines[i].strip()
        and not lines[i][0].isspace()
        and UNDERLINE.fullmatch(lines[i + 1])
        and not UNDERLINE.fullmatch(lines[i])
        and len(lines[i + 1].rstrip()) >= len(lines[i].rstrip()) - 2
    ]
    for start, end in zip(starts, [*starts[1:], len(lines)], strict=False):
        title = plain(lines[start])
        blocks = [b.strip("\n") for b in re.split(r"\n[ \t]*\n", "\n".join(lines[start + 2 : end]))]
        text = " ".join(plain(b) for b in blocks if re.match(r"[A-Za-z\"“`:*][^\n]*\s", b) and not _aside(b))
        yield title, text


def _aside(block: str) -> bool:
    """Whether it is code, a list, a directive or a field rather than running text."""
    return bool(re.match(r"\.\.|>>>|[*+-] |\d+\. |:\w[\w ]*:(\s|$)|\|", block)) or any(
        line[:1].isspace() for line in block.strip("\n").splitlines()
    )


def titled(documents: Mapping[str, str], max_words: int) -> Iterator[tuple[str, str, str]]:
    """(name of the document, title, text) where the text has enough words and the title says something."""
    for name in sorted(documents):
        for title, text in sections(documents[name]):
            words = text.split()
            if len(words) < SHORTEST or not 2 <= len(title.split()) <= 12:
                continue
            if set(title.lower().split()) <= SAYS_NOTHING:
                continue
            yield name, title, " ".join(words[:max_words])


@lru_cache(maxsize=1)
def topics() -> dict[str, str]:
    """Python's own help topics (`help('with')`), read and not imported."""
    path = folder() / "pydoc_data" / "topics.py"
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found = next(n.value for n in tree.body if isinstance(n, ast.Assign | ast.AnnAssign) and n.value is not None)
        return dict(ast.literal_eval(found))
    except (OSError, SyntaxError, ValueError, StopIteration) as error:
        raise DataError(f"{path} has no help topics ({error}); leave topics out of data.parts") from error


@lru_cache(maxsize=1)
def manual() -> dict[str, str]:
    """Python's documentation as it is written, out of a Debian package that is fetched once."""
    found = {}
    for name, content in files_of(fetch("python3.11-doc", catalogue=CATALOGUE), lambda name: ".rst" in name):
        plain = gzip.decompress(content) if name.endswith(".gz") else content
        found[name.partition("_sources/")[2]] = plain.decode("utf-8", "replace")
    return found


def few() -> dict[str, str]:
    """The pages of `manual` that come with the pack."""
    return {path.relative_to(SAMPLE).as_posix(): path.read_text("utf-8") for path in SAMPLE.rglob("*.rst.txt")}
