"""Several keys: conversations, responses and feedback are of the key that made them; and files from before owners."""

import json
import sqlite3

import httpx
import pytest
from tests.inference.serving import running

from trivium.errors import CheckpointError, ConfigError, FeedbackError
from trivium.inference.database import Database
from trivium.inference.feedback import UPGRADES as FEEDBACK_UPGRADES
from trivium.inference.feedback import FeedbackStore
from trivium.inference.sessions import APPLICATION, UPGRADES, NewTurn, SessionStore, new_session
from trivium.schema import ServerConfig

KEYS = {"": "first-key", "ann": "ann-key:1", "bob": "bob-key"}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kept")
    store, feedback = SessionStore(folder / "s"), FeedbackStore(folder / "f")
    with running(
        sessions=store, feedback=feedback, key=KEYS[""], keys=[f"{name}:{key}" for name, key in KEYS.items() if name]
    ) as one:
        yield one


def ask(server, who, method, path, body=None, code=200):
    headers = {"Authorization": f"Bearer {KEYS.get(who, who)}"}
    found = httpx.request(method, server.url + path, json=body, headers=headers, timeout=60, trust_env=False)
    assert found.status_code == code, found.text
    return found.json()


def test_a_conversation_is_its_keys(server):
    """Another key is told that there is none: not that it is somebody else's."""
    id = ask(server, "ann", "POST", "/v1/sessions", {"title": "mine"})["id"]
    chat = {"session": id, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
    ask(server, "ann", "POST", "/v1/chat/completions", chat)
    for who in ("bob", ""):
        for method, path, body in (
            ("GET", f"/v1/sessions/{id}", None), ("POST", f"/v1/sessions/{id}", {"title": "x"}),
            ("POST", f"/v1/sessions/{id}/copy", {}), ("DELETE", f"/v1/sessions/{id}", None),
            ("POST", "/v1/chat/completions", chat),
        ):  # fmt: skip
            assert f"no conversation '{id}'" in ask(server, who, method, path, body, 404)["error"]["message"]
        assert id not in [s["id"] for s in ask(server, who, "GET", "/v1/sessions")["data"]]
        with server.service.sessions.writing(id):
            ask(server, who, "POST", "/v1/chat/completions", chat, 404)
    copy = ask(server, "ann", "POST", f"/v1/sessions/{id}/copy", {})["id"]
    assert {id, copy} <= {s["id"] for s in ask(server, "ann", "GET", "/v1/sessions")["data"]}
    assert ask(server, "ann", "GET", f"/v1/sessions/{id}")["title"] == "mine"
    ask(server, "bob", "GET", f"/v1/sessions/{copy}", code=404)
    ask(server, "ann", "DELETE", f"/v1/sessions/{id}")
    ask(server, "nobody", "GET", "/v1/sessions", code=401)


def test_a_turn_of_another_conversation_is_no_parent(server):
    """Neither of one's own, nor of another key's: what it says would be read by the model."""
    hers = ask(server, "ann", "POST", "/v1/sessions", {})["id"]
    chat = {"messages": [{"role": "user", "content": "a secret"}], "max_tokens": 4}
    turn = ask(server, "ann", "POST", "/v1/chat/completions", {**chat, "session": hers})["id"]
    mine = ask(server, "bob", "POST", "/v1/sessions", {})["id"]
    ask(server, "bob", "POST", "/v1/chat/completions", {**chat, "session": mine, "parent": turn}, 404)
    ask(server, "bob", "POST", f"/v1/sessions/{mine}", {"head": turn}, 404)


def test_a_response_is_its_keys(server):
    id = ask(server, "ann", "POST", "/v1/responses", {"input": "hello", "max_output_tokens": 4})["id"]
    body = {"input": "on", "previous_response_id": id, "max_output_tokens": 4}
    for who in ("bob", ""):
        ask(server, who, "GET", f"/v1/responses/{id}", code=404)
        ask(server, who, "DELETE", f"/v1/responses/{id}", code=404)
        ask(server, who, "POST", "/v1/responses", body, 404)
    ask(server, "ann", "POST", "/v1/responses", body)
    assert ask(server, "ann", "DELETE", f"/v1/responses/{id}")["deleted"]


def test_feedback_is_its_keys(server):
    """Two keys have a user of the same name; one of them removes hers."""
    chat = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4, "user": "zoe"}
    ids = {who: ask(server, who, "POST", "/v1/chat/completions", chat)["id"] for who in ("ann", "bob")}
    for who, id in ids.items():
        ask(
            server,
            "" if who == "bob" else "bob",
            "POST",
            "/v1/feedback",
            {"id": id, "kind": "thumb", "value": "up"},
            404,
        )
        ask(server, who, "POST", "/v1/feedback", {"id": id, "kind": "thumb", "value": "up"})
    mixed = {"id": ids["ann"], "kind": "preference", "value": ids["bob"]}
    ask(server, "ann", "POST", "/v1/feedback", mixed, 404)
    before = {who: ask(server, who, "GET", "/v1/feedback/stats") for who in KEYS}
    assert [before[who]["entries"] for who in ("ann", "bob", "")] == [1, 1, 0]
    assert ask(server, "", "DELETE", "/v1/feedback?user=zoe") == {
        "object": "feedback.removed", "records": 0, "entries": 0
    }  # fmt: skip
    gone = ask(server, "ann", "DELETE", "/v1/feedback?user=zoe")
    assert (gone["records"], gone["entries"]) == (1, 1)
    assert ask(server, "bob", "GET", "/v1/feedback/stats")["entries"] == 1
    assert ask(server, "ann", "GET", "/v1/feedback/stats")["removed"] == {"times": 1, "records": 1, "entries": 1}
    assert ask(server, "bob", "GET", "/v1/feedback/stats")["removed"]["times"] == 0


