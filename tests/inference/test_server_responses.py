"""/v1/responses on kept conversations: exact ids, branches, deletion, calls of functions, and what a kill leaves."""

import json
import re
import signal
import threading
import time

import httpx
import pytest
from openai import OpenAI
from tests.inference.serving import running, streamed, tokenizer_of

from trivium.data.chat import Chat
from trivium.errors import SessionError
from trivium.inference.sessions import RESPONSE, NewTurn, SessionStore, new_session

FORM = {"name": "weather", "parameters": {"type": "object"}}
TOOLS = [{"type": "function", "function": FORM}]
RAIN = {"type": "function", "name": "weather", "parameters": {"type": "object"}}
SUN = {"type": "function", "name": "sun", "parameters": {"type": "object"}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"place": "Köln"}}\n</tool_call>'


@pytest.fixture(scope="module", params=["file", "memory"])
def server(request, tmp_path_factory):
    """With a file for conversations, and without."""
    store = SessionStore(tmp_path_factory.mktemp("kept") / "s.sqlite") if request.param == "file" else None
    with running(sessions=store, max_kept=50) as one:
        yield one


@pytest.fixture
def prompts(server):
    """Ids of every prompt that the engine was given."""
    asked, add = [], server.backend.add
    server.backend.add = lambda request: (asked.append(list(request.prompt_ids)), add(request))[1]
    yield asked
    server.backend.add = add


def say(server, text, **more):
    return server.post("/v1/responses", {"input": text, "max_output_tokens": 5, "temperature": 1.0, **more})


def follow(server, one, text, **more):
    return say(server, text, previous_response_id=one["id"], **more)


def status(server, method, path, **how):
    return httpx.request(method, server.url + path, timeout=60, trust_env=False, **how).status_code


def ids_of(server, one):
    return [i for turn in server.service.store.path(one["id"]) for i in turn.ids]


def drawn(server, asked, one):
    """The ids of the answer to the prompt `asked`."""
    return ids_of(server, one)[len(asked) :]


def test_two_go_on_from_the_same_response(server, prompts):
    """A tree: both begin with the very ids of the first, and neither knows of the other."""
    one = say(server, "hello there")
    left, right = follow(server, one, "on"), follow(server, one, "back")
    far = follow(server, right, "more")
    before = ids_of(server, one)
    assert prompts[1][: len(before)] == before == prompts[2][: len(before)] and prompts[1] != prompts[2]
    assert prompts[3][: len(ids_of(server, right))] == ids_of(server, right)
    texts = [turn.text for turn in server.service.store.path(far["id"]) if turn.role == "user"]
    assert texts == ["hello there", "back", "more"]
    assert {left["id"], right["id"]} == {
        t.id for t in server.service.store.turns(server.service.store.turn(one["id"]).session)
        if t.role == "assistant" and t.id in (left["id"], right["id"])
    }  # fmt: skip


def test_what_is_not_stored_cannot_be_named(server):
    one = say(server, "hello")
    two = follow(server, one, "on", store=False)
    assert two["store"] is False
    assert status(server, "GET", f"/v1/responses/{two['id']}") == 404
    body = {"input": "x", "previous_response_id": two["id"]}
    assert status(server, "POST", "/v1/responses", json=body) == 404
    with pytest.raises(SessionError):
        server.service.store.turn(two["id"])
    assert follow(server, one, "on")["output"]


def test_other_instructions_leave_every_id_from_the_first_answer_on(server, prompts):
    """The beginning is written anew under them; what was drawn is not tokenised again."""
    one = say(server, "hello there", instructions="be kind")
    two = follow(server, one, "and?", instructions="be kind")
    answers = drawn(server, prompts[1], two)
    follow(server, two, "well?", instructions="be short")
    follow(server, two, "well?")
    chat, asked = Chat(server.tokenizer), [{"role": "user", "content": "hello there"}]
    first = chat.prompt_ids([{"role": "system", "content": "be kind"}, *asked])
    assert prompts[0] == first
    rest = [*prompts[1][len(first) :], *answers]
    short = chat.prompt_ids([{"role": "system", "content": "be short"}, *asked])
    assert prompts[2][: len(short) + len(rest)] == [*short, *rest]
    bare = chat.prompt_ids(asked)
    assert prompts[3][: len(bare) + len(rest)] == [*bare, *rest], "instructions are not carried over"


def test_a_system_message_of_the_input_is_carried_on(server, prompts):
    one = say(server, [{"role": "developer", "content": "be kind"}, {"role": "user", "content": "hello"}])
    follow(server, one, "on")
    assert prompts[1][: len(prompts[0])] == prompts[0]
    assert "be kind" in server.tokenizer.decode(prompts[0])


