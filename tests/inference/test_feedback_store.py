"""The store of responses and feedback: what it takes, what it keeps once, what a kill leaves, what a removal leaves."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time

import pytest

from trivium.errors import DataError, FeedbackError
from trivium.inference.feedback import FeedbackStore, Limits, Record


def response(id, prompt="What is a heron?", answer="A bird.", **more):
    facts = {"prompt_ids": [1, 2], "completion_ids": [3, 4], "sampled": [True, True], "logprobs": [-0.5, -0.25]}
    facts |= {"model": "m" * 64, "template": "t" * 64, "time": 1000.0, "user": "ann", **more}
    return Record(messages=[{"role": "user", "content": prompt}], answer=answer, id=id, **facts)


@pytest.fixture
def store(tmp_path):
    held = FeedbackStore(tmp_path / "feedback.sqlite", clock=lambda: 5000.0)
    for record in (response("r1"), response("r2", answer="A long-legged bird."), response("r3", user="bob")):
        held.add(record)
    yield held
    held.close()


def refused(call, status, sentence):
    with pytest.raises(FeedbackError, match=sentence) as told:
        call()
    assert told.value.status == status


def test_response_comes_back_as_it_was_kept(store):
    assert store.record("r1") == response("r1")
    store.add(response("r1", answer="another"))  # a retry of the same response
    assert [r.answer for r in store.records()] == ["A bird.", "A long-legged bird.", "A bird."]


@pytest.mark.parametrize(
    ("kind", "value", "kept"),
    [
        ("thumb", "up", "up"),
        ("score", 4, 4.0),
        ("edit", "A wading bird.", "A wading bird."),
        ("preference", "r2", ["r1", "r2"]),
        ("preference", ["r2", "r1"], ["r2", "r1"]),
        ("regenerate", "r2", {"by": "r2", "kept": None}),
        ("regenerate", {"by": "r2", "kept": True}, {"by": "r2", "kept": True}),
    ],
)
def test_feedback_is_kept_in_one_way_of_writing(store, kind, value, kept):
    given = store.give("r1", kind, value, comment="so")
    (entry,) = store.log()
    assert (given.new, given.number) == (True, entry.number)
    assert (entry.id, entry.kind, entry.value, entry.comment, entry.user) == ("r1", kind, kept, "so", "ann")


@pytest.mark.parametrize(
    ("given", "status", "sentence"),
    [
        (("r9", "thumb", "up"), 404, "there is no response 'r9', or it was removed"),
        (("r1", "thumbs", "up"), 422, r"kind='thumbs' is not one of .* Did you mean thumb\?"),
        (("r1", "thumb", "left"), 422, "a thumb is up, down, none; found 'left'"),
        (("r1", "thumb", True), 422, "a thumb is up, down, none; found True"),
        (("r1", "thumb", ["up"]), 422, "a thumb is up"),
        (("r1", "score", float("nan")), 422, "a score is a finite number; found nan"),
        (("r1", "score", 10**400), 422, "a score is a finite number"),
        (("r1", "score", True), 422, "a score is a finite number; found True"),
        (("r1", "edit", "  "), 422, "an edit is the text that the answer should have been"),
        (("r1", "edit", "A bird."), 422, "this edit is the answer as it was"),
        (("r1", "edit", "x" * 20_001), 413, "an edit of 20,001 characters is too long; 20,000 are taken"),
        (("r1", "edit", "\ud800"), 422, "half a character"),
        (("r1", "thumb", "up", "y" * 2_001), 413, "comment of 2,001 characters is too long"),
        (("r1", "thumb", "up", "", "bob"), 403, "response r1 was given to another user"),
        (("r1", "preference", "r3"), 422, "do not answer the same prompt of the same user"),
        (("r1", "preference", ["r2", "r2"]), 422, "each once, response r1 among them"),
        (("r1", "preference", ["r1"]), 422, "a preference is 2 to 10 ids"),
        (("r1", "preference", {"a": 1}), 422, "a preference is 2 to 10 ids"),
        (("r1", "regenerate", "r1"), 422, "response r1 is compared with itself"),
        (("r1", "regenerate", {"by": "r2", "because": 1}), 422, "regenerate is the later answer's id, or"),
        (("r1", "regenerate", None), 404, "there is no response 'None'"),
        ((1, "thumb", "up"), 422, "id must be that of a response"),
        (("r1", "thumb", "up", 5), 422, "comment, key and user must be text"),
    ],
)
def test_bad_feedback_is_refused_in_a_sentence_and_nothing_is_kept(store, given, status, sentence):
    refused(lambda: store.give(*given), status, sentence)
    assert store.log() == []


def test_same_feedback_is_kept_once_and_a_change_stands_in_its_place(store):
    """up, up, down, down, up: three lines, the newest stands. With a key the repeat is known whatever came between."""
    news = [store.give("r1", "thumb", v).new for v in ("up", "up", "down", "down", "up")]
    assert news == [True, False, True, False, True]
    assert [e.value for e in store.log()] == ["up", "down", "up"]
    assert [e.value for e in store.standing()] == ["up"]
    first = store.give("r2", "thumb", "up", key="k")
    store.give("r2", "thumb", "down")
    again = store.give("r2", "thumb", "up", key="k")
    assert (again.number, again.new) == (first.number, False)
    assert [e.value for e in store.standing() if e.id == "r2"] == ["down"]
    refused(
        lambda: store.give("r2", "thumb", "none", key="k"), 409, "key='k' was used for other feedback on response r2"
    )


def test_other_rankings_stand_beside_each_other_and_the_same_answers_anew_in_place(store):
    store.add(response("r4", answer="A fish."))
    for value in (["r1", "r2"], ["r1", "r4"], ["r2", "r1"]):
        store.give("r1", "preference", value)
    assert [e.value for e in store.standing()] == [["r1", "r4"], ["r2", "r1"]]


def test_rate_is_of_each_user_and_of_a_minute(tmp_path):
    now = [100.0]
    store = FeedbackStore(tmp_path / "f", Limits(per_minute=3), clock=lambda: now[0])
    for i in range(6):
        store.add(response(f"r{i}"))
    store.add(response("b", user="bob"))
    for i in range(3):
        store.give(f"r{i}", "thumb", "up")
    refused(lambda: store.give("r3", "thumb", "up"), 429, "more than 3 entries in a minute")
    assert not store.give("r0", "thumb", "up").new  # a retry is none
    assert store.give("b", "thumb", "up").new
    now[0] += 60.0
    assert store.give("r3", "thumb", "up").new


def test_size_of_store_and_of_response_is_limited(tmp_path):
    store = FeedbackStore(tmp_path / "f", Limits(store=80_000, record=30_000))
    refused(lambda: store.add(response("r", answer="x" * 40_000)), 413, "a response of 40,")
    with pytest.raises(FeedbackError, match="the feedback store is full") as told:
        for i in range(100):
            store.add(response(f"r{i}", answer="x" * 10_000))
    assert told.value.status == 507 and 3 <= len(list(store.records())) <= 8


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"logprobs": [-1.0]}, "have 2, 2 and 1 entries; each token needs one of each"),
        ({"logprobs": [-1.0, float("nan")]}, "holds a number that is none"),
    ],
)
def test_response_that_does_not_fit_together_is_refused(store, changes, sentence):
    with pytest.raises(FeedbackError, match=sentence):
        store.add(response("x", **changes))


def test_removing_a_user_leaves_counts_and_no_byte_of_theirs(store, tmp_path):
    """Two responses and two entries of ann go; bob's stay. The secret is in no file of the store afterwards."""
    secret = "zebra-crossing-4711"
    store.add(response("r5", prompt=secret, user="carol-the-first"))
    store.give("r5", "edit", f"it is {secret}", comment=secret)
    store.give("r1", "thumb", "up")
    assert any(secret.encode() in f.read_bytes() for f in tmp_path.iterdir())
    assert store.remove("carol-the-first") == {"records": 1, "entries": 1}
    for file in tmp_path.iterdir():
        assert secret.encode() not in file.read_bytes() and b"carol" not in file.read_bytes(), file
    refused(lambda: store.give("r5", "thumb", "up"), 404, "or it was removed")
    assert store.remove("carol-the-first") == {"records": 0, "entries": 0}
    stats = store.stats()
    assert stats["removed"] == {"times": 1, "records": 1, "entries": 1}
    assert (stats["records"], stats["users"], stats["logged"], stats["standing"]) == (3, 2, {"thumb": 1}, {"thumb": 1})
    refused(lambda: store.remove(""), 422, "name the user")


