"""Manual pages as text: the paragraphs of a page, and those of its translation beside them.

Translations are made paragraph by paragraph from the same source (po4a), so both pages have the same skeleton: headings
part a page, and a section whose paragraphs are of the same kinds in the same order is aligned one by one. A section
that differs (a translation of an older page) is left out, and so is a pair whose numbers, options or names of calls
differ, or one of which is much the longer.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import NamedTuple

BREAKS = {"PP", "LP", "P", "HP", "IP", "sp", "RS", "RE", "TP", "TQ", "br", "in", "ad", "ne", "PD"}
HEADINGS = {"SH", "SS"}
FONTS = {"B", "I", "R", "SM", "SB"}
MIXED = {"BR", "RB", "BI", "IB", "IR", "RI"}
VERBATIM = {"nf": "fi", "EX": "EE", "TS": "TE"}
ESCAPES = {
    r"\-": "-", r"\(aq": "'", r"\[aq]": "'", r"\(dq": '"', r"\[dq]": '"', r"\(em": "—", r"\[em]": "—", r"\(en": "–",
    r"\[en]": "–", r"\(lq": "“", r"\(rq": "”", r"\[lq]": "“", r"\[rq]": "”", r"\(oq": "‘", r"\(cq": "’",
    r"\[oq]": "‘", r"\[cq]": "’", r"\(bu": "•", r"\[bu]": "•", r"\(ha": "^", r"\[ha]": "^", r"\(ti": "~",
    r"\[ti]": "~", r"\(ga": "`", r"\[ga]": "`", r"\(co": "©", r"\[co]": "©", r"\(->": "→", r"\[->]": "→",
    r"\(+-": "±", r"\(mu": "×", r"\[mu]": "×", r"\&": "", r"\/": "", r"\,": "", r"\:": "", r"\%": "", r"\|": "",
    r"\^": "", r"\ ": " ", r"\~": " ", r"\0": " ", r"\c": "",
}  # fmt: skip
ESCAPE = re.compile("|".join(map(re.escape, sorted(ESCAPES, key=len, reverse=True))))
FONT = re.compile(r"\\f(?:\[\w*\]|\(\w\w|\w)|\\s[+-]?\d")
COMMENT = re.compile(r"\\\".*")
CREDITS = frozenset({"ÜBERSETZUNG", "TRADUCTION"})
"""The last heading of a translation: who made it."""
SAME = re.compile(r"\d+|(?<![\w-])--?[A-Za-z][\w-]*|\b\w+\(\d\w*\)|\b[A-Z][A-Z0-9]*_[A-Z0-9_]+\b|/[\w/.]{3,}")


class Block(NamedTuple):
    """A paragraph. kind: of the macro that began it; the first of a section has the heading's."""

    kind: str
    text: str


def blocks(page: str) -> list[Block]:
    """The paragraphs of a page in roff, as plain text; tables, code and what cannot be read are empty."""
    found: list[Block] = []
    words: list[str] = []
    kind, until, tag = "", "", False

    def close(after: str) -> None:
        nonlocal kind
        if words:
            found.append(Block(kind, plain(" ".join(words))))
            words.clear()
        kind = after

    for line in page.splitlines():
        bare = COMMENT.sub("", line)
        if bare in (".", "'") or (bare != line and not bare.strip()):
            continue
        line = bare
        name, _, rest = line[1:].strip().partition(" ") if line.startswith((".", "'")) else ("", "", line)
        if until:
            until = "" if name == until else until
        elif name in VERBATIM:
            until = VERBATIM[name]
            close(kind)
            found.append(Block(name, ""))
        elif name in HEADINGS:
            close(name)
            words.extend(_arguments(rest))
            close("")
        elif name in BREAKS:
            close(name)
            if name == "IP" and rest:
                words.extend(_arguments(rest)[:1])
                close("IP body")
            tag = name in ("TP", "TQ")
        elif not name or name in FONTS or name in MIXED:
            if not rest.strip():
                close(kind if line else "PP")
                continue
            words.append(("" if name in MIXED else " ").join(_arguments(rest)) if name else rest.strip())
            if tag:  # the first line after .TP is the term, what follows explains it
                tag = False
                close("TP body")
        elif name in ("UR", "URL", "MT"):
            words.append(rest.strip())
    close("")
    return found


def plain(text: str) -> str:
    """Without fonts and escapes; empty if any other request is left in it.

    >>> plain(r"the \\fB\\-\\-all\\fP flag of \\fIls\\fP(1) \\(em see")
    'the --all flag of ls(1) — see'
    """
    text = ESCAPE.sub(lambda m: ESCAPES[m[0]], FONT.sub("", text.replace(r"\e", r"\(rs")))
    text = re.sub(r"\\\(rs|\\\[rs\]", "\ue000", text)
    return "" if "\\" in text else " ".join(text.replace("\ue000", "\\").split())


def _arguments(rest: str) -> list[str]:
    """Of a macro: words, or what stands in quotes.

    >>> _arguments('chroot " (2)" x')
    ['chroot', ' (2)', 'x']
    """
    return [quoted or word for quoted, word in re.findall(r'"((?:[^"]|"")*)"?|(\S+)', rest)]


def sections(found: list[Block]) -> list[list[Block]]:
    """Cut before every heading."""
    parts: list[list[Block]] = [[]]
    for block in found:
        if block.kind in HEADINGS:
            parts.append([])
        parts[-1].append(block)
    return parts


def aligned(english: str, other: str) -> Iterator[tuple[str, str]]:
    """Pairs of paragraphs of two pages that pass every check."""
    ours, theirs = sections(blocks(english)), sections(blocks(other))
    if theirs[-1] and theirs[-1][0].text in CREDITS:
        theirs.pop()
    if [part[0].kind if part else "" for part in ours] != [part[0].kind if part else "" for part in theirs]:
        return
    for a, b in zip(ours, theirs, strict=True):
        if [block.kind for block in a] == [block.kind for block in b]:
            yield from ((x.text, y.text) for x, y in zip(a, b, strict=True) if agree(x.text, y.text))


def agree(english: str, other: str) -> bool:
    """Whether two paragraphs may be translations: the same numbers, options, names and paths, and about as long.

    >>> agree("See open(2) for --all 3 flags.", "Siehe open(2) zu allen 3 Schaltern --all.")
    True
    >>> agree("See open(2) for all 3 flags.", "Siehe open(2) zu allen 4 Schaltern.")
    False
    """
    if not english or not other or english == other:
        return False
    if Counter(SAME.findall(english)) != Counter(SAME.findall(other)):
        return False
    return 0.6 <= (len(other) + 10) / (len(english) + 10) <= 2.0


def pairs(english: Mapping[str, str], other: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """(page, English, translation) of the pages that both have; a paragraph that comes again is kept once."""
    found, seen = [], set()
    for page in sorted(english.keys() & other.keys()):
        for ours, theirs in aligned(english[page], other[page]):
            if ours not in seen:
                seen.add(ours)
                found.append((page, ours, theirs))
    return found
