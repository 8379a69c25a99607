"""What is made once of a file and kept in the cache under its content: unpacked, or in a form that is read row by row.

An archive of a few bytes may claim to hold more than there is disk: how many times larger it gets, how many bytes it
has and how much room is left are looked at while it is unpacked.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import zstandard

from trivium.data.rows import RowError, UnreadableError
from trivium.disk import alone, cache_folder, digest_file, make_folder, sweep, sync_file, sync_folder, write_pieces
from trivium.errors import DataError

PACKED = (".gz", ".zst", ".bz2", ".xz")
MOST_TIMES = 200
"""As many bytes may come of one; text has 3 to 10, logs 50, an archive of zeros 1,000 and more."""
SMALL = 64_000_000
"""Bytes that may come of any file, however small it is."""
SPARE = 1_000_000_000
"""Bytes of disk that are left to others."""
PIECE = 1 << 20
MOST_DICTIONARY = 1 << 28
"""Bytes that an .xz file may have its reader hold; `xz -9` asks for a fourth of them."""


def converted(path: Path, name: str, write: Callable[[Path], None]) -> Path:
    """The file `name` that `write` makes of `path`, from the cache where it was made before; whole or not there."""
    folder = cache_folder() / "converted" / digest_file(path)[1][:32]
    made = folder / name
    if made.is_file():
        return made
    with alone(make_folder(folder)):
        if made.is_file():  # another process was quicker
            return made
        sweep(folder)
        temporary = folder / f"{name}.tmp-{os.getpid()}"
        try:
            write(temporary)
            sync_file(temporary)
            temporary.replace(made)
            sync_folder(folder)
        finally:
            temporary.unlink(missing_ok=True)
    return made


def unpacked(path: Path, most: int) -> Path:
    """A compressed file's content as a file. most: its bytes. Raises DataError for a broken one, or a bomb."""
    pieces = {".gz": _gunzip, ".zst": _unzstd, ".bz2": _unbz2, ".xz": _unxz}[path.suffix]

    def write(temporary: Path) -> None:
        write_pieces(temporary, _watched(path, temporary.parent, pieces(path), most), path.stat().st_size)

    try:
        return converted(path, path.stem, write)
    except (EOFError, lzma.LZMAError, zlib.error, zstandard.ZstdError) as error:
        raise UnreadableError(f"{path} is broken: it cannot be unpacked as {path.suffix} ({error})") from error


def _watched(path: Path, folder: Path, pieces: Iterator[tuple[bytes, int]], most: int) -> Iterator[bytes]:
    made = checked = 0
    for piece, packed in pieces:
        made += len(piece)
        if made > SMALL + MOST_TIMES * packed:
            raise DataError(
                f"{path}: its first {packed:,} bytes unpack to {made:,}, over {MOST_TIMES} times as many: no text does "
                "that, so it is not unpacked"
            )
        check_size(path, made, most)
        if made - checked >= SMALL:
            check_room(path, folder)
            checked = made
        yield piece


def check_size(path: Path, made: int, most: int) -> None:
    """Refuse more bytes than data.max_unpacked_gb allows."""
    if made > most:
        raise DataError(
            f"{path} unpacks to more than data.max_unpacked_gb={most / 1e9:g} GB; raise it if that is what it holds"
        )


def check_room(path: Path, folder: Path) -> None:
    """Refuse to take the last of a disk."""
    if shutil.disk_usage(folder).free < SPARE:
        raise DataError(
            f"{path} does not fit unpacked into {folder}: under {SPARE / 1e9:g} GB are left there; make room, or set "
            "TRIVIUM_CACHE to a larger disk"
        )


def _gunzip(path: Path) -> Iterator[tuple[bytes, int]]:
    """Pieces, each with the packed bytes that were read until then."""
    with open(path, "rb") as packed, gzip.GzipFile(fileobj=packed) as file:
        try:
            while piece := file.read(PIECE):
                yield piece, packed.tell()
        except gzip.BadGzipFile as error:  # an OSError, which here would be one of the disk
            raise EOFError(str(error)) from error


