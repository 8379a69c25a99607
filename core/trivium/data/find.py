"""Which files a path, a folder or a glob names, and how many it holds that are left out."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from trivium.data.converted import PACKED
from trivium.data.readers import KINDS, kind_of
from trivium.errors import DataError

CODE = frozenset(
    ".py .pyi .pyx .js .jsx .mjs .cjs .ts .tsx .vue .svelte .c .h .cc .cpp .cxx .hpp .hh .cu .cuh .cs .java .kt .kts "
    ".scala .groovy .go .rs .swift .m .mm .rb .php .pl .pm .lua .r .jl .hs .ml .mli .fs .ex .exs .erl .clj .cljs .lisp "
    ".el .scm .dart .zig .nim .d .f90 .f95 .sh .bash .zsh .ps1 .sql .proto .tf .cmake .asm .s .v .sv .vhd .css .scss "
    ".sol .tcl .vb .pas .adb .cob".split()
)
"""Endings of source files, however they are spelled: R's are mostly .R, Fortran's often .F90."""
ASIDE = ("node_modules", "__pycache__")
BESIDE = ("dataset_info.json", "state.json", "dataset_dict.json")
"""What `datasets` writes beside its Arrow files."""


class Found(NamedTuple):
    """files: in order. left_out: how many others, by reason. code: whether they are a tree of source files."""

    files: list[Path]
    left_out: Counter[str]
    code: bool = False


def find_files(path: str, code: bool = False, every: bool = False) -> Found:
    """The files of known kinds under `path`; with code, or where there are no others, its source files; with every,
    both, without those that are empty or no text.

    Hidden folders, node_modules and __pycache__ are never entered. Raises DataError if there is nothing to read.
    """
    place = Path(path).expanduser()
    if place.is_file():
        packed_or_rows = place.suffix in PACKED or kind_of(place) not in ("", "text")
        if every and (_is_code(place) or kind_of(place)) and not packed_or_rows and _aside(place, aside := Counter()):
            raise DataError(f"{place} is {'empty' if aside['empty files'] else 'binary, which is no text'}")
        if _is_code(place):
            return Found([place], Counter(), code=True)
        if not kind_of(place):
            raise DataError(
                f"{place}: {place.suffix or 'no suffix'} is not a known kind; known are {', '.join(KINDS)}, each also "
                f"with {' or '.join(PACKED)}, and source code"
            )
        return Found([place], Counter())
    left_out: Counter[str] = Counter()
    if place.is_dir():
        found = list(_walk(place, left_out))
    else:
        found = [Path(p) for p in glob.glob(str(place), recursive=True) if Path(p).is_file()]
        if not found:
            raise DataError(f"data.path={path} does not exist and matches no file")
    known = sorted(p for p in found if kind_of(p) and p.name not in BESIDE)
    sources = sorted(filter(_is_code, found))
    if every:
        both = sorted([*known, *sources])
        kept = [p for p in both if kind_of(p) not in ("", "text") or p.suffix in PACKED or not _aside(p, left_out)]
        left_out["files of other kinds"] += len(found) - len(both)
        if not kept:
            said = ", ".join(f"{n:,} {what}" for what, n in left_out.items() if n)
            raise DataError(f"no file under {path} can be read as text{f' ({said})' if said else ''}")
        return Found(kept, +left_out)
    if code or (sources and not known):
        sources = sorted([*sources, *(p for p in known if kind_of(p) == "text" and p.suffix not in PACKED)])
        kept = [p for p in sources if not _aside(p, left_out)]
        if kept:
            left_out["files of other kinds"] += len(found) - len(sources)
            return Found(kept, +left_out, code=True)
        raise DataError(f"no file under {path} is source code or text")
    if not known:
        raise DataError(f"no file under {path} is of a known kind ({', '.join(KINDS)}, or source code)")
    left_out["files of other kinds"] += len(found) - len(known)
    return Found(known, +left_out)


def _is_code(path: Path) -> bool:
    return path.suffix.lower() in CODE


def _walk(place: Path, left_out: Counter[str]) -> Iterator[Path]:
    for folder, folders, files in os.walk(place):
        for name in list(folders):
            if name.startswith(".") or name in ASIDE:
                left_out["hidden folders" if name.startswith(".") else f"folders {name}"] += 1
                folders.remove(name)
        for name in files:
            if name.startswith("."):
                left_out["hidden files"] += 1
            elif (file := Path(folder) / name).is_file():
                yield file


def _aside(file: Path, left_out: Counter[str]) -> bool:
    """Whether a source file is empty or no text at all, and counted as such."""
    try:
        with open(file, "rb") as opened:
            start = opened.read(8192)
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror or error}") from error
    reason = "binary files" if b"\0" in start else "" if start.strip() else "empty files"
    left_out[reason] += bool(reason)
    return bool(reason)
