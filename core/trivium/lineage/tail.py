"""A .jsonl file that grows: only what is new is read, however long the run; a file that was cut back is read anew."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class Tail:
    """Reads a file bit by bit. A missing file has no rows; half a last line waits for its other half."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._which: tuple[int, int] | None = None
        self._place, self._half = 0, b""

    def read(self) -> tuple[list[dict[str, Any]], bool]:
        """The rows since the last call, and whether the file began anew, so that earlier rows no longer hold.

        A resume replaces the file by one without the steps that are taken again: another inode, or a shorter file.
        """
        try:
            with open(self.path, "rb") as file:
                found = os.fstat(file.fileno())
                anew = self._which is not None and (
                    self._which != (found.st_dev, found.st_ino) or found.st_size < self._place
                )
                if anew:
                    self._place, self._half = 0, b""
                self._which = (found.st_dev, found.st_ino)
                file.seek(self._place)
                new = file.read()
        except OSError:
            gone, self._which, self._place, self._half = self._which is not None, None, 0, b""
            return [], gone
        self._place += len(new)
        *lines, self._half = (self._half + new).split(b"\n")
        return [row for line in lines if (row := _row(line)) is not None], anew


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None
