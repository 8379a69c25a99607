"""VERIFIED.json: what an independent loader confirmed of an exported folder, and of which bytes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from trivium.disk import digest_file, replace_file
from trivium.errors import CheckpointError

VERIFIED = "VERIFIED.json"


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
