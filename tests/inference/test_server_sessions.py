"""Kept conversations on the real server: exact ids, one writer, and clients that leave."""

import threading
import time
from contextlib import ExitStack

import httpx
import pytest
from tests.inference.serving import model_of, running, streamed, tokenizer_of

from trivium.data.chat import Chat
from trivium.inference.exchange import context_of
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


def test_half_a_character_in_any_text_is_refused_or_replaced(server):
    """JSON can name a lone surrogate, which SQLite and UTF-8 cannot hold."""
    half, id = r'"\ud800"', begun(server)
    asked = r'"messages": [{"role": "user", "content": "a"}]'
    for path, body, code in (
        (f"/v1/sessions/{id}", f'{{"head": {half}}}', 400),
        (f"/v1/sessions/{id}", f'{{"title": {half}}}', 200),
        ("/v1/sessions", f'{{"title": {half}, "system": {half}}}', 200),
        ("/v1/chat/completions", f'{{"session": {half}, {asked}}}', 400),
        ("/v1/chat/completions", f'{{"session": "{id}", "parent": {half}, {asked}}}', 400),
        ("/v1/chat/completions", f'{{"session": "{id}", "user": {half}, {asked}}}', 400),
        ("/v1/responses", f'{{"input": "a", "previous_response_id": {half}}}', 400),
        ("/v1/responses", f'{{"input": "a", "metadata": {{"a": {half}}}}}', 400),
        ("/v1/responses", f'{{"input": {half}}}', 400),
    ):
        head = {"content-type": "application/json"}
        found = httpx.post(server.url + path, content=body, headers=head, timeout=60, trust_env=False)
        assert found.status_code == code, (path, body, found.text)
        if code == 400:
            assert "\n" not in found.json()["error"]["message"]
    assert server.store.get(id).title == "?"


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


# ---- a full context


SMALL = 160
"""Tokens of a context that a few questions fill."""


@pytest.fixture
def small(tmp_path):
    """small(full): a server of a model with a context of SMALL tokens, and every prompt that its engine was given."""
    with ExitStack() as stack:

        def small(full):
            tokenizer = tokenizer_of()
            store = SessionStore(tmp_path / f"{full}.sqlite")
            model = model_of(tokenizer, context=SMALL)
            server = stack.enter_context(running(tokenizer, model=model, sessions=store, full=full, system="be kind"))
            server.store, server.prompts = store, []
            add = server.backend.add
            server.backend.add = lambda request: (server.prompts.append(request), add(request))[1]
            return server

        yield small


def fill(server, id, stream=False):
    """Ask until something leaves the context, or is refused; how many were answered."""
    ends = {"logit_bias": {str(i): -100 for i in server.tokenizer.stop_ids}, "max_tokens": 8, "temperature": 0}
    for number in range(12):
        body = {"session": id, **question(f"{number}: the cat sat on the mat"), **ends, "stream": stream}
        found = httpx.post(f"{server.url}/v1/chat/completions", json=body, trust_env=False, timeout=60)
        if found.status_code != 200:
            return number, found
        path = server.store.path(server.store.get(id).head)
        if any(turn.role == "context" for turn in path):
            return number + 1, path
    raise AssertionError("it never filled")


def test_full_error_refuses_the_question_and_keeps_what_was_said(small):
    server = small("error")
    id = begun(server)
    answered, found = fill(server, id)
    assert found.status_code == 400 and found.json()["error"]["code"] == "context_length_exceeded"
    assert len(server.store.path(server.store.get(id).head)) == 2 * answered > 2


@pytest.mark.parametrize("stream", [False, True])
def test_full_drop_oldest_leaves_out_whole_turns(small, stream):
    """The system message stays, whole questions go with their answers, and of the others every id stays."""
    server = small("drop_oldest")
    id = begun(server)
    _, path = fill(server, id, stream)
    context = context_of(path)
    assert server.tokenizer.decode(context.ids).startswith("system\nbe kind")
    assert not context.summary and context.turns[0].role == "user" and context.turns[0].text != path[0].text
    (kept,) = [turn for turn in path if turn.role == "context"]
    assert kept.data["left"] % 2 == 0 and kept.data["left"] > 0
    prompt = list(server.prompts[-1].prompt_ids)
    assert prompt == context.ids[: len(prompt)] and len(prompt) < SMALL
    for turn in context.turns[:-1]:
        if turn.role == "assistant":
            assert list(turn.ids) in [prompt[i : i + len(turn.ids)] for i in range(len(prompt))]
    assert len(httpx.get(f"{server.url}/v1/sessions/{id}", trust_env=False).json()["turns"]) == len(path)


@pytest.mark.parametrize("stream", [False, True])
def test_full_summarise_puts_the_models_own_words_in_their_place(small, stream):
    """The model is asked for a summary of what leaves, between two answers, and reads it from then on."""
    server = small("summarise")
    id = begun(server)
    _, path = fill(server, id, stream)
    asked = [r for r in server.prompts if r.id.startswith("summary")]
    (kept,) = [turn for turn in path if turn.role == "context"]
    assert asked and {(r.params.max_tokens, r.params.temperature) for r in asked} == {(SMALL // 8, 0.0)}
    told = server.tokenizer.decode(list(asked[0].prompt_ids))
    assert "Summarise this conversation" in told and "0: the cat sat on the mat" in told
    assert kept.text and f"Earlier in this conversation: {kept.text}" in server.tokenizer.decode(kept.ids)
    prompt = list(server.prompts[-1].prompt_ids)
    assert prompt == context_of(path).ids[: len(prompt)]
    server.idle()


def test_who_leaves_while_a_summary_is_made_frees_its_row(small):
    server = small("summarise")
    id = begun(server)
    before = len(server.store.turns(id))
    drop = server.backend.drop
    dropped = []
    server.backend.drop = lambda name: (dropped.append(name), drop(name))[1]
    server.backend._commit, plain = (lambda row, found: (_slow(row), plain(row, found))[1]), server.backend._commit

    def _slow(row):
        if row.request.id.startswith("summary"):
            time.sleep(0.2)

    with pytest.raises(httpx.ReadTimeout):
        for number in range(12):
            body = {"session": id, **question(f"{number}: the cat sat on the mat"), "max_tokens": 8}
            httpx.post(f"{server.url}/v1/chat/completions", json=body, trust_env=False, timeout=1)
    server.idle()
    assert [name for name in dropped if name.startswith("summary")], "the summary was given up"
    assert not any(turn.role == "context" for turn in server.store.turns(id)) and len(server.store.turns(id)) > before
    server.backend._commit = plain
    ask(server, id, "short?", max_tokens=4)
