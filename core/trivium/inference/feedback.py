"""What was answered and what people said of it: one SQLite file, to learn from later.

A record is a response with all that it takes to learn from it exactly: the ids that were read and drawn, not only their
text. Feedback is a log: nothing in it is changed, a later verdict on the same thing stands in place of the earlier one,
and both are kept. What a person said and got can be removed by their name, and then really is: out of the file, too.

A change is on the disk when the call returns, so a kill loses nothing that was acknowledged.
"""

from __future__ import annotations

import hashlib
import json
import math
import sqlite3
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from trivium.data.tokenizer import Tokenizer
from trivium.errors import DataError, FeedbackError
from trivium.inference.database import Database
from trivium.registry import near_misses

KINDS = ("thumb", "score", "edit", "preference", "regenerate")
FIELDS = ("id", "kind", "value", "comment", "user", "key")
"""Of a message that gives feedback; the first three must be there."""
THUMBS = ("up", "down", "none")
MINUTE = 60.0
OWNED = "owner = ifnull(?, owner)"
UPGRADES = (
    """
    CREATE TABLE records (id TEXT PRIMARY KEY, user TEXT NOT NULL, time REAL NOT NULL, body TEXT NOT NULL)
        WITHOUT ROWID;
    CREATE TABLE log (number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL, kind TEXT NOT NULL,
        slot TEXT NOT NULL, value TEXT NOT NULL, comment TEXT NOT NULL, user TEXT NOT NULL, key TEXT,
        time REAL NOT NULL);
    CREATE UNIQUE INDEX log_key ON log (id, key) WHERE key IS NOT NULL;
    CREATE INDEX log_slot ON log (kind, slot, number);
    CREATE INDEX log_user ON log (user, time);
    CREATE INDEX records_user ON records (user);
    CREATE TABLE removed (number INTEGER PRIMARY KEY AUTOINCREMENT, time REAL NOT NULL, records INTEGER NOT NULL,
        entries INTEGER NOT NULL)
    """,
    """
    ALTER TABLE records ADD COLUMN owner TEXT NOT NULL DEFAULT '';
    ALTER TABLE log ADD COLUMN owner TEXT NOT NULL DEFAULT '';
    ALTER TABLE removed ADD COLUMN owner TEXT NOT NULL DEFAULT ''
    """,
)
"""What the first version kept has no owner: it is that of a server without keys, or with server.key."""


@dataclass(frozen=True)
class Limits:
    """What a store takes at most; beyond it a call is refused in one sentence and nothing is kept."""

    text: int = 20_000  # characters of an edit
    comment: int = 2_000  # characters
    name: int = 200  # characters of a user, a session, a key or an id
    record: int = 2_000_000  # bytes of a record as JSON
    ranked: int = 10  # answers in one ranking
    per_minute: int = 60  # entries of one user
    store: int = 20_000_000_000  # bytes of the file


@dataclass(frozen=True)
class Record:
    """One response of a conversation.

    messages: what was asked, {role, content} each, the last one not the assistant's. prompt_ids: what the model read,
    completion_ids: what stands behind it, the end of the turn included; sampled: for each of these whether the model
    drew it (an end that was put there because the answer was too long is not), logprobs: its natural log-probability
    under the unmodified distribution, 0 where not sampled. sampling: the request's parameters. model: SHA-256 of the
    weights, weight_version: of an engine whose weights change. template: `template_hash`. latency: seconds. time: of
    the end of the answer, in seconds since 1970. owner: the name of the server's key that it was asked with.
    """

    messages: list[dict[str, Any]]
    answer: str
    prompt_ids: list[int]
    completion_ids: list[int]
    sampled: list[bool]
    logprobs: list[float]
    model: str
    template: str
    sampling: dict[str, Any] = field(default_factory=dict)
    weight_version: int = 0
    latency: float = 0.0
    finish_reason: str = "stop"
    tools: list[dict[str, Any]] = field(default_factory=list)
    user: str = ""
    session: str = ""
    owner: str = ""
    time: float = field(default_factory=time.time)
    id: str = field(default_factory=lambda: f"resp-{uuid.uuid4().hex}")

    def __post_init__(self) -> None:
        sizes = len(self.completion_ids), len(self.sampled), len(self.logprobs)
        if len(set(sizes)) > 1:
            raise FeedbackError(
                f"response {self.id}: completion_ids, sampled and logprobs have {sizes[0]}, {sizes[1]} and {sizes[2]} "
                "entries; each token needs one of each"
            )
        if not self.messages or self.messages[-1].get("role") == "assistant":
            raise FeedbackError(f"response {self.id}: messages must end with what was asked, not with an answer")