def _unzstd(path: Path) -> Iterator[tuple[bytes, int]]:
    """The same, frame by frame; its own reader would take a file that ends in the middle for a whole one."""
    reader = zstandard.ZstdDecompressor(max_window_size=2**27)
    frame, begun = reader.decompressobj(), False
    with open(path, "rb") as file:
        while piece := file.read(4096):  # one of zeros makes 100 MB of so few bytes
            while piece:
                yield frame.decompress(piece), file.tell()
                begun = not frame.eof
                piece = frame.unused_data if frame.eof else b""
                if frame.eof:
                    frame = reader.decompressobj()
    if begun:
        raise EOFError("it ends in the middle of a frame")


def _unbz2(path: Path) -> Iterator[tuple[bytes, int]]:
    """The same, stream by stream."""
    try:
        yield from _streams(path, bz2.BZ2Decompressor)
    except OSError as error:
        if error.errno is None:  # not one of the disk
            raise EOFError(str(error)) from error
        raise


def _unxz(path: Path) -> Iterator[tuple[bytes, int]]:
    """The same, stream by stream; between them there may be zeros."""
    yield from _streams(path, lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=MOST_DICTIONARY), b"\0")


def _streams(path: Path, new: Callable[[], Any], padding: bytes = b"") -> Iterator[tuple[bytes, int]]:
    """Pieces, each with the packed bytes that were read until then; none is longer than PIECE, bomb or not."""
    stream, begun = new(), False
    with open(path, "rb") as file:
        while packed := file.read(4096):
            while packed := packed if begun else packed.lstrip(padding):
                piece, begun = stream.decompress(packed, PIECE), True
                while piece:
                    yield piece, file.tell()
                    piece = b"" if stream.eof or stream.needs_input else stream.decompress(b"", PIECE)
                packed = stream.unused_data if stream.eof else b""
                if stream.eof:
                    stream, begun = new(), False
    if begun:
        raise EOFError("it ends in the middle of a stream")


def listed_as_lines(path: Path, held: Path, max_chars: int) -> Path:
    """A JSON list as one element a line. A broken list cannot be read on from, so it is refused whole."""

    def write(temporary: Path) -> None:
        write_pieces(temporary, _elements(path, held, max_chars), held.stat().st_size)

    return converted(held, "list.jsonl", write)


def _elements(path: Path, held: Path, max_chars: int) -> Iterator[bytes]:
    decoder, number, text, at = json.JSONDecoder(), 0, "", 0
    most = 6 * max_chars + 65_536
    with open(held, encoding="utf-8-sig", newline="") as file:
        more = True

        def fill() -> None:
            nonlocal text, at, more
            piece = file.read(max(PIECE, len(text) - at))  # as much again: a long element is tried a few times only
            text, at, more = text[at:] + piece, 0, bool(piece)

        def blank() -> str:
            """The next character that is no blank."""
            nonlocal at
            while True:
                while at < len(text) and text[at] in " \t\r\n":
                    at += 1
                if at < len(text) or not more:
                    return text[at : at + 1]
                fill()

        try:
            assert blank() == "["
            at += 1
            if blank() == "]":
                at += 1
            else:
                while True:
                    blank()
                    while True:
                        try:
                            value, end = decoder.raw_decode(text, at)
                            if end < len(text) or not more:  # a number may go on in the next piece
                                break
                        except (ValueError, RecursionError) as error:
                            if not more or isinstance(error, RecursionError):
                                raise _broken(path, number, str(error)) from error
                        if len(text) - at > most:
                            raise DataError(f"{path} row {number + 1} is broken, or longer than data.max_chars allows")
                        fill()
                    if not isinstance(value, dict):
                        raise _broken(path, number, f"it is a {type(value).__name__}, not an object")
                    # a line break in JSON stands between its words, never inside text
                    yield text[at:end].replace("\n", " ").replace("\r", " ").encode() + b"\n"
                    number, at = number + 1, end
                    mark = blank()
                    at += 1
                    if mark == "]":
                        break
                    if mark != ",":
                        why = f"{mark!r} stands behind it, where a comma should" if mark else "the list ends behind it"
                        raise _broken(path, number - 1, why)
            if blank():
                raise _broken(path, number - 1, "something follows the list")
        except UnicodeDecodeError as error:
            raise RowError("not UTF-8", f"{path} is not UTF-8 after row {number + 1}: {error.reason}") from error


def _broken(path: Path, number: int, why: str) -> DataError:
    return DataError(f"{path} row {number + 1} is not JSON as a list of objects has it: {why}")
