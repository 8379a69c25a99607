"""Conversations that outlive the process: every turn with the ids that were read and drawn, in one SQLite file.

A conversation is a tree. A turn has a parent and a session has a head, so another answer or an edited question is a
branch, and nothing that was said is overwritten. Turns are appended in one transaction: a process that dies in the
middle of a turn leaves the last one that was complete.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from trivium.disk import make_folder
from trivium.errors import CheckpointError, SessionError
from trivium.inference.database import Database

APPLICATION = 0x54726976  # "Triv", in the header of the file: another program's database is not taken for ours
TITLE = 60
"""Characters of a title that is made of the first question."""
RESPONSE = "response"
"""The kind of a conversation that goes on by the ids of its answers (/v1/responses); others are of kind ""."""
UPGRADES = (
    """
    CREATE TABLE sessions (
        id TEXT PRIMARY KEY, title TEXT NOT NULL, created REAL NOT NULL, updated REAL NOT NULL, model TEXT NOT NULL,
        template TEXT NOT NULL, system TEXT NOT NULL, sampling TEXT NOT NULL, head TEXT
    );
    CREATE TABLE turns (
        number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, session TEXT NOT NULL, parent TEXT,
        role TEXT NOT NULL, text TEXT NOT NULL, ids BLOB NOT NULL, created REAL NOT NULL, data TEXT NOT NULL,
        digest TEXT NOT NULL
    );
    CREATE INDEX turns_of_session ON turns (session)
    """,
    """
    ALTER TABLE sessions ADD COLUMN owner TEXT NOT NULL DEFAULT '';
    ALTER TABLE sessions ADD COLUMN kind TEXT NOT NULL DEFAULT '';
    CREATE TABLE responses (
        number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, owner TEXT NOT NULL, body TEXT NOT NULL
    );
    CREATE INDEX responses_of_owner ON responses (owner, number);
    CREATE INDEX turns_of_parent ON turns (parent)
    """,
)
"""Conversations of the first version have no owner: they are those of a server without keys, or with server.key."""


@dataclass(frozen=True)
class Session:
    """A conversation without its turns. model, template: hashes of what it was held with; template includes the whole
    tokenizer. head: its newest turn on the branch that goes on; None before the first. owner: the name of the key that
    began it, empty where there is one owner. kind: "" or RESPONSE."""

    id: str
    title: str
    created: float
    updated: float
    model: str
    template: str
    system: str
    sampling: dict[str, Any]
    head: str | None
    owner: str = ""
    kind: str = ""


@dataclass(frozen=True)
class Turn:
    """One message. ids: what it added to what the model reads, exactly; those of a question include what the template
    writes around it. data: whatever else is known of it, JSON."""

    id: str
    session: str
    parent: str | None
    role: str
    text: str
    ids: tuple[int, ...]
    created: float
    data: dict[str, Any]


@dataclass(frozen=True)
class NewTurn:
    """A turn that is to be kept. id: empty makes one. body: of a response, as it is sent; its id can then be named."""

    role: str
    text: str
    ids: Sequence[int]
    data: Mapping[str, Any] = field(default_factory=dict)
    id: str = ""
    body: Mapping[str, Any] | None = None


def new_session(
    model: str, template: str, *, system: str = "", sampling: Mapping[str, Any] | None = None, title: str = "",
    owner: str = "", kind: str = "",
) -> Session:  # fmt: skip
    """A conversation that nothing was said in, and that is in no store yet."""
    now, id, settings = time.time(), secrets.token_hex(8), dict(sampling or {})
    return Session(id, clean(title), now, now, model, template, clean(system), settings, None, owner, kind)


class Appended(NamedTuple):
    """What `append` kept: what was asked, and the answers."""

    asked: list[Turn]
    answers: list[Turn]


class SessionStore:
    """One file of conversations; safe for several threads and processes. path None keeps them in memory only."""

    def __init__(self, path: Path | None) -> None:
        """Raises CheckpointError for a file that cannot be used."""
        self.file = path
        self._lock = threading.Lock()
        self._held: set[str] = set()
        self._gone_on: Counter[str] = Counter()
        self._name = "the conversations in memory" if path is None else str(path)

        def refused(why: str) -> CheckpointError:
            return CheckpointError(f"{self._name} cannot be used ({why}); free it, or choose another sessions.path=")

        self._db = Database(path, UPGRADES, application=APPLICATION, opening=refused, using=refused)

    def close(self) -> None:
        """Let go of the file."""
        self._db.close()

    # ---- sessions

    def create(self, session: Session) -> Session:
        """Keep a new conversation before its first turn. Raises SessionError for an id that is taken."""
        with self._db.transaction() as db:
            if db.execute("SELECT 1 FROM sessions WHERE id = ?", (session.id,)).fetchone():
                raise SessionError(f"there is a conversation {session.id!r} already", "busy")
            self._begin(db, session)
        return self.get(session.id)

    def _begin(self, db: sqlite3.Connection, session: Session) -> None:
        row = [getattr(session, f.name) for f in fields(Session)]
        row[7] = json.dumps(session.sampling)
        kept = "ON CONFLICT (id) DO UPDATE SET sampling = excluded.sampling"
        db.execute(f"INSERT INTO sessions VALUES ({', '.join('?' * len(row))}) {kept}", row)

    def get(self, id: str, owner: str | None = None) -> Session:
        """A conversation by its id; owner: None for anybody's. Raises SessionError where there is none."""
        _check_id(id)
        rows = self._db.rows("SELECT * FROM sessions WHERE id = ?1 AND owner = ifnull(?2, owner)", id, owner)
        if not rows:
            raise SessionError(f"there is no conversation {id!r} in {self._name}", "missing")
        return _session(rows[0])

    def find(self, name: str) -> Session:
        """A conversation by its id, or by its title; of several the newest. Raises SessionError where there is none."""
        _check_id(name)
        order = "id = ?1 DESC, kind, updated DESC"
        rows = self._db.rows(f"SELECT * FROM sessions WHERE id = ?1 OR title = ?1 ORDER BY {order} LIMIT 1", name)
        if not rows:
            raise SessionError(f"there is no conversation {name!r} in {self._name}", "missing")
        return _session(rows[0])

    def sessions(self, most: int = 100, owner: str | None = None) -> list[Session]:
        """Conversations, of all or of one owner, the one that was continued last first; without those of responses."""
        which = "kind = '' AND owner = ifnull(?, owner) ORDER BY updated DESC, rowid DESC LIMIT ?"
        rows = self._db.rows(f"SELECT * FROM sessions WHERE {which}", owner, most)
        return [_session(row) for row in rows]

    def update(self, id: str, *, title: str | None = None, sampling: Mapping[str, Any] | None = None) -> Session:
        """Give a conversation another title or other settings."""
        said = {"title": title if title is None else clean(title)}
        said["sampling"] = None if sampling is None else json.dumps(dict(sampling))
        with self._db.transaction() as db:
            for name, value in said.items():
                if value is not None:
                    db.execute(f"UPDATE sessions SET {name} = ? WHERE id = ?", (value, id))
        return self.get(id)

    def move(self, id: str, turn: str | None) -> Session:
        """Go on from another turn of the conversation; None is its beginning."""
        if turn is not None and self.turn(turn).session != id:
            raise SessionError(f"turn {turn!r} is not of conversation {id!r}", "missing")
        with self._db.transaction() as db:
            db.execute("UPDATE sessions SET head = ? WHERE id = ?", (turn, id))
        return self.get(id)

    def delete(self, id: str) -> None:
        """Remove a conversation and all its turns. Raises SessionError while it is being written."""
        self.get(id)
        with self.writing(id), self._db.transaction() as db:
            db.execute("DELETE FROM responses WHERE id IN (SELECT id FROM turns WHERE session = ?)", (id,))
            db.execute("DELETE FROM turns WHERE session = ?", (id,))
            db.execute("DELETE FROM sessions WHERE id = ?", (id,))
        self._db.forget()

    def check(self, session: Session, model: str, template: str) -> None:
        """Refuse a conversation that was held with another model or template. Raises SessionError."""
        differ = [
            n for n, a, b in (("model", session.model, model), ("template", session.template, template)) if a != b
        ]
        if differ:
            raise SessionError(
                f"conversation {session.title or session.id!r} was held with another {' and '.join(differ)}, so its "
                "tokens are not what this one would have read; make a copy for this one",
                "foreign",
            )

    # ---- turns

    def append(
        self,
        session: str,
        parent: str | None,
        asked: Sequence[NewTurn],
        answers: Sequence[NewTurn] = (),
        begin: Session | None = None,
    ) -> Appended:
        """Keep `asked`, one after the other behind `parent`, and behind them each of `answers`, side by side: all in
        one transaction. The head is then the first answer. A question that was asked there already, with the same ids,
        is not kept twice, so that another answer to it stands beside the first.

        begin: the conversation itself, which is kept with its first turn, and its settings with each. Raises
        SessionError, keeping nothing.
        """
        with self._db.transaction() as db:
            if begin is not None:
                self._begin(db, begin)
            if parent is not None and self.turn(parent).session != session:
                raise SessionError(f"turn {parent!r} is not of conversation {session!r}", "missing")
            found = Appended([], [])
            for new in asked:
                found.asked.append(self._there(session, parent, new) or self._insert(db, session, parent, new))
                parent = found.asked[-1].id
            for new in answers:
                found.answers.append(self._insert(db, session, parent, new))
            head = next((turn.id for turn in (*found.answers[:1], *found.asked[::-1])), parent)
            title = next((turn.text for turn in found.asked if turn.role == "user"), "")
            title = " ".join(title.split())[:TITLE]
            db.execute(
                "UPDATE sessions SET head = ?, updated = ?, title = CASE title WHEN '' THEN ? ELSE title END "
                "WHERE id = ?",
                (head, time.time(), title, session),
            )
            if not db.execute("SELECT changes()").fetchone()[0]:
                raise SessionError(f"there is no conversation {session!r} in {self._name}", "missing")
        return found

    def _insert(self, db: sqlite3.Connection, session: str, parent: str | None, new: NewTurn) -> Turn:
        data = json.dumps(dict(new.data))
        turn = Turn(
            new.id or secrets.token_hex(8), session, parent, new.role, clean(new.text), tuple(new.ids), time.time(),
            json.loads(data),
        )  # fmt: skip
        if db.execute("SELECT 1 FROM turns WHERE id = ?", (turn.id,)).fetchone():
            raise SessionError(f"there is a turn {turn.id!r} already", "busy")
        before = "" if parent is None else db.execute("SELECT digest FROM turns WHERE id = ?", (parent,)).fetchone()[0]
        packed = np.asarray(turn.ids, "<u4").tobytes()
        row = (turn.id, session, parent, turn.role, turn.text, packed, turn.created, data)
        names = "id, session, parent, role, text, ids, created, data, digest"
        db.execute(f"INSERT INTO turns ({names}) VALUES ({', '.join('?' * 9)})", (*row, _digest(before, *row)))
        if new.body is not None:
            question = "INSERT INTO responses (id, owner, body) SELECT ?, owner, ? FROM sessions WHERE id = ?"
            db.execute(question, (turn.id, json.dumps(new.body), session))
        return turn

    def _there(self, session: str, parent: str | None, new: NewTurn) -> Turn | None:
        question = f"{TURN} WHERE session = ? AND parent IS ? AND role = ? AND text = ? AND ids = ? AND data = ?"
        packed = np.asarray(new.ids, "<u4").tobytes()
        rows = self._db.rows(question, session, parent, new.role, clean(new.text), packed, json.dumps(dict(new.data)))
        return _turn(rows[0]) if rows else None

    def turn(self, id: str) -> Turn:
        """One turn. Raises SessionError where there is none."""
        _check_id(id)
        rows = self._db.rows(f"{TURN} WHERE id = ?", id)
        if not rows:
            raise SessionError(f"there is no turn {id!r} in {self._name}", "missing")
        return _turn(rows[0])

    def has(self, id: str) -> bool:
        """Whether there is such a turn."""
        return bool(self._db.rows("SELECT 1 FROM turns WHERE id = ?", id))

    def turns(self, session: str) -> list[Turn]:
        """Every turn of a conversation, of all its branches, in the order they were kept."""
        return [_turn(row) for row in self._db.rows(f"{TURN} WHERE session = ? ORDER BY number", session)]

    def path(self, turn: str | None) -> list[Turn]:
        """The turns from the beginning to this one. Raises CheckpointError where one is not what was written."""
        question = f"""
            WITH RECURSIVE up AS (
                SELECT * FROM turns WHERE id = ? UNION ALL SELECT t.* FROM turns t JOIN up ON t.id = up.parent
            ) {TURN.replace("turns", "up")} ORDER BY number"""
        rows = self._db.rows(question, turn) if turn is not None else []
        if turn is not None and (not rows or rows[-1][0] != turn):
            raise SessionError(f"there is no turn {turn!r} in {self._name}", "missing")
        before, parent = "", None
        for row in rows:
            if row[2] != parent or row[8] != _digest(before, *row[:8]):
                raise CheckpointError(f"{self._name} is damaged: turn {row[0]} is not what was written; it is not read")
            before, parent = row[8], row[0]
        return [_turn(row) for row in rows]

    # ---- responses

    def response(self, id: str, owner: str | None = None) -> tuple[Turn, dict[str, Any]]:
        """An answer that was kept with a body, and that. Raises SessionError where there is none of that owner."""
        _check_id(id)
        rows = self._db.rows("SELECT body FROM responses WHERE id = ?1 AND owner = ifnull(?2, owner)", id, owner)
        if not rows:
            raise SessionError(f"there is no response {id[:100]!r}", "missing")
        return self.turn(id), json.loads(rows[0][0])

    def delete_response(self, id: str, owner: str | None = None) -> None:
        """Forget a response. What was said in it stays as long as a later one goes on from it, and then goes, too.

        Raises SessionError where there is none of that owner.
        """
        self.response(id, owner)
        with self._db.transaction() as db:
            self._forget(db, id)
        self._db.forget()

    @contextmanager
    def going_on(self, id: str) -> Iterator[None]:
        """While the next answer to a response is made, `keep_newest` of this process spares it. `delete_response` does
        not: who deletes means it."""
        with self._lock:
            self._gone_on[id] += 1
        try:
            yield
        finally:
            with self._lock:
                self._gone_on[id] -= 1
                self._gone_on += Counter()  # without those at 0

    def keep_newest(self, most: int, owner: str) -> None:
        """Forget all responses of an owner but the newest `most`, and those that are being gone on from."""
        question = "SELECT id FROM responses WHERE owner = ? ORDER BY number DESC LIMIT -1 OFFSET ?"
        with self._db.transaction() as db:  # asked in here: another thread or process may forget the same ones
            with self._lock:
                spared = set(self._gone_on)
            old = [id for (id,) in db.execute(question, (owner, most)) if id not in spared]
            for id in old:
                self._forget(db, id)
        if old:
            self._db.forget()

    def _forget(self, db: sqlite3.Connection, id: str) -> None:
        """Remove it, and upwards from it all that neither has a name nor leads to what has."""
        db.execute("DELETE FROM responses WHERE id = ?", (id,))
        found = db.execute("SELECT session FROM turns WHERE id = ?", (id,)).fetchone()
        if found is None:  # another was faster
            return
        (session,) = found
        turn: str | None = id
        needed = "SELECT 1 FROM responses WHERE id = ?1 UNION ALL SELECT 1 FROM turns WHERE parent = ?1"
        while turn is not None and not db.execute(needed, (turn,)).fetchone():
            (parent,) = db.execute("SELECT parent FROM turns WHERE id = ?", (turn,)).fetchone()
            db.execute("DELETE FROM turns WHERE id = ?", (turn,))
            db.execute("UPDATE sessions SET head = ? WHERE id = ? AND head = ?", (parent, session, turn))
            turn = parent
        if not db.execute("SELECT 1 FROM turns WHERE session = ?", (session,)).fetchone():
            db.execute("DELETE FROM sessions WHERE id = ?", (session,))

    # ---- one writer

    @contextmanager
    def writing(self, session: str) -> Iterator[None]:
        """One writer of a conversation, of all threads and processes, until this is left or the process ends.

        Raises SessionError at once where there is another.
        """
        handle = self._take(session)
        try:
            yield
        finally:
            with self._lock:
                self._held.discard(session)
            if handle is not None:
                handle.close()

    def _take(self, session: str) -> IO[bytes] | None:
        with self._lock:
            if session in self._held:
                raise _busy(session, f"process {os.getpid()}, this one")
            if self.file is None:
                self._held.add(session)
                return None
            folder = make_folder(self.file.with_name(f"{self.file.name}-locks"))
            name = hashlib.sha256(session.encode()).hexdigest()[:24]  # an id may hold what no file name can
            handle = open(folder / name, "a+b")
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                handle.seek(0)
                who = handle.read(20).decode(errors="replace").strip()
                handle.close()
                raise _busy(session, f"process {who}" if who else "another process") from None
            handle.truncate(0)
            handle.write(str(os.getpid()).encode())
            handle.flush()
            self._held.add(session)
            return handle


