"""Kept conversations on the real server: exact ids, one writer, and clients that leave."""

import threading
import time

import httpx
import pytest
from tests.inference.serving import running, streamed

from trivium.data.chat import Chat
from trivium.inference.sessions import SessionStore


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    store = SessionStore(tmp_path_factory.mktemp("sessions") / "s.sqlite")
    with running(sessions=store, system="be kind") as one:
        one.store = store
        yield one
    store.close()


def question(text):
    return {"messages": [{"role": "user", "content": text}]}


def ask(server, session, text, **more):
    return server.post(
        "/v1/chat/completions", {"session": session, "messages": [{"role": "user", "content": text}], **more}
    )


def begun(server, **how):
    return server.post("/v1/sessions", how)["id"]


def test_a_kept_conversation_goes_on_with_the_ids_it_drew(server):
    id = begun(server)
    first = ask(server, id, "hello there", temperature=1.0, seed=3)
    events = streamed(
        server, "/v1/chat/completions", {"session": id, "messages": [{"role": "user", "content": "and?"}]}
    )
    assert events[-1] == "[DONE]"
    path = server.store.path(server.store.get(id).head)
    assert [t.role for t in path] == ["user", "assistant"] * 2
    assert path[1].id == first["id"] and path[1].text == first["choices"][0]["message"]["content"]
    said = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello there"}]
    chat = Chat(server.tokenizer)
    asked = chat.prompt_ids(said)
    assert list(path[0].ids) == asked and first["usage"]["prompt_tokens"] == len(asked)
    assert len(path[1].ids) - first["usage"]["completion_tokens"] in (0, 1), "as drawn; an end closes what was cut"
    said += [{"role": "assistant", "content": path[1].text}, {"role": "user", "content": "and?"}]
    assert [i for t in path[:3] for i in t.ids] == chat.prompt_ids(said, [*path[0].ids, *path[1].ids])
    found = httpx.get(f"{server.url}/v1/sessions/{id}", trust_env=False).json()
    assert [t["text"] for t in found["turns"]] == [t.text for t in path] and found["head"] == path[-1].id


def test_branches_and_several_answers(server):
    id = begun(server)
    two = ask(server, id, "hello there", n=2, temperature=1.0)
    again = ask(server, id, "hello there", parent="", temperature=1.0)
    turns = server.store.turns(id)
    assert [t.id for t in turns[1:]] == [two["id"], f"{two['id']}-1", again["id"]] and len(
        {t.parent for t in turns[1:]}
    ) == 1
    ask(server, id, "on", parent=f"{two['id']}-1")
    assert [t.id for t in server.store.path(server.store.get(id).head)][1] == f"{two['id']}-1"


def refused(server, status, body):
    body = {"messages": [{"role": "user", "content": "hi"}], **body}
    found = httpx.post(f"{server.url}/v1/chat/completions", json=body, trust_env=False, timeout=60)
    assert found.status_code == status, found.text
    return found.json()["error"]["message"]


def test_what_cannot_be_is_told(server):
    id = begun(server)
    assert "no conversation 'x'" in refused(server, 404, {"session": "x"})
    assert "no turn 'x'" in refused(server, 404, {"session": id, "parent": "x"})
    assert "parent needs session" in refused(server, 400, {"parent": "x"})
    assert "not one of system" in refused(
        server, 400, {"session": id, "messages": [{"role": "system", "content": "a"}]}
    )
    with server.store.writing(id):
        assert "is being written by process" in refused(server, 409, {"session": id})
    with server.store._db.transaction() as db:
        db.execute("UPDATE sessions SET model = 'other' WHERE id = ?", (id,))
    assert "was held with another model" in refused(server, 409, {"session": id})
    assert server.store.turns(id) == []


def test_a_client_that_leaves_keeps_nothing_and_frees_the_conversation(server):
    id = begun(server)
    ask(server, id, "hello there")
    before = server.store.turns(id)
    server.backend.seconds_per_step = 0.05
    body = {"session": id, "messages": [{"role": "user", "content": "on"}], "max_tokens": 300, "stream": True,
            "temperature": 1.0, "logit_bias": {str(i): -100 for i in server.tokenizer.stop_ids}}  # fmt: skip
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, trust_env=False, timeout=60) as found:
        lines = found.iter_lines()
        assert found.status_code == 200 and next(lines).startswith("data: ")
        assert "being written" in refused(server, 409, {"session": id})
    server.backend.seconds_per_step = 0.0
    server.idle()
    assert server.store.turns(id) == before
    end = time.monotonic() + 20
    while id in server.store._held and time.monotonic() < end:
        time.sleep(0.01)
    ask(server, id, "on")
    assert len(server.store.turns(id)) == 4


def test_many_at_once_on_one_conversation_are_one_or_refused(server):
    """Eight ask at the same moment: each is answered and kept, or refused with 409; nothing else."""
    id, codes = begun(server), []

    def one(number):
        body = {"session": id, "messages": [{"role": "user", "content": f"q{number}"}]}
        codes.append(
            httpx.post(f"{server.url}/v1/chat/completions", json=body, trust_env=False, timeout=60).status_code
        )

    threads = [threading.Thread(target=one, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(codes) <= {200, 409} and 200 in codes
    path = server.store.path(server.store.get(id).head)
    assert len(path) == 2 * codes.count(200) == len(server.store.turns(id))
