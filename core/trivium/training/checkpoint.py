"""Checkpoints: atomic, durable, hashed; safetensors and JSON only.

A checkpoint is a folder `step-N`. It is written as `step-N.tmp-*` beside its place, every file is synced to disk,
`CHECKPOINT.json` (hashes, sizes, fingerprints) is written last, and a rename makes it complete. Old ones go only after.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from trivium.disk import replace_file, sweep, sync_folder, write_file
from trivium.errors import CheckpointError
from trivium.models.weights import read_tensors

RECORD = "CHECKPOINT.json"
LATEST = "LATEST"
BEST = "BEST"


@dataclass
class Contents:
    """What a checkpoint holds: tensors by file name, JSON by file name, and folders that `writers` fill."""

    tensors: dict[str, dict[str, Tensor]]
    json: dict[str, Any]
    writers: dict[str, Callable[[Path], None]]


class CheckpointStore:
    """The `checkpoints/` folder of one run."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep

    def save(self, step: int, contents: Contents, *, best: bool = False) -> Path:
        """Write checkpoint `step`, make it the latest (and best), then let go of those no longer kept."""
        target = self.folder / f"step-{step}"
        if not target.exists():
            self._write(step, target, contents)
        replace_file(self.folder / LATEST, target.name.encode())
        if best:
            replace_file(self.folder / BEST, target.name.encode())
        sync_folder(self.folder)
        self._forget()
        return target

    def _write(self, step: int, target: Path, contents: Contents) -> None:
        temporary = self.folder / f"{target.name}.tmp-{os.getpid()}"
        try:
            temporary.mkdir(parents=True)
            for name, tensors in contents.tensors.items():
                write_file(temporary / name, save(tensors))
            for name, value in contents.json.items():
                write_file(temporary / name, json.dumps(value, indent=1).encode())
            for name, writer in contents.writers.items():
                writer(temporary / name)
            files = {}
            for path in sorted(p for p in temporary.rglob("*") if p.is_file()):
                data = path.read_bytes()
                files[path.relative_to(temporary).as_posix()] = {
                    "bytes": len(data),
                    "sha256": hashlib.sha256(data).hexdigest(),
                }
            record: dict[str, Any] = {"step": step, "files": files}
            write_file(temporary / RECORD, json.dumps(record | {"sha256": _digest(record)}, indent=1).encode())
            for path in [*(p for p in temporary.rglob("*") if p.is_dir()), temporary]:
                sync_folder(path)
            os.rename(temporary, target)
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise CheckpointError(f"checkpoint {target} cannot be written: {error.strerror}") from error
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise

    def _forget(self) -> None:
        kept = {p.name for p in self.complete()[-self.keep :]} | {self._pointer(LATEST), self._pointer(BEST)}
        for path in self.complete():
            if path.name not in kept:  # renamed first: half a removal must not look like a checkpoint
                with suppress(OSError):  # what cannot be removed costs space only
                    shutil.rmtree(path.rename(path.with_name(f"{path.name}.tmp-{os.getpid()}")))

    def repair_best(self, step: int) -> None:
        """Let BEST name checkpoint `step`, if a kill came between its save and its pointer."""
        name = f"step-{step}"
        if self._pointer(BEST) != name and (self.folder / name / RECORD).is_file():
            replace_file(self.folder / BEST, name.encode())

    def sweep(self) -> None:
        """Remove what an interrupted save left behind. Only at the start of a training run."""
        sweep(self.folder)

    def complete(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        found = [p for p in self.folder.glob("step-*") if (p / RECORD).is_file() and p.name[5:].isdigit()]
        return sorted(found, key=lambda p: int(p.name[5:]))

    def latest(self) -> Path | None:
        """The newest complete checkpoint (a kill between the rename and LATEST leaves a newer one than it names)."""
        complete = self.complete()
        return complete[-1] if complete else None

    def best(self) -> Path | None:
        """The checkpoint that `checkpoint.keep_best` kept."""
        name = self._pointer(BEST)
        return self.folder / name if name else None

    def _pointer(self, name: str) -> str:
        path = self.folder / name
        return path.read_text().strip() if path.is_file() else ""


def verify(checkpoint: Path) -> dict[str, Any]:
    """Check every byte against CHECKPOINT.json and return it. Raises CheckpointError naming the damaged file."""
    try:
        record = json.loads((checkpoint / RECORD).read_text())
        if record.keys() != {"step", "files"}:  # records of earlier versions had no digest
            said = record.pop("sha256")
            if said != _digest(record):
                raise ValueError("its bytes are not those that were saved")
        files = {name: (expected["bytes"], expected["sha256"]) for name, expected in record["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{checkpoint / RECORD} is missing or damaged ({type(error).__name__})") from error
    for name, expected in files.items():
        path = checkpoint / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; the checkpoint is incomplete")
        data = path.read_bytes()
        if (len(data), hashlib.sha256(data).hexdigest()) != expected:
            raise CheckpointError(
                f"{path} is damaged: its bytes are not those that were saved; use an earlier checkpoint"
            )
    return record


def _digest(record: dict[str, Any]) -> str:
    """Of the record itself: a changed bit in a name or number of it is noticed as well."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def read_checkpoint_json(checkpoint: Path, name: str) -> dict[str, Any]:
    """One JSON file of a checkpoint that `verify` has passed."""
    return json.loads((checkpoint / name).read_text())


def model_tensors(checkpoint: Path) -> dict[str, Tensor]:
    """The weights of a verified checkpoint."""
    return read_tensors(checkpoint / "model.safetensors")


def trained_tensors(checkpoint: Path) -> dict[str, Tensor]:
    """The optimizer state of a verified checkpoint."""
    return read_tensors(checkpoint / "optimizer.safetensors")