def test_file_that_is_no_store_is_refused(tmp_path):
    (tmp_path / "f").write_text("not a data base, and longer than a hundred bytes " * 4)
    with pytest.raises(DataError, match="f cannot be opened as a feedback store: file is not a database"):
        FeedbackStore(tmp_path / "f")
    sqlite3.connect(tmp_path / "g").execute("PRAGMA user_version=7").connection.close()
    with pytest.raises(
        DataError, match="g cannot be opened as a feedback store: it is of version 7, this program reads version 2"
    ):
        FeedbackStore(tmp_path / "g")


# ---- several writers, and a kill

WRITER = """
import sys
from pathlib import Path
from trivium.errors import FeedbackError
from trivium.inference.feedback import FeedbackStore, Limits, Record
path, name, count, shared = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4] == "shared"
store = FeedbackStore(path, Limits(per_minute=10**9))
print("ready", flush=True)
sys.stdin.readline()
for i in range(count):
    id = f"r{i}" if shared else f"{name}-{i}"
    store.add(Record([{"role": "user", "content": f"q{i}"}], f"a{i}", [1], [2], [True], [-1.0], "m", "t", id=id))
    store.give(id, "thumb", "up")
    print(i, flush=True)
"""


def writer(path, name, count, shared=""):
    command = [sys.executable, "-c", WRITER, str(path), name, str(count), shared]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def integrity(path):
    with sqlite3.connect(path) as db:
        return db.execute("PRAGMA integrity_check").fetchone()[0]


