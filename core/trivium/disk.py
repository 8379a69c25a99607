"""Files that are whole or not there: synced writes, atomic replacement. A refused write names path and bytes."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from trivium.errors import CheckpointError


def write_file(path: Path, data: bytes) -> None:
    """Write and sync one file. Raises CheckpointError naming path and size when the disk refuses."""
    write_pieces(path, (data,), len(data))


def write_pieces(path: Path, pieces: Iterable[bytes | memoryview], size: int) -> None:
    """`write_file` of `size` bytes that come piece by piece, so that they need not all be in memory at once."""
    try:
        with open(path, "wb") as f:
            for piece in pieces:
                f.write(piece)
            f.flush()
            os.fsync(f.fileno())
    except OSError as error:
        raise CheckpointError(f"{path} ({size:,} bytes) cannot be written: {error.strerror}") from error


def reserve_file(path: Path, size: int) -> None:
    """A new file of `size` bytes for several processes to fill. Raises CheckpointError naming path and size."""
    try:
        with open(path, "wb") as f:
            f.truncate(size)
    except OSError as error:
        raise CheckpointError(f"{path} ({size:,} bytes) cannot be written: {error.strerror}") from error


def write_at(path: Path, pieces: Iterable[tuple[int, bytes | memoryview]]) -> None:
    """Write (place, bytes) into a file that is there, and sync it. Raises CheckpointError naming it."""
    try:
        with open(path, "r+b", buffering=0) as f:
            for place, piece in pieces:
                f.seek(place)
                left = memoryview(piece)
                while left:
                    left = left[f.write(left) :]
            os.fsync(f.fileno())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror}") from error


def check_at(path: Path, pieces: Iterable[tuple[int, bytes | memoryview]]) -> None:
    """Raise CheckpointError unless a file holds what `write_at` wrote."""
    try:
        with open(path, "rb") as f:
            for place, piece in pieces:
                f.seek(place)
                if f.read(len(piece)) != piece:
                    raise CheckpointError(f"{path} does not hold what was written to it at byte {place:,}")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error


def digest_file(path: Path) -> tuple[int, str]:
    """Bytes and SHA-256 of a file, read in small pieces. Raises CheckpointError naming it when the disk refuses."""
    try:
        with open(path, "rb") as f:
            return os.fstat(f.fileno()).st_size, hashlib.file_digest(f, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error


def sync_file(path: Path) -> None:
    """Make what was written to a file so far, by whomever, durable. Raises CheckpointError naming it."""
    try:
        with open(path, "rb") as f:
            os.fsync(f.fileno())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be synced: {error.strerror}") from error


def replace_file(path: Path, data: bytes) -> None:
    """Write a file so that readers see the old one or the new one, never half of either."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        write_file(temporary, data)
        os.replace(temporary, path)
    except OSError as error:
        raise CheckpointError(f"{path} ({len(data):,} bytes) cannot be replaced: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)


def append_file(path: Path, text: str) -> None:
    """Add text to a file's end. Raises CheckpointError naming path and size when the disk refuses."""
    data = text.encode()
    try:
        with open(path, "ab") as f:
            f.write(data)
    except OSError as error:
        raise CheckpointError(f"{path} ({len(data):,} bytes) cannot be written: {error.strerror}") from error


def replace_json(path: Path, value: Any) -> None:
    """`replace_file` with readable JSON."""
    replace_file(path, json.dumps(value, indent=1, ensure_ascii=False).encode())


def sync_folder(path: Path) -> None:
    """Make renames and new names inside `path` durable. Raises CheckpointError naming it when the disk refuses."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise CheckpointError(f"the folder {path} cannot be synced: {error.strerror}") from error


def make_folder(path: Path) -> Path:
    """Create a folder and its parents, durably. Raises CheckpointError naming it when the disk refuses."""
    try:
        missing = [p for p in (path, *path.parents) if not p.exists()]
        path.mkdir(parents=True, exist_ok=True)
        for new in reversed(missing):  # a folder whose name is lost in a power cut takes all its files with it
            if os.access(new.parent, os.R_OK):
                sync_folder(new.parent)
    except OSError as error:
        raise CheckpointError(f"the folder {path} cannot be made: {error.strerror}") from error
    return path


def sweep(folder: Path) -> None:
    """Remove what a killed process left half-written in `folder`. Only by the process that holds the folder's lock."""
    for path in folder.glob("*.tmp-*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def lock_folder(path: Path) -> IO[bytes] | None:
    """Take `path` for this process until the file is closed or the process ends, however it ends; None if taken."""
    handle = open(path / ".lock", "ab")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        handle.close()
        return None
    return handle


@contextmanager
def alone(folder: Path, say: Callable[[str], None] = lambda text: None) -> Iterator[None]:
    """One process at a time in `folder`; the others wait for it, however it ends."""
    told = False
    while (handle := lock_folder(folder)) is None:
        if not told:
            say(f"waiting for another process that is at work in {folder}")
        told = True
        time.sleep(0.1)
    try:
        yield
    finally:
        handle.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file that may end in half a line (a kill while it was written); none if it is missing."""
    found = []
    if path.is_file():
        for line in path.read_bytes().split(b"\n"):  # not splitlines(): text may hold other line separators
            try:
                found.append(json.loads(line))
            except ValueError:
                break
    return found


def keep(path: Path, data: bytes) -> None:
    """Put something that was made once into a cache, with the digest that `kept` checks."""
    make_folder(path.parent)
    replace_file(path, hashlib.sha256(data).digest() + data)


def kept(path: Path) -> bytes | None:
    """What `keep` put there; None if there is nothing, or if a byte of it has changed."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    return content[32:] if hashlib.sha256(content[32:]).digest() == content[:32] else None


def cache_folder() -> Path:
    """Where things made once are kept between runs: $TRIVIUM_CACHE, else ~/.cache/trivium."""
    return Path(os.environ.get("TRIVIUM_CACHE") or Path.home() / ".cache" / "trivium")
