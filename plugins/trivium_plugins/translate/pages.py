"""Manual pages out of Debian's packages, which are fetched and read, never installed."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from trivium import FetchEntry, fetch, files_of

VERSIONS = {"manpages": "6.03-2", "manpages-l10n": "4.18.1-1"}
LICENCES = {
    "manpages": "free, each page's own (GPL, BSD, Linux-man-pages-copyleft)",
    "manpages-l10n": "GPL-3+, and each page's own",
}


def _entry(source: str, package: str, size: int, sha256: str) -> FetchEntry:
    version = VERSIONS[source]
    pool = f"pool/main/m/{source}/{package}_{version}_all.deb"
    return FetchEntry(
        kind="debian", package=package, version=version, file="", sha256=sha256, size=size, licence=LICENCES[source],
        pool=pool,
    )  # fmt: skip


CATALOGUE: Mapping[str, FetchEntry] = {
    "manpages": _entry(
        "manpages", "manpages", 1_331_652, "efa1ba4cd19ad7baeae959c9209a7eb74be2ebb858bcabb412597bfc9f588c91"
    ),
    "manpages-dev": _entry(
        "manpages", "manpages-dev", 2_030_264, "96f55cb5e26231d5567c89b692bced63825a14a2d5bd18fdf16ea2ed44eb9838"
    ),
    "manpages-de": _entry(
        "manpages-l10n", "manpages-de", 3_615_560, "37d2e7ee51f22952aecec3af93647ff59194a3c74bb7a694560f49c7f7ab3978"
    ),
    "manpages-de-dev": _entry(
        "manpages-l10n", "manpages-de-dev", 1_141_048,
        "cb3d7c10977dd3c811065d89e0d912196ec5e6f2551308edb0ba72e02da838d7",
    ),
    "manpages-fr": _entry(
        "manpages-l10n", "manpages-fr", 1_899_104, "ec29759cc0e4a44dc7719c1e32869d0060667049e584f09556f0d982b969ea33"
    ),
}  # fmt: skip
PACKAGES = {
    "en": ("manpages", "manpages-dev"), "de": ("manpages-de", "manpages-de-dev"), "fr": ("manpages-fr",),
}  # fmt: skip
SAMPLE = Path(__file__).with_name("data") / "sentences.jsonl"
PAGE = re.compile(r"usr/share/man/(?:\w\w/)?(man\d/[^/]+)\.gz")


@lru_cache(maxsize=3)
def pages(language: str) -> dict[str, str]:
    """Every page of a language, as man7/path_resolution.7; fetched once."""
    found: dict[str, str] = {}
    for name in PACKAGES[language]:
        path = fetch(name, catalogue=CATALOGUE)
        for file, content in files_of(path, PAGE.fullmatch):
            page = PAGE.sub(r"\1", file)
            found[page] = gzip.decompress(content).decode("utf-8", "replace")
    return found


def sentences(language: str) -> list[tuple[str, str, str]]:
    """("sample", English, translation) of what comes with the pack."""
    rows = map(json.loads, SAMPLE.read_text("utf-8").splitlines())
    return [("sample", row["en"], row[language]) for row in rows]