def test_processes_that_write_at_once_lose_and_double_nothing(tmp_path):
    """Three processes give the same 40 thumbs at once (each kept once), then 40 of their own (each kept)."""
    for shared, expected in (("shared", 40), ("", 120)):
        path = tmp_path / f"store{shared}"
        writers = [writer(path, name, 40, shared) for name in "abc"]
        assert [w.stdout.readline() for w in writers] == ["ready\n"] * 3
        for w in writers:
            w.stdin.write("go\n")
            w.stdin.flush()
        assert [w.wait() for w in writers] == [0, 0, 0]
        for w in writers:
            w.stdin.close()
            w.stdout.close()
        store = FeedbackStore(path)
        assert (len(list(store.records())), len(store.log())) == (expected, expected)
        store.close()
        assert integrity(path) == "ok"


def test_kill_loses_nothing_that_was_acknowledged(tmp_path):
    """Killed 5 times amid writing: all that was said to be kept is there, and at most the one being written besides."""
    path, least = tmp_path / "store", 0
    for round in range(5):
        child = writer(path, f"w{round}", 10**6)
        assert child.stdout.readline() == "ready\n"
        child.stdin.write("go\n")
        child.stdin.flush()
        said = [int(child.stdout.readline()) for _ in range(4 + 3 * round)]
        time.sleep(0.003 * round)
        assert child.poll() is None, "it must be amid its work"
        os.kill(child.pid, signal.SIGKILL)
        said += [int(line) for line in child.stdout.read().split("\n")[:-1]]
        child.wait()
        child.stdin.close()
        child.stdout.close()
        store = FeedbackStore(path)
        mine = {e.id for e in store.log() if e.id.startswith(f"w{round}-")}
        assert {f"w{round}-{i}" for i in said} <= mine and len(mine) <= len(said) + 1
        assert len(list(store.records())) - len(store.log()) <= round + 1
        least += len(said)
        assert len(store.log()) >= least
        store.close()
    assert integrity(path) == "ok"
    with sqlite3.connect(path) as db:
        assert json.loads(db.execute("SELECT body FROM records LIMIT 1").fetchone()[0])["model"] == "m"
