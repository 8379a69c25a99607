"""A small file that names the model in use, such as runs/incumbent.json; `init_from=` takes it like a run.

It is replaced whole, so who reads it finds the old model or the new one.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from trivium.disk import replace_json
from trivium.errors import CheckpointError


@dataclass(frozen=True)
class Pointer:
    """path: of a checkpoint. sha256: of what it held when it was named. before: the path that was named until then."""

    path: Path
    sha256: str
    before: str = ""


def is_pointer(path: Path) -> bool:
    """Whether `init_from=` names such a file."""
    return path.suffix == ".json" and path.is_file()


def read_pointer(path: Path) -> Pointer:
    """What a file names. Raises CheckpointError for one that is no pointer."""
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        return Pointer(Path(os.path.normpath(path.parent / said["path"])), str(said["sha256"]), str(said["before"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} names no model: it must hold path, sha256 and before ({error})") from error


def write_pointer(path: Path, named: Pointer, by: str) -> None:
    """Name another model. by: the run that decided it."""
    place = os.path.relpath(named.path, path.parent)  # so that the folder of both can be moved
    now = datetime.now(UTC).isoformat(timespec="seconds")
    replace_json(path, {"path": place, "sha256": named.sha256, "before": named.before, "by": by, "since": now})