TURN = "SELECT id, session, parent, role, text, ids, created, data, digest FROM turns"


def clean(text: str) -> str:
    """Text without halves of characters, which JSON and terminals can bring and no file can hold."""
    return text.encode("utf-8", "replace").decode()


def _check_id(id: str) -> None:
    """Refuse what SQLite cannot be asked for."""
    if clean(id) != id:
        raise SessionError(f"{id[:100]!r} holds half a character, which no id and no title here does", "form")


def _busy(session: str, who: str) -> SessionError:
    return SessionError(f"conversation {session!r} is being written by {who}; wait for it, or begin another", "busy")


def _session(row: tuple[Any, ...]) -> Session:
    told = dict(zip((f.name for f in fields(Session)), row, strict=True))
    return Session(**{**told, "sampling": json.loads(told["sampling"])})


def _turn(row: tuple[Any, ...]) -> Turn:
    id, session, parent, role, text, packed, created, data, _ = row
    ids = tuple(np.frombuffer(packed, "<u4").tolist())
    return Turn(id, session, parent, role, text, ids, created, json.loads(data))


def _digest(before: str, *row: Any) -> str:
    """Of a turn and, through `before`, of all that came before it."""
    told = [part.hex() if isinstance(part, bytes) else part for part in row]
    return hashlib.sha256(json.dumps([before, *told]).encode()).hexdigest()