def test_deleting_one_in_the_middle_leaves_those_behind_it(server):
    """What was said goes when nothing that has a name needs it any more."""
    store = server.service.store
    one = say(server, "hello")
    two = follow(server, one, "on")
    session = store.turn(one["id"]).session
    for id in (one["id"], two["id"]):
        assert httpx.delete(f"{server.url}/v1/responses/{id}", trust_env=False).json()["deleted"] is True
        assert status(server, "DELETE", f"/v1/responses/{id}") == 404
        body = {"input": "x", "previous_response_id": id}
        assert status(server, "POST", "/v1/responses", json=body) == 404
        if id == one["id"]:
            assert follow(server, two, "still?", store=False)["output"]
            assert len(store.turns(session)) == 4
    assert store.turns(session) == []
    with pytest.raises(SessionError):
        store.get(session)


def test_the_oldest_are_forgotten():
    with running(max_kept=2) as server:
        three = [say(server, str(i)) for i in range(3)]
        assert [status(server, "GET", f"/v1/responses/{r['id']}") for r in three] == [404, 200, 200]
        four = follow(server, three[1], "on")
        assert status(server, "GET", f"/v1/responses/{three[1]['id']}") == 404
        assert len(server.service.store.path(four["id"])) == 4, "what a later one goes on from stays"


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    """A server that keeps two responses."""
    with running(sessions=SessionStore(tmp_path_factory.mktemp("narrow") / "s.sqlite"), max_kept=2) as one:
        yield one


def meanwhile(server, one, act, **more):
    """The answer "so" behind `one`; `act` is done, from another thread than the engine's, once the engine has been
    asked for it and before a token is drawn."""
    add = server.backend.add

    def first(request):
        server.backend.add = add
        acting = threading.Thread(target=act)
        acting.start()
        acting.join()
        scripted(server, request.prompt_ids, "so")
        return add(request)

    server.backend.add = first
    try:
        if more.get("stream"):
            body = {"input": "on", "max_output_tokens": 5, "previous_response_id": one["id"]}
            return streamed(server, "/v1/responses", body)[-1]["response"]
        return follow(server, one, "on", **more)
    finally:
        server.backend.add = add


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_gone_on_from_is_not_forgotten_meanwhile(narrow, stream):
    """Others are kept and `one` is the oldest; it goes when the answer is there."""
    store, one = narrow.service.store, say(narrow, "hello")

    def others():
        for number in range(3):
            session = new_session("m", "t", kind=RESPONSE)
            answer = NewTurn("assistant", "a", [1], {}, f"{one['id']}-{number}", {})
            store.append(session.id, None, [NewTurn("user", "q", [1])], [answer], session)
            store.keep_newest(2, "")

    two = meanwhile(narrow, one, others, stream=stream)
    assert two["store"] is True and two["status"] == "completed"
    assert httpx.get(f"{narrow.url}/v1/responses/{two['id']}", trust_env=False).json() == two
    assert len(store.path(two["id"])) == 4
    say(narrow, "another")
    assert status(narrow, "GET", f"/v1/responses/{one['id']}") == 404, "it is held no longer"


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_whose_question_was_deleted_is_sent_and_not_kept(narrow, stream):
    store, one = narrow.service.store, say(narrow, "hello")
    two = meanwhile(narrow, one, lambda: store.delete_response(one["id"]), stream=stream)
    assert two["store"] is False and two["status"] == "completed"
    assert two["output"][0]["content"][0]["text"] == "so"
    assert [status(narrow, "GET", f"/v1/responses/{r['id']}") for r in (one, two)] == [404, 404]
    assert not store.has(one["id"]) and not store.has(two["id"])


def test_responses_are_not_listed_as_conversations(tmp_path):
    with running(sessions=SessionStore(tmp_path / "s")) as server:
        one = say(server, "hello")
        assert httpx.get(f"{server.url}/v1/sessions", trust_env=False).json()["data"] == []
        assert httpx.get(f"{server.url}/v1/responses/{one['id']}", trust_env=False).json() == one


# ---- calls of functions


def scripted(server, prompt, text):
    """The answer to `prompt`, drawn one byte a token and not as the tokenizer would cut it; and the end."""
    tokenizer = server.tokenizer
    of = {tokenizer.bytes_of(i)[0]: i for i in range(tokenizer.vocab_size) if len(tokenizer.bytes_of(i) or ()) == 1}
    ids = [*(of[b] for b in text.encode()), tokenizer.eot_id]
    server.backend.script[tuple(prompt)] = ids
    return ids


