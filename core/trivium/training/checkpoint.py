"""Checkpoints: atomic, durable, hashed; safetensors and JSON only.

A checkpoint is a folder `step-N`. It is written as `step-N.tmp-*` beside its place, every file is synced to disk,
`CHECKPOINT.json` (hashes, sizes) is written last, and a rename makes it complete. Old ones go only after. Hashes are of
what was meant to be written, made while it is (of files that several processes write, read back and compared first):
what a disk makes of it is noticed by `verify`, before any use.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from trivium.disk import digest_file, make_folder, replace_file, sweep, sync_file, sync_folder, write_file
from trivium.errors import CheckpointError, TrainingError
from trivium.models.weights import Share, read_tensors
from trivium.training.parallel import ALONE, World
from trivium.training.tensorfile import write_tensors

RECORD = "CHECKPOINT.json"
MODEL = "model.safetensors"
LATEST = "LATEST"
BEST = "BEST"


@dataclass
class Contents:
    """What a checkpoint holds: tensors by file name, JSON by file name, and folders that `writers` fill.

    Of tensors that are shared out among processes each has its own part.

    Writers write what training never changes (the tokenizer), so they may run at any time.
    """

    tensors: dict[str, dict[str, Tensor | Share]]
    json: dict[str, Any]
    writers: dict[str, Callable[[Path], object]]

    def held(self) -> Contents:
        """A copy in host memory, as large as the checkpoint: training may go on while it is written."""

        def copied(tensor: Tensor | Share) -> Tensor | Share:
            if isinstance(tensor, Share):
                return replace(tensor, block=tensor.block.detach().to("cpu", copy=True))
            return tensor.detach().to("cpu", copy=True)

        copies = {file: {name: copied(t) for name, t in tensors.items()} for file, tensors in self.tensors.items()}
        return Contents(copies, copy.deepcopy(self.json), self.writers)


class CheckpointStore:
    """The `checkpoints/` folder of one run.

    beside: files of the run (its figures) that must be on disk up to a step before the checkpoint of that step counts.
    world: the processes that save together, each its own parts; alone unless tensors are shared out.
    """

    def __init__(self, folder: Path, keep: int = 2, beside: Sequence[Path] = (), world: World = ALONE) -> None:
        self.folder, self.keep, self.beside, self.world = folder, keep, beside, world

    def save(self, step: int, contents: Contents, *, best: bool = False) -> Path:
        """Write checkpoint `step`, make it the latest (and best), then let go of those no longer kept."""
        target, first = self.folder / f"step-{step}", self.world.is_first
        if not self.world.any(first and (target / RECORD).is_file()):
            with self.world.together("make room for a checkpoint"):
                if first and target.exists():  # damaged: the rename would fail
                    self._set_aside(target)
            self._write(step, target, contents)
        if not first:
            return target
        replace_file(self.folder / LATEST, target.name.encode())
        if best:
            replace_file(self.folder / BEST, target.name.encode())
        sync_folder(self.folder)
        self._forget()
        return target

    def _write(self, step: int, target: Path, contents: Contents) -> None:
        world, first = self.world, self.world.is_first
        temporary = self.folder / f"{target.name}.tmp-{world.most(os.getpid() if first else 0)}"
        try:
            with world.together(f"make {temporary}"):
                if first:
                    make_folder(self.folder)
                    temporary.mkdir()
            files = {name: write_tensors(temporary / name, each, world) for name, each in contents.tensors.items()}
            if not first:
                return
            for name, value in contents.json.items():
                data = json.dumps(value, indent=1).encode()
                write_file(temporary / name, data)
                files[name] = len(data), hashlib.sha256(data).hexdigest()
            for name, writer in contents.writers.items():
                writer(temporary / name)
            for path in sorted(p for p in temporary.rglob("*") if p.is_file()):
                name = path.relative_to(temporary).as_posix()
                files[name] = files.get(name) or digest_file(path)
            found = {name: dict(zip(("bytes", "sha256"), files[name], strict=True)) for name in sorted(files)}
            for path in self.beside:
                if path.is_file():
                    sync_file(path)
                    sync_folder(path.parent)
            record: dict[str, Any] = {"step": step, "files": found}
            write_file(temporary / RECORD, json.dumps(record | {"sha256": _digest(record)}, indent=1).encode())
            for path in [*(p for p in temporary.rglob("*") if p.is_dir()), temporary]:
                sync_folder(path)
            os.rename(temporary, target)
        except OSError as error:
            self._drop(temporary)
            raise CheckpointError(f"checkpoint {target} cannot be written: {error.strerror}") from error
        except TrainingError as error:  # a checkpoint that can never be loaded must not push out a sound one
            self._drop(temporary)
            raise TrainingError(f"step {step}: {error}; it is not saved, the last checkpoint is sound") from error
        except BaseException:
            self._drop(temporary)
            raise

    def _drop(self, temporary: Path) -> None:
        if self.world.is_first:
            shutil.rmtree(temporary, ignore_errors=True)

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

    def sound(self, *, fallback: bool, say: Callable[[str], None]) -> Path | None:
        """The newest checkpoint, every byte of it checked; None if there is none.

        A damaged one is refused, or with `fallback` set aside (renamed, never removed), said so, and the newest whole
        one before it taken. Raises CheckpointError naming the damaged file, and what to do.
        """
        found, damage = None, {}
        for path in reversed(self._numbered()):
            try:
                verify(path)
            except CheckpointError as error:
                damage[path] = error
            else:
                found = path
                break
        if not damage:
            return found
        first = next(iter(damage.values()))
        if found is None:
            raise CheckpointError(f"{first}, but there is none that is whole: choose another name= to start anew")
        if not fallback:
            raise CheckpointError(
                f"{first}: checkpoint.fallback=true sets the damaged aside and continues from {found.name}"
            )
        for path, error in damage.items():
            aside = self._set_aside(path)
            say(f"{error}: set aside as {aside.name}, continues from {found.name}")
        replace_file(self.folder / LATEST, found.name.encode())
        sync_folder(self.folder)
        return found

    def _set_aside(self, path: Path) -> Path:
        """Rename a damaged checkpoint, so that nothing takes it for one and somebody can look at it."""
        taken = {p.name for p in self.folder.glob(f"{path.name}.damaged-*")}
        name = next(n for i in range(1, len(taken) + 2) if (n := f"{path.name}.damaged-{i}") not in taken)
        if self._pointer(BEST) == path.name:
            (self.folder / BEST).unlink()
        try:
            return path.rename(path.with_name(name))
        except OSError as error:
            raise CheckpointError(f"{path} is damaged and cannot be renamed: {error.strerror}") from error

    def sweep(self) -> None:
        """Remove what an interrupted save left behind. Only at the start of a training run."""
        sweep(self.folder)

    def complete(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return [p for p in self._numbered() if (p / RECORD).is_file()]

    def _numbered(self) -> list[Path]:
        """What is called a checkpoint, oldest first. Since a rename makes it one, one without its record is damaged."""
        found = [p for p in self.folder.glob("step-*") if p.name[5:].isdigit()]
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
        step = checkpoint.name.removeprefix("step-")
        if record.keys() != {"step", "files"} or (step.isdigit() and record["step"] != int(step)):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{checkpoint / RECORD} is missing or damaged ({type(error).__name__})") from error
    for name, expected in files.items():
        path = checkpoint / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; the checkpoint is incomplete")
        if digest_file(path) != expected:
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
    return read_tensors(checkpoint / MODEL)