@dataclass(frozen=True)
class Entry:
    """One line of the log: a user's verdict, of `kind`, on the response `id`. number: its place in the log."""

    number: int
    id: str
    kind: str
    value: Any
    comment: str
    user: str
    time: float


@dataclass(frozen=True)
class Given:
    """What came of feedback: its place in the log, and whether it is new there."""

    number: int
    new: bool


def template_hash(tokenizer: Tokenizer) -> str:
    """SHA-256 of all that turns a conversation into ids: vocabulary, special tokens and chat template."""
    return tokenizer.fingerprint


class FeedbackStore:
    """The store in one file. clock: seconds since 1970, for the rate limit and the log's times."""

    def __init__(self, path: Path, limits: Limits = Limits(), clock: Callable[[], float] = time.time) -> None:
        """Opens the file, or makes it. Raises DataError for one that is something else."""
        self.path, self.limits, self.clock = path, limits, clock
        self._db = Database(
            path, UPGRADES,
            opening=lambda why: DataError(f"{path} cannot be opened as a feedback store: {why}"),
            using=lambda why: FeedbackError(f"the feedback store {path} refuses: {why}", 503),
        )  # fmt: skip

    def close(self) -> None:
        """Let go of the file."""
        self._db.close()

    def add(self, record: Record) -> None:
        """Keep a response. The same id twice is once. Raises FeedbackError; who serves goes on serving after one."""
        try:
            body = json.dumps(asdict(record), allow_nan=False)  # ASCII: an answer may end in half a character
        except ValueError as error:
            raise FeedbackError(f"response {record.id} holds a number that is none: {error}") from error
        self._within("a response", len(body), self.limits.record, "bytes")
        for what in ("id", "user", "session"):
            self._within(what, len(getattr(record, what)), self.limits.name, "characters")
        with self._db.transaction() as db:
            self._has_room(db)
            row = (record.id, record.user, record.time, body, record.owner)
            db.execute("INSERT OR IGNORE INTO records VALUES (?, ?, ?, ?, ?)", row)

    def give(
        self, id: str, kind: str, value: Any, comment: str = "", user: str | None = None, key: str = "",
        owner: str | None = None,
    ) -> Given:  # fmt: skip
        """Say something of a response.

        thumb: "up", "down" or "none", which takes it back. score: a finite number, more is better. edit: what the
        answer should have been. preference: ids of answers to the same prompt, best first, this one among them; or one
        id, which this one is better than. regenerate: the id of the answer that was asked for in place of this one, or
        {"by": id, "kept": true or false}. user: None is the response's own. key: the same key again is the same
        feedback; without one, what stands already is not said again. owner: whose responses are known; None for all.
        Raises FeedbackError.
        """
        if kind not in KINDS:
            raise FeedbackError(f"kind={kind!r} is not one of {', '.join(KINDS)}.{near_misses(str(kind), KINDS)}")
        if not isinstance(id, str) or not id:
            raise FeedbackError("id must be that of a response, as text")
        if not isinstance(comment, str) or not isinstance(key, str) or not isinstance(user, str | None):
            raise FeedbackError("comment, key and user must be text")
        self._within("comment", len(comment), self.limits.comment, "characters")
        self._within("key", len(key), self.limits.name, "characters")
        _check_unicode(id, kind, value, comment, key)
        with self._db.transaction() as db:
            record = self._record(id, owner)
            if user is not None and user != record.user:
                raise FeedbackError(f"response {id} was given to another user, whose feedback it takes", 403)
            value, slot = self._checked(record, kind, value)
            said = json.dumps(value, ensure_ascii=False, allow_nan=False)
            if key:
                same = db.execute(
                    "SELECT number, kind, value, comment FROM log WHERE id=? AND key=?", (id, key)
                ).fetchone()
                if same and same[1:] != (kind, said, comment):
                    raise FeedbackError(f"key={key!r} was used for other feedback on response {id}", 409)
            else:
                same = db.execute(
                    "SELECT number, value, comment FROM log WHERE kind=? AND slot=? ORDER BY number DESC LIMIT 1",
                    (kind, slot),
                ).fetchone()
                same = same if same and same[1:] == (said, comment) else None
            if same:
                return Given(same[0], False)
            now = self.clock()
            since = (record.user, record.owner, now - MINUTE)
            recent = db.execute("SELECT count(*) FROM log WHERE user=? AND owner=? AND time>?", since).fetchone()[0]
            if recent >= self.limits.per_minute:
                raise FeedbackError(f"more than {self.limits.per_minute} entries in a minute; wait and send again", 429)
            self._has_room(db)
            row = (id, kind, slot, said, comment, record.user, key or None, now, record.owner)
            names = "id, kind, slot, value, comment, user, key, time, owner"
            number = db.execute(f"INSERT INTO log ({names}) VALUES (?,?,?,?,?,?,?,?,?)", row).lastrowid
            assert number is not None
            return Given(number, True)

    def feedback(self, body: Mapping[str, Any], owner: str | None = None) -> dict[str, Any]:
        """`give` with the fields of a client's message, of which null is unset -> what it is told."""
        given = {key: value for key, value in body.items() if value is not None}
        if unknown := [key for key in given if key not in FIELDS]:
            raise FeedbackError(f"{unknown[0][:40]!r} is no field of feedback.{near_misses(unknown[0], FIELDS)}")
        if missing := [key for key in FIELDS[:3] if key not in given]:
            raise FeedbackError(f"feedback needs {missing[0]}")
        found = self.give(**given, owner=owner)
        return {"object": "feedback", "id": given["id"], "number": found.number, "new": found.new}

    def remove(self, user: str, owner: str | None = None) -> dict[str, int]:
        """Remove all that a user got and said, out of the file too; how much that was stays, and nothing else. owner:
        None removes it of users of that name under every key."""
        if not isinstance(user, str) or not user:
            raise FeedbackError("name the user whose responses and feedback are to be removed")
        with self._db.transaction() as db:
            counts = {}
            for table in ("records", "log"):
                counts[table] = db.execute(f"DELETE FROM {table} WHERE user=? AND {OWNED}", (user, owner)).rowcount
            if any(counts.values()):
                names, row = "time, records, entries, owner", (self.clock(), *counts.values(), owner or "")
                db.execute(f"INSERT INTO removed ({names}) VALUES (?, ?, ?, ?)", row)
        self._db.forget()
        return {"records": counts["records"], "entries": counts["log"]}

    def stats(self, owner: str | None = None) -> dict[str, Any]:
        """Counts: responses, users, entries by kind as logged and as they stand, what was removed, bytes of the file.
        owner: None for all."""

        def counted(what: str, table: str, rest: str = "") -> list[tuple[Any, ...]]:
            return self._db.rows(f"SELECT {what} FROM {table} WHERE {OWNED} {rest}", owner)

        by_kind = "GROUP BY kind ORDER BY kind"
        logged = dict(counted("kind, count(*)", "log", by_kind))
        gone = counted("count(*), total(records), total(entries)", "removed")[0]
        return {
            "records": counted("count(*)", "records")[0][0],
            "users": len(counted("DISTINCT user, owner", "records", "AND user != ''")),
            "entries": sum(logged.values()),
            "logged": logged,
            "standing": dict(counted("kind, count(DISTINCT slot)", "log", by_kind)),
            "removed": {"times": gone[0], "records": int(gone[1]), "entries": int(gone[2])},
            "bytes": self._db.rows("PRAGMA page_count")[0][0] * self._db.rows("PRAGMA page_size")[0][0],
        }

    def record(self, id: str) -> Record:
        """A response. Raises FeedbackError where there is none of that id."""
        return self._record(id)

    def records(self) -> Iterator[Record]:
        """Every response, by time and id."""
        rows = self._db.rows("SELECT body FROM records ORDER BY time, id")
        return (Record(**json.loads(body)) for (body,) in rows)

    def log(self) -> list[Entry]:
        """Every entry that was ever made and not removed, in order."""
        return self._entries("SELECT number, id, kind, value, comment, user, time FROM log ORDER BY number")

    def standing(self) -> list[Entry]:
        """The entries that no later one stands in place of, in order."""
        newest = "SELECT max(number) FROM log GROUP BY kind, slot"
        return self._entries(
            f"SELECT number, id, kind, value, comment, user, time FROM log WHERE number IN ({newest}) ORDER BY number"
        )

    def _entries(self, question: str) -> list[Entry]:
        return [Entry(n, id, kind, json.loads(value), *rest) for n, id, kind, value, *rest in self._db.rows(question)]

    def _record(self, id: Any, owner: str | None = None) -> Record:
        known = isinstance(id, str) and self._db.rows(f"SELECT body FROM records WHERE id=? AND {OWNED}", id, owner)
        if not known:
            raise FeedbackError(f"there is no response {str(id)[:80]!r}, or it was removed", 404)
        return Record(**json.loads(known[0][0]))

    def _checked(self, record: Record, kind: str, value: Any) -> tuple[Any, str]:
        """The value in its one way of writing, and the slot in which a later one stands in its place."""
        if kind == "thumb":
            if value not in THUMBS or not isinstance(value, str):
                raise FeedbackError(f"a thumb is {', '.join(THUMBS)}; found {_short(value)}")
            return value, record.id
        if kind == "score":
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not _is_finite(value):
                raise FeedbackError(f"a score is a finite number; found {_short(value)}")
            return float(value), record.id
        if kind == "edit":
            if not isinstance(value, str) or not value.strip():
                raise FeedbackError(f"an edit is the text that the answer should have been; found {_short(value)}")
            self._within("an edit", len(value), self.limits.text, "characters")
            if value == record.answer:
                raise FeedbackError("this edit is the answer as it was; a thumb says that it is good")
            return value, record.id
        if kind == "regenerate":
            given = value if isinstance(value, Mapping) else {"by": value}
            if not set(given) <= {"by", "kept"} or not isinstance(given.get("kept"), bool | None):
                raise FeedbackError('regenerate is the later answer\'s id, or {"by": id, "kept": true or false}')
            self._same_prompt(record, [given.get("by")])
            return {"by": given["by"], "kept": given.get("kept")}, f"{record.id} {given['by']}"
        ranked = [record.id, value] if isinstance(value, str) else value
        if not isinstance(ranked, Sequence) or not 2 <= len(ranked) <= self.limits.ranked:
            raise FeedbackError(f"a preference is 2 to {self.limits.ranked} ids, best first; found {_short(value)}")
        if not all(isinstance(r, str) for r in ranked) or len(set(ranked)) < len(ranked) or record.id not in ranked:
            raise FeedbackError(f"a preference is ids, each once, response {record.id} among them")
        self._same_prompt(record, [r for r in ranked if r != record.id])
        return list(ranked), " ".join(sorted(ranked))

    def _same_prompt(self, record: Record, others: Sequence[Any]) -> None:
        for id in others:
            other = self._record(id, record.owner)
            if other.id == record.id:
                raise FeedbackError(f"response {id} is compared with itself")
            if (other.user, other.messages, other.tools) != (record.user, record.messages, record.tools):
                raise FeedbackError(f"responses {record.id} and {id} do not answer the same prompt of the same user")

    def _within(self, what: str, size: int, most: int, unit: str) -> None:
        if size > most:
            raise FeedbackError(f"{what} of {size:,} {unit} is too long; {most:,} are taken", 413)

    def _has_room(self, db: sqlite3.Connection) -> None:
        size = db.execute("PRAGMA page_count").fetchone()[0] * db.execute("PRAGMA page_size").fetchone()[0]
        if size >= self.limits.store:
            raise FeedbackError(f"the feedback store is full ({size:,} of {self.limits.store:,} bytes)", 507)


def answer_key(messages: Any, answer: str = "") -> str:
    """SHA-256 of a prompt, and of an answer to it: what makes two of them the same."""
    said = json.dumps([messages, answer], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(said.encode("utf-8", "surrogatepass")).hexdigest()


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False


def _check_unicode(*said: Any) -> None:
    try:
        json.dumps(said, ensure_ascii=False, default=str).encode()
    except (UnicodeEncodeError, ValueError, RecursionError) as error:
        raise FeedbackError("feedback holds half a character, or what is no JSON") from error


def _short(value: Any) -> str:
    said = repr(value)
    return said if len(said) <= 60 else f"{said[:57]}..."