def test_a_call_and_its_result_are_kept_and_gone_on_with(server, prompts):
    """The call as it was drawn, byte by byte; its result as the template writes it; and then an answer."""
    chat, tools = (
        Chat(server.tokenizer),
        [{"type": "function", "function": {k: RAIN[k] for k in ("name", "parameters")}}],
    )
    asked = [{"role": "user", "content": "rain?"}]
    first = chat.prompt_ids(asked, tools=tools)
    ids = scripted(server, first, "let me\n" + CALL)
    one = say(server, "rain?", tools=[RAIN], max_output_tokens=150)
    message, call = one["output"]
    assert message["content"][0]["text"] == "let me\n" and one["status"] == "completed"
    assert (call["type"], call["name"], json.loads(call["arguments"])) == (
        "function_call",
        "weather",
        {"place": "Köln"},
    )
    assert ids_of(server, one) == [*first, *ids]
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "wet"}
    two = follow(server, one, [result], tools=[RAIN])
    function = {"name": "weather", "arguments": {"place": "Köln"}}
    called = [{"id": call["call_id"], "type": "function", "function": function}]
    said = {"role": "assistant", "content": "let me\n", "tool_calls": called}
    told = [*asked, said, {"role": "tool", "content": "wet", "tool_call_id": call["call_id"]}]
    assert prompts[1] == chat.prompt_ids(told, [*first, *ids], tools) and "wet" in server.tokenizer.decode(prompts[1])
    three = follow(server, two, "thanks", tools=[RAIN])
    assert prompts[2][: len(ids_of(server, two))] == ids_of(server, two) and three["tools"][0]["name"] == "weather"


def test_calls_are_streamed_as_the_official_client_reads_them(server):
    asked = [{"role": "user", "content": "rain now?"}]
    scripted(server, Chat(server.tokenizer).prompt_ids(asked, tools=TOOLS), CALL)
    client = OpenAI(base_url=server.url + "/v1", api_key="-", max_retries=0)
    how = {"model": "tiny", "input": "rain now?", "tools": [RAIN], "max_output_tokens": 150}
    events = list(client.responses.create(**how, stream=True))
    assert [e.type for e in events] == [
        "response.created", "response.in_progress", "response.output_item.added",
        "response.function_call_arguments.delta", "response.function_call_arguments.done",
        "response.output_item.done", "response.completed",
    ]  # fmt: skip
    (call,) = events[-1].response.output
    assert json.loads(events[3].delta) == json.loads(call.arguments) == {"place": "Köln"}
    assert client.responses.retrieve(events[-1].response.id).output == [call]


def test_other_tools_are_read_from_the_next_question_on(server, prompts):
    one = say(server, "hello", tools=[RAIN])
    follow(server, one, "on", tools=[SUN])
    follow(server, one, "on")
    texts = [server.tokenizer.decode(p) for p in prompts]
    assert ["weather" in t for t in texts] == [True, False, False]
    assert ["sun" in t for t in texts] == [False, True, False]
    answer = drawn(server, prompts[0], one)
    for prompt in prompts[1:]:
        assert any(prompt[i : i + len(answer)] == answer for i in range(len(prompt)))


def refused(server, code, **body):
    found = httpx.post(server.url + "/v1/responses", json={"input": "x", **body}, timeout=60, trust_env=False)
    assert found.status_code == code, found.text
    return found.json()["error"]["message"]


def test_what_calls_cannot_be(server):
    one = say(server, "hello")
    result = {"type": "function_call_output", "call_id": "c1", "output": "x"}
    assert "no call 'c1' before its result" in refused(server, 400, input=[result])
    assert "no call 'c1'" in refused(server, 400, input=[result], previous_response_id=one["id"], tools=[RAIN])
    assert "tool_choice names sun" in refused(
        server, 400, tools=[RAIN], tool_choice={"type": "function", "name": "sun"}
    )
    assert "arguments must be the text of a JSON object" in refused(
        server, 400, input=[{"type": "function_call", "call_id": "c", "name": "f", "arguments": "["}, result]
    )
    assert "end with what is to be answered" in refused(server, 400, input=[{"role": "assistant", "content": "a"}])
    with running(tokenizer_of("chatml")) as plain:
        assert "does not write tools" in refused(plain, 400, tools=[RAIN])
        assert "does not write tools" in refused(plain, 400, input=[result])
        assert (
            status(plain, "POST", "/v1/responses", json={"input": "x", "tools": [RAIN], "tool_choice": "none"}) == 200
        )


