"""Whether files are still those that were confirmed: of an exported folder (VERIFIED.json), of rows from feedback."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from trivium.disk import digest_file, replace_file
from trivium.errors import CheckpointError

VERIFIED = "VERIFIED.json"
DATA = "data"
"""Where a run of phase=feedback has its rows."""


def note_verified(folder: Path, found: Mapping[str, Any], names: Iterable[str]) -> None:
    """Write VERIFIED.json. found: what the gate measured. names: the files that it confirmed."""
    files = {name: digest_file(folder / name)[1] for name in sorted(names)}
    replace_file(folder / VERIFIED, json.dumps({**found, "files": files}, indent=1).encode())


def verified_files(folder: Path) -> list[str]:
    """The names of the files that were confirmed and are as they were then; none if one has changed or is gone."""
    try:
        files = json.loads((folder / VERIFIED).read_bytes())["files"]
        same = all(digest_file(folder / name)[1] == sha256 for name, sha256 in files.items())
    except (OSError, ValueError, LookupError, TypeError, CheckpointError):
        return []
    return [*files] if same else []


def verified_rows(folder: Path, facts: Mapping[str, Any]) -> bool:
    """Whether the rows that a run of phase=feedback made are as its manifest, facts, tells of them."""
    files = facts.get("feedback", {}).get("files", {})
    try:
        return bool(files) and all(digest_file(folder / DATA / name)[1] == sha for name, sha in files.items())
    except CheckpointError:
        return False
