"""One SQLite file that threads and processes share: known for its own, brought up to date, written whole or not at all.

A change is on the disk when its transaction ends (write-ahead log, synced at each commit), and what is deleted is
overwritten. What SQLite refuses becomes one sentence, of the error that the file's owner chooses.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trivium.disk import make_folder
from trivium.errors import TriviumError

WAIT = 30.0
"""Seconds that a writer waits for another to end."""
Why = Callable[[str], TriviumError]
"""What is wrong, in a few words -> the error to raise."""


class Database:
    """The file. path None is in memory, for this process alone.

    application: the number in a file's header that says whose it is. upgrades: from each version to the next, as SQL
    statements; an older file is brought up to date in one transaction. opening, using: the errors.
    """

    def __init__(
        self,
        path: Path | None,
        upgrades: Sequence[str],
        *,
        opening: Why,
        using: Why,
        application: int = 0,
        wait: float = WAIT,
    ) -> None:
        """Raises `opening` for a file that cannot be used, is another program's, or of a later version."""
        self.upgrades, self.application, self.wait, self._why = upgrades, application, wait, opening
        self._lock = threading.RLock()
        if path is not None:
            make_folder(path.parent)
        with self._told():
            place = path or ":memory:"
            self.connection = sqlite3.connect(place, timeout=wait, isolation_level=None, check_same_thread=False)
        try:
            with self._told():
                self._prepare()
        except BaseException:
            self.connection.close()
            raise
        self._why = using

    def _prepare(self) -> None:
        version = self._version()
        for setting in ("secure_delete = ON", "journal_mode = WAL", "synchronous = FULL"):
            self.connection.execute(f"PRAGMA {setting}")
        if version == len(self.upgrades):
            return
        with self.transaction() as db:
            for script in self.upgrades[self._version() :]:  # another process may have been faster
                for statement in filter(str.strip, script.split(";")):
                    db.execute(statement)
            db.execute(f"PRAGMA user_version = {len(self.upgrades)}")
            db.execute(f"PRAGMA application_id = {self.application}")

    def _version(self) -> int:
        kind, version = (self.rows(f"PRAGMA {name}")[0][0] for name in ("application_id", "user_version"))
        tables = self.rows("SELECT count(*) FROM sqlite_master")[0][0]
        if tables and (kind != self.application or not version):
            raise self._why("it is a database of another program")
        if version > len(self.upgrades):
            raise self._why(f"it is of version {version}, this program reads version {len(self.upgrades)}")
        return version

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            busy = getattr(error, "sqlite_errorname", "").startswith(("SQLITE_BUSY", "SQLITE_LOCKED"))
            said = f"another process has been writing it for {self.wait:g} s" if busy else str(error)
            raise self._why(said) from error

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All of it is kept, or nothing; one writer at a time."""
        with self._lock, self._told():
            self.connection.execute("BEGIN IMMEDIATE")
            try:
                yield self.connection
                self.connection.execute("COMMIT")
            except BaseException:
                if self.connection.in_transaction:
                    self.connection.execute("ROLLBACK")
                raise

    def rows(self, question: str, *values: Any) -> list[tuple[Any, ...]]:
        """What a question finds."""
        with self._lock, self._told():
            return self.connection.execute(question, values).fetchall()

    def forget(self) -> None:
        """Take what was deleted out of the log of changes, too."""
        self.rows("PRAGMA wal_checkpoint(TRUNCATE)")

    def close(self) -> None:
        """Let go of the file."""
        with self._lock:
            self.connection.close()