@pytest.mark.parametrize(
    "keys", [["ann"], ["ann:"], [":k"], ["ann:a", "ann:b"], ["ann:a", "bob:a"], ["a b:c"], ["a:K"]]
)
def test_keys_that_name_nobody_are_refused(keys):
    with pytest.raises(ConfigError, match=r"server\.keys must be NAME:KEY each"):
        ServerConfig(key="K", keys=keys)


def test_a_key_of_a_name_opens_a_public_address():
    assert ServerConfig(host="0.0.0.0", keys=["ann:a:b"]).owners == {"a:b": "ann"}
    with pytest.raises(ConfigError, match="can be reached by others"):
        ServerConfig(host="0.0.0.0")


# ---- files of the first version


def first_version(path, upgrades, application):
    """A file as the first version made it."""

    def fail(why):
        raise AssertionError(why)

    return Database(path, upgrades[:1], application=application, opening=fail, using=fail)


def old_sessions(path):
    """One conversation with one question and its answer."""
    store = SessionStore(path.with_name("new"))
    session = new_session("m", "t", title="old")
    store.append(session.id, None, [NewTurn("user", "q", [1])], [NewTurn("assistant", "a", [2, 3])], session)
    old = first_version(path, UPGRADES, APPLICATION)
    with old.transaction() as db:
        for table, count in (("sessions", 9), ("turns", 10)):
            for row in store._db.rows(f"SELECT * FROM {table}"):
                db.execute(f"INSERT INTO {table} VALUES ({', '.join('?' * count)})", row[:count])
    old.close()
    store.close()
    return session


def test_conversations_from_before_owners_are_of_server_key(tmp_path):
    session = old_sessions(tmp_path / "s")
    store = SessionStore(tmp_path / "s")
    assert store.get(session.id, "").title == "old" and store.get(session.id).kind == ""
    assert [t.text for t in store.path(store.get(session.id).head)] == ["q", "a"]
    with running(sessions=store, key="k", keys=["ann:a"]) as server:
        for key, count in (("k", 1), ("a", 0)):
            found = httpx.get(server.url + "/v1/sessions", headers={"Authorization": f"Bearer {key}"}, trust_env=False)
            assert len(found.json()["data"]) == count
    store.close()
    SessionStore(tmp_path / "s").close()


def test_an_upgrade_that_fails_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    """Its last statement is wrong: the columns that came before it are not there either."""
    session = old_sessions(tmp_path / "s")
    with monkeypatch.context() as patched:
        patched.setattr("trivium.inference.sessions.UPGRADES", (UPGRADES[0], UPGRADES[1] + "; CREATE nothing"))
        with pytest.raises(CheckpointError, match="cannot be used"):
            SessionStore(tmp_path / "s")
    with sqlite3.connect(tmp_path / "s") as db:
        assert db.execute("PRAGMA user_version").fetchone() == (1,)
        assert len(db.execute("SELECT * FROM sessions").fetchone()) == 9
    db.close()
    assert SessionStore(tmp_path / "s").get(session.id).owner == ""


def test_feedback_from_before_owners_is_of_server_key(tmp_path):
    old = first_version(tmp_path / "f", FEEDBACK_UPGRADES, 0)
    with old.transaction() as db:
        facts = {"prompt_ids": [1], "completion_ids": [2], "sampled": [True], "logprobs": [-1.0], "model": "m"}
        asked = {"messages": [{"role": "user", "content": "q"}], "answer": "a", "template": "t", "user": "zoe"}
        body = json.dumps({**facts, **asked, "id": "r"})
        db.execute("INSERT INTO records VALUES ('r', 'zoe', 1.0, ?)", (body,))
    old.close()
    store = FeedbackStore(tmp_path / "f")
    with pytest.raises(FeedbackError, match="no response 'r'"):
        store.give("r", "thumb", "up", owner="ann")
    assert store.give("r", "thumb", "up", owner="").new and store.record("r").owner == ""
    assert store.remove("zoe", "ann") == {"records": 0, "entries": 0}
    assert store.remove("zoe", "") == {"records": 1, "entries": 1}


def test_a_writer_that_waits_too_long_is_told_so_in_a_sentence(tmp_path):
    held = Database(tmp_path / "d", UPGRADES, opening=CheckpointError, using=CheckpointError)
    late = Database(tmp_path / "d", UPGRADES, opening=CheckpointError, using=CheckpointError, wait=0.05)
    with held.transaction():
        assert late.rows("SELECT count(*) FROM turns") == [(0,)], "who reads does not wait"
        with pytest.raises(CheckpointError, match=r"another process has been writing it for 0.05 s$"):
            with late.transaction():
                pass
    with late.transaction() as db:
        db.execute("INSERT INTO responses (id, owner, body) VALUES ('a', '', '')")
    assert held.rows("SELECT id FROM responses") == [("a",)]