def test_a_forced_call_is_kept_as_it_was_drawn(server, prompts):
    pytest.importorskip("llguidance")
    form = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    tool = {"type": "function", "name": "f", "parameters": form}
    one = say(server, "call", tools=[tool], tool_choice="required", max_output_tokens=60)
    (call,) = one["output"]
    assert json.loads(call["arguments"])["a"] in (1, 2)
    follow(server, one, [{"type": "function_call_output", "call_id": call["call_id"], "output": "7"}], tools=[tool])
    assert prompts[1][: len(ids_of(server, one))] == ids_of(server, one)


def test_calls_in_a_kept_conversation(tmp_path):
    """The same over /v1/chat/completions with `session`, whole and streamed."""
    tools = TOOLS
    with running(sessions=SessionStore(tmp_path / "s")) as server:
        for stream in (False, True):
            id = server.post("/v1/sessions", {})["id"]
            text = f"rain {stream}?"
            asked = [{"role": "user", "content": text}]
            first = Chat(server.tokenizer).prompt_ids(asked, tools=tools)
            ids = scripted(server, first, CALL)
            body = {"session": id, "messages": asked, "tools": tools, "max_tokens": 150}
            if stream:
                events = streamed(server, "/v1/chat/completions", body)
                (call,) = next(d["tool_calls"] for e in events[:-1] if "tool_calls" in (d := e["choices"][0]["delta"]))
            else:
                (call,) = server.post("/v1/chat/completions", body)["choices"][0]["message"]["tool_calls"]
            store = server.service.store
            assert [i for t in store.path(store.get(id).head) for i in t.ids] == [*first, *ids]
            result = {"role": "tool", "tool_call_id": call["id"], "content": "wet"}
            for wrong in ({**result, "tool_call_id": "c9"}, {"role": "assistant", "content": "a"}):
                found = httpx.post(
                    server.url + "/v1/chat/completions", json={**body, "messages": [wrong]}, trust_env=False
                )
                assert found.status_code == 400, found.text
            server.post("/v1/chat/completions", {**body, "messages": [result], "max_tokens": 9})
            path = store.path(store.get(id).head)
            assert [t.role for t in path] == ["context", "user", "assistant", "tool", "assistant"]
            assert path[2].data["message"]["tool_calls"][0]["function"]["arguments"] == {"place": "Köln"}
            again = {"session": id, "parent": path[3].id, "messages": asked}
            found = httpx.post(server.url + "/v1/chat/completions", json=again, trust_env=False)
            assert found.status_code == 400 and "is no answer" in found.json()["error"]["message"]


# ---- a process that is killed


def test_a_response_outlives_the_server(fork, tuned, tmp_path):
    """kill -9 after the answer: the next process goes on from its id, on the same ids, as the first one did."""

    def serve():
        file = f"sessions.path={tmp_path / 's.sqlite'}"
        process = fork("phase=serve", f"init_from={tuned}", f"runs={tmp_path}", "server.port=0", file)
        end = time.monotonic() + 120
        while not (found := re.search(r"answers at (http://\S+)/v1", process.out)):
            assert process.poll() is None and time.monotonic() < end, process.out + process.err
            time.sleep(0.02)
        return process, found[1]

    def ask(url, text, **more):
        body = {"input": text, "max_output_tokens": 8, "temperature": 0, **more}
        found = httpx.post(url + "/v1/responses", json=body, timeout=60, trust_env=False)
        assert found.status_code == 200, found.text
        return found.json()

    process, url = serve()
    one = ask(url, "Spell: heron")
    two = ask(url, "Spell: stork", previous_response_id=one["id"])
    process.send_signal(signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL
    process, url = serve()
    try:
        assert httpx.get(f"{url}/v1/responses/{two['id']}", trust_env=False).json() == two
        again = ask(url, "Spell: stork", previous_response_id=one["id"])
        assert again["output"][0]["content"] == two["output"][0]["content"]
        assert again["usage"]["input_tokens"] == two["usage"]["input_tokens"] > one["usage"]["total_tokens"]
        three = ask(url, "And?", previous_response_id=two["id"])
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(60)
    store = SessionStore(tmp_path / "s.sqlite")
    path = store.path(three["id"])
    assert [t.text for t in path if t.role == "user"] == ["Spell: heron", "Spell: stork", "And?"]
    assert sum(len(t.ids) for t in path[:-1]) == three["usage"]["input_tokens"]
