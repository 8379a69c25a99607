"""The server's answers, over real HTTP: shapes, stops, characters, counts, and what is refused."""

import base64
import json
import struct
import time

import httpx
import pytest
import torch
from tests.inference.serving import CONTEXT, running, streamed, tokenizer_of

from trivium.data.chat import Chat
from trivium.inference.feedback import FeedbackStore
from trivium.inference.loop import Reply
from trivium.inference.native.engine import NativeBackend, collect
from trivium.inference.sampling import NOTHING_ALLOWED
from trivium.types import Request, SamplingParams, TokenEvent

HI = {"messages": [{"role": "user", "content": "hello there"}]}
PROMPT = [10, 11, 12]


@pytest.fixture(scope="module")
def server():
    with running() as one:
        yield one


@pytest.fixture
def scripted(server):
    """scripted("text") -> the next answers to PROMPT are these tokens, one byte of a character each, and the end."""

    def script(text, *, end=True):
        tokenizer = server.tokenizer
        ids = [i for character in text for i in byte_ids(tokenizer, character)]
        server.backend.script[tuple(PROMPT)] = [*ids, *([tokenizer.eot_id] if end else [])]
        return ids

    yield script
    server.backend.script.clear()
    server.idle()


def byte_ids(tokenizer, character):
    """The ids of a character's bytes, one by one."""
    by_byte = {
        tokenizer.bytes_of(i)[0]: i for i in range(tokenizer.vocab_size) if len(tokenizer.bytes_of(i) or ()) == 1
    }
    return [by_byte[b] for b in character.encode()]


def both(server, body):
    """text, finish_reason, usage of a completion, which must be the same when it is streamed."""
    whole = server.post("/v1/completions", body)
    (choice,) = whole["choices"]
    *events, done = streamed(server, "/v1/completions", {**body, "stream_options": {"include_usage": True}})
    assert done == "[DONE]" and events[-1]["choices"] == []
    pieces = [e["choices"][0] for e in events[:-1]]
    assert "".join(p["text"] for p in pieces) == choice["text"]
    assert [p["finish_reason"] for p in pieces] == [None] * (len(pieces) - 1) + [choice["finish_reason"]]
    usages = [{k: v for k, v in u.items() if not k.endswith("details")} for u in (whole["usage"], events[-1]["usage"])]
    assert usages[0] == usages[1]
    return choice["text"], choice["finish_reason"], whole["usage"], [p["text"] for p in pieces]


# ---- text, stops and counts


@pytest.mark.parametrize(
    ("text", "stop", "shown", "drawn"),
    [
        ("1112345", "112", "1", 4),  # of 1, 1, 1, 2
        ("1112345", ["9", "112"], "1", 4),
        ("ab😀cd", "😀", "ab", 6),  # met with the last of its four bytes
        ("ab😀cd", "c", "ab😀", 7),
        ("漢字です", "字", "漢", 6),
        ("aab", "ab", "a", 3),
        ("hello", "lo", "hel", 5),
        ("hello", "low", "hello", 6),  # held back and never met: the end of the turn is the sixth token
        ("abc", ["abcd", "b"], "a", 2),  # the one that is complete first
        ("😀", None, "😀", 5),
    ],
)
def test_stop_strings_and_counts(server, scripted, text, stop, shown, drawn):
    """Text up to the stop, the same streamed; every token that was drawn counts once, the last one included."""
    scripted(text)
    body = {"prompt": PROMPT, "max_tokens": 40, "stop": stop}
    told, reason, usage, pieces = both(server, body)
    assert (told, reason) == (shown, "stop")
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (3, drawn)
    assert usage["total_tokens"] == 3 + drawn
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_stop_ends_the_request_in_the_engine(server, scripted):
    """200 tokens were wanted; the fourth met the stop, so far fewer were made."""
    scripted("1112" + "x" * 190, end=False)
    before = server.idle().generated_tokens
    server.backend.seconds_per_step = 0.005
    server.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 200, "stop": "112"})
    server.backend.seconds_per_step = 0.0
    assert 4 <= server.idle().generated_tokens - before < 60


def test_a_character_cut_short_is_shown_broken_at_the_end(server, scripted):
    scripted("a😀", end=False)
    assert both(server, {"prompt": PROMPT, "max_tokens": 3})[:2] == ("a\ufffd", "length")


def test_cached_tokens_are_counted(server):
    """Pages of 16: of the same 40 ids the second time 32 are not computed again, and the engine says so, too."""
    ids = [20 + i % 7 for i in range(40)]
    before = server.idle().cached_tokens
    found = [server.post("/v1/completions", {"prompt": ids, "max_tokens": 1})["usage"] for _ in range(2)]
    assert [u["prompt_tokens_details"]["cached_tokens"] for u in found] == [0, 32]
    assert server.idle().cached_tokens - before == 32


def test_greedy_is_what_the_engine_says(server):
    """Token for token, with its log-probabilities: prompt ids as the chat renders them, temperature 0 as zero."""
    ids = Chat(server.tokenizer).prompt_ids(HI["messages"])
    params = SamplingParams(max_tokens=12, stop_ids=server.tokenizer.stop_ids, top_logprobs=2)
    (events,) = collect(
        NativeBackend(server.backend.config, server.backend.model), [Request("a", tuple(ids), params)]
    ).values()
    found = server.post(
        "/v1/chat/completions", {**HI, "temperature": 0, "max_tokens": 12, "logprobs": True, "top_logprobs": 2}
    )
    (choice,) = found["choices"]
    told = choice["logprobs"]["content"]
    assert found["usage"]["prompt_tokens"] == len(ids)
    assert [t["bytes"] for t in told] == [
        server.tokenizer.bytes_of(e.token_id) for e in events if e.token_id not in params.stop_ids
    ]
    assert [t["logprob"] for t in told] == pytest.approx([e.logprob for e in events[: len(told)]], abs=1e-5)
    assert [len(t["top_logprobs"]) for t in told] == [2] * len(told)
    assert choice["message"]["content"] == server.tokenizer.decode([e.token_id for e in events])


def test_logprobs_are_of_the_tokens_that_are_shown(server, scripted):
    """Streamed or not: a token comes with its text; what a stop cut off has none."""
    scripted("ab😀112z")
    whole = server.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 40, "stop": "112", "logprobs": 1})
    (choice,) = whole["choices"]
    assert choice["text"] == "ab😀"
    assert choice["logprobs"]["tokens"] == ["a", "b", "\ufffd", "\ufffd", "\ufffd", "\ufffd"]
    assert choice["logprobs"]["text_offset"] == [0, 1, 2, 2, 2, 2]
    events = streamed(server, "/v1/completions", {"prompt": PROMPT, "max_tokens": 40, "stop": "112", "logprobs": 1})
    pieces = [e["choices"][0] for e in events[:-1]]
    assert sum((p["logprobs"]["tokens"] for p in pieces), []) == choice["logprobs"]["tokens"]


def test_seed_gives_the_same_answer_again_and_none_another(server):
    body = {**HI, "temperature": 1, "max_tokens": 24, "n": 2}
    texts = [
        [c["message"]["content"] for c in server.post("/v1/chat/completions", {**body, "seed": s})["choices"]]
        for s in (7, 7, 8)
    ]
    assert texts[0] == texts[1] != texts[2] and texts[0][0] != texts[0][1]
    free = [server.post("/v1/chat/completions", body)["choices"][0]["message"]["content"] for _ in range(3)]
    assert len(set(free)) == 3


def test_null_is_unset_and_zero_is_zero(server):
    """Every optional field as null is the same as none; temperature 0 draws the same every time."""
    names = (
        "temperature",
        "top_p",
        "n",
        "seed",
        "stop",
        "max_tokens",
        "tools",
        "response_format",
        "logit_bias",
        "user",
    )
    found = [
        server.post("/v1/chat/completions", {**HI, **dict.fromkeys(names), "temperature": 0})["choices"] for _ in "ab"
    ]
    assert found[0] == found[1]
    found = [
        server.post("/v1/chat/completions", {**HI, "temperature": t, "max_tokens": 9})["choices"] for t in (0, 1e-45)
    ]
    assert found[0] == found[1], "as cold as can be said is greedy, and no fault"


def test_prompts_in_every_form(server):
    """Text, texts, ids, lists of ids; choices in order, prompts echoed."""
    ids = (
        [server.tokenizer.bos_id, *server.tokenizer.encode("the cat")]
        if server.tokenizer.start
        else server.tokenizer.encode("the cat")
    )
    body = {"temperature": 0, "max_tokens": 4, "echo": True}
    forms = ["the cat", ["the cat"], ids, [ids]]
    texts = [[c["text"] for c in server.post("/v1/completions", {**body, "prompt": p})["choices"]] for p in forms]
    assert texts[0] == texts[1] == texts[2] == texts[3] and texts[0][0].startswith("the cat")
    several = server.post("/v1/completions", {**body, "prompt": ["the cat", "a dog"], "n": 2})
    assert [c["index"] for c in several["choices"]] == [0, 1, 2, 3]
    assert [c["text"][:5] for c in several["choices"]] == ["the c", "the c", "a dog", "a dog"]
    assert several["usage"]["prompt_tokens"] == len(ids) + len(server.tokenizer.start) + len(
        server.tokenizer.encode("a dog")
    )


# ---- tools


def test_a_call_is_read_and_the_rest_is_text(server):
    """Hermes' form, as the template writes it; streamed, the call is one delta."""
    tokenizer = server.tokenizer
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    body = {"messages": [{"role": "user", "content": "rain?"}], "tools": tools, "max_tokens": 150}
    prompt = Chat(tokenizer).prompt_ids(body["messages"], tools=tools)
    said = 'let me\n<tool_call>\n{"name": "weather", "arguments": {"place": "Köln"}}\n</tool_call>'
    server.backend.script[tuple(prompt)] = [*tokenizer.encode(said), tokenizer.eot_id]
    (choice,) = server.post("/v1/chat/completions", body)["choices"]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] == "let me\n"
    (call,) = choice["message"]["tool_calls"]
    assert (
        call["function"] == {"name": "weather", "arguments": '{"place": "K\\u00f6ln"}'} and call["type"] == "function"
    )
    deltas = [e["choices"][0] for e in streamed(server, "/v1/chat/completions", body)[:-1]]
    assert "".join(d["delta"].get("content", "") for d in deltas) == "let me\n"
    ((streamed_call,),) = [d["delta"]["tool_calls"] for d in deltas if "tool_calls" in d["delta"]]
    assert streamed_call["index"] == 0 and streamed_call["function"] == call["function"]
    assert deltas[-1]["finish_reason"] == "tool_calls"
    back = [
        *body["messages"],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": call["id"], "content": "rain"},
    ]
    assert server.post("/v1/chat/completions", {**body, "messages": back, "max_tokens": 2})["usage"][
        "prompt_tokens"
    ] > len(prompt)


def test_what_is_no_call_stays_text(server):
    tokenizer = server.tokenizer
    tools = [{"type": "function", "function": {"name": "weather"}}]
    body = {"messages": [{"role": "user", "content": "sun?"}], "tools": tools, "max_tokens": 150}
    prompt = Chat(tokenizer).prompt_ids(body["messages"], tools=tools)
    for said in (
        "<tool_call>{}</tool_call>!",
        "a <tool_call> b",
        "<tool_c",
        '<tool_call>{"name": "other"}</tool_call>',
    ):
        server.backend.script[tuple(prompt)] = [*tokenizer.encode(said), tokenizer.eot_id]
        (choice,) = server.post("/v1/chat/completions", body)["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == (said, "stop")
        assert "tool_calls" not in choice["message"]


def test_tools_are_refused_where_the_template_does_not_write_them():
    """Never passed over: a template without tools, and a call that the engine cannot be held to."""
    tools = [{"type": "function", "function": {"name": "weather"}}]
    with running(tokenizer_of("")) as server:
        found = httpx.post(server.url + "/v1/chat/completions", json={**HI, "tools": tools})
        assert found.status_code == 400 and "does not write tools" in found.json()["error"]["message"]
        assert (
            httpx.post(
                server.url + "/v1/chat/completions", json={**HI, "tools": tools, "tool_choice": "none"}
            ).status_code
            == 200
        )


@pytest.mark.parametrize(
    "more",
    [
        {"response_format": {"type": "json_object"}},
        {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "required"},
    ],
)
def test_what_the_engine_cannot_hold_answers_to_is_refused(server, more):
    if "json_schema" in server.backend.capabilities().sampling:
        pytest.skip("this engine can")
    found = httpx.post(server.url + "/v1/chat/completions", json={**HI, **more})
    assert found.status_code == 400 and "engine cannot" in found.json()["error"]["message"]


# ---- responses, embeddings, rerank


def test_a_response_goes_on_from_an_earlier_one_on_its_very_ids(server):
    """The second prompt begins with the first and all that was drawn, closed; nothing is tokenised again."""
    asked = []
    add, server.backend.add = server.backend.add, lambda request: (asked.append(request), add(request))[1]
    try:
        one = server.post(
            "/v1/responses", {"input": "hello", "max_output_tokens": 6, "temperature": 1, "instructions": "be kind"}
        )
        two = server.post(
            "/v1/responses",
            {"input": "and?", "max_output_tokens": 6, "instructions": "be kind", "previous_response_id": one["id"]},
        )
    finally:
        server.backend.add = add
    store = server.service.store
    kept = [i for turn in store.path(one["id"]) for i in turn.ids]
    first, second = (list(r.prompt_ids) for r in asked)
    assert kept[: len(first)] == first and kept[-1] == server.tokenizer.eot_id
    assert second[: len(kept)] == kept
    assert [turn.role for turn in store.path(two["id"])] == ["user", "assistant"] * 2
    assert two["usage"]["input_tokens"] == len(second)
    assert httpx.get(f"{server.url}/v1/responses/{two['id']}").json() == two
    assert httpx.delete(f"{server.url}/v1/responses/{one['id']}").json()["deleted"] is True
    gone = httpx.post(server.url + "/v1/responses", json={"input": "x", "previous_response_id": one["id"]})
    assert gone.status_code == 404 and gone.json()["error"]["code"] == "not_found"


def test_embeddings_are_the_engines_in_both_encodings(server):
    texts = ["the cat", "a dog"]
    ids = [[*server.tokenizer.start, *server.tokenizer.encode(t)] for t in texts]
    wanted = server.backend.embed(ids)
    plain = server.post("/v1/embeddings", {"input": texts})
    packed = server.post("/v1/embeddings", {"input": ids, "encoding_format": "base64"})
    for i in range(2):
        assert plain["data"][i]["embedding"] == pytest.approx(wanted[i].tolist(), abs=1e-6)
        assert list(struct.unpack("<32f", base64.b64decode(packed["data"][i]["embedding"]))) == pytest.approx(
            wanted[i].tolist()
        )
    assert plain["usage"] == {"prompt_tokens": sum(map(len, ids)), "total_tokens": sum(map(len, ids))}


def test_rerank_orders_by_cosine(server):
    texts = ["the cat", "the dog sat", "hello"]
    ids = [[*server.tokenizer.start, *server.tokenizer.encode(t)] for t in ["the cat", *texts]]
    query, *others = server.backend.embed(ids)
    scores = [float(o @ query) for o in others]
    found = server.post("/v1/rerank", {"query": "the cat", "documents": texts, "top_n": 2, "return_documents": True})
    order = sorted(range(3), key=lambda i: -scores[i])[:2]
    assert [r["index"] for r in found["results"]] == order and order[0] == 0
    assert [r["relevance_score"] for r in found["results"]] == pytest.approx([scores[i] for i in order], abs=1e-6)
    assert found["results"][0]["document"] == {"text": "the cat"} and found["results"][0][
        "relevance_score"
    ] == pytest.approx(1)


# ---- what is around it


def test_health_ready_models_metrics(server):
    get = lambda path: httpx.get(server.url + path)  # noqa: E731
    assert (get("/health").json(), get("/ready").status_code) == ({"status": "ok"}, 200)
    assert [m["id"] for m in get("/v1/models").json()["data"]] == [get("/v1/models/tiny").json()["id"]] == ["tiny"]
    assert get("/v1/models/other").json()["error"]["code"] == "model_not_found"
    server.post("/v1/completions", {"prompt": "a", "max_tokens": 3})
    lines = dict(line.rsplit(" ", 1) for line in get("/metrics").text.splitlines() if not line.startswith("#"))
    assert float(lines["trivium_generated_tokens_total"]) == server.idle().generated_tokens
    assert float(lines['trivium_http_requests_total{code="200",path="/v1/completions"}']) >= 1
    assert float(lines["trivium_time_to_first_token_seconds_count"]) >= 1
    assert float(lines["trivium_used_slots"]) == 0


def test_key_is_asked_for_on_every_path_but_health():
    with running(key="sesame") as server:
        for path in ("/", "/ready", "/metrics", "/v1/models", "/nowhere", "/openapi.json"):
            assert httpx.get(server.url + path).status_code == 401, path
            assert httpx.get(server.url + path, headers={"Authorization": "Bearer sesam"}).status_code == 401
        assert httpx.post(server.url + "/v1/chat/completions", json=HI).json()["error"]["code"] == "invalid_api_key"
        assert httpx.get(server.url + "/health").status_code == 200
        for auth in ("Bearer sesame", "bearer  sesame", "Basic " + base64.b64encode(b"me:sesame").decode()):
            assert httpx.get(server.url + "/v1/models", headers={"Authorization": auth}).status_code == 200, auth
        assert httpx.get(server.url + "/", headers={}).headers["www-authenticate"].startswith("Basic")


def test_a_page_of_another_name_may_not_ask(server):
    """DNS rebinding: without a key, only names of this machine."""
    port = server.port
    for host, status in (
        (f"127.0.0.1:{port}", 200),
        (f"localhost:{port}", 200),
        ("[::1]", 200),
        ("evil.example", 421),
        (f"evil.example:{port}", 421),
    ):
        assert httpx.get(server.url + "/v1/models", headers={"Host": host}).status_code == status, host
    text = httpx.post(server.url + "/v1/chat/completions", content="{}", headers={"Content-Type": "text/plain"})
    assert text.status_code == 415


def test_feedback_is_404_while_off_and_kept_when_on(server, tmp_path):
    assert httpx.post(server.url + "/v1/feedback", json={"id": "x"}).status_code == 404

    store = FeedbackStore(tmp_path / "feedback.sqlite")
    with running(feedback=store) as other:
        body = {**HI, "max_tokens": 5, "user": "ann", "temperature": 1}
        found = other.post("/v1/chat/completions", body)
        end = time.monotonic() + 20
        while not list(store.records()) and time.monotonic() < end:
            time.sleep(0.01)
        told = other.post("/v1/feedback", {"id": found["id"], "kind": "thumb", "value": "up", "user": "ann"})
        assert told["id"] == found["id"]
        counts = httpx.get(other.url + "/v1/feedback/stats").json()
        assert (counts["records"], counts["standing"]) == (1, {"thumb": 1})
        odd = httpx.post(other.url + "/v1/feedback", json={"id": found["id"], "kind": "thump", "value": 1})
        assert odd.status_code == 422 and "thump" in odd.json()["error"]["message"]
    (record,) = store.records()
    assert (record.id, record.user, record.messages) == (found["id"], "ann", HI["messages"])
    assert record.prompt_ids == Chat(other.tokenizer).prompt_ids(HI["messages"])
    assert len(record.completion_ids) == len(record.sampled) == len(record.logprobs)
    assert (
        record.completion_ids[-1] == other.tokenizer.eot_id
        and sum(record.sampled) == found["usage"]["completion_tokens"]
    )
    assert record.answer == found["choices"][0]["message"]["content"]
    store.close()


def test_system_message_of_the_run_is_used_where_there_is_none():
    with running(system="be kind") as server:

        def count(messages):
            return server.post("/v1/chat/completions", {"messages": messages, "max_tokens": 1})["usage"][
                "prompt_tokens"
            ]

        own = [{"role": "system", "content": "be kind"}, *HI["messages"]]
        assert count(HI["messages"]) == count(own) > 25
        assert count([{"role": "developer", "content": "x"}, *HI["messages"]]) < count(own)


def test_default_max_tokens_fits_what_is_left(server):
    """16 by default; 3 where the context has no more."""
    assert (
        server.post("/v1/completions", {"prompt": [10] * 5, "logit_bias": no_end(server)})["usage"]["completion_tokens"]
        == 16
    )
    left = server.post("/v1/completions", {"prompt": [10] * (CONTEXT - 3), "logit_bias": no_end(server)})
    assert left["usage"]["completion_tokens"] == 3
    full = httpx.post(server.url + "/v1/completions", json={"prompt": [10] * CONTEXT})
    assert full.status_code == 400 and full.json()["error"]["code"] == "context_length_exceeded"


def no_end(server):
    return {str(i): -100 for i in server.tokenizer.stop_ids}


def test_engine_failure_is_its_requests_alone(server, scripted):
    """A planted exception: that request is answered with 500, or an event in its stream; its neighbour, whole."""
    server.backend.script[tuple(PROMPT)] = [20, 21, "boom"]
    neighbour = {"prompt": [30, 31], "max_tokens": 30, "temperature": 0}
    quiet = server.post("/v1/completions", neighbour)["choices"]
    with httpx.Client() as client:
        found = client.post(server.url + "/v1/completions", json={"prompt": PROMPT, "max_tokens": 9})
        assert found.status_code == 500 and found.json()["error"]["type"] == "server_error"
        *events, error, done = streamed(server, "/v1/completions", {"prompt": PROMPT, "max_tokens": 9})
        assert done == "[DONE]" and error["error"]["type"] == "server_error" and "choices" in events[0]
    assert server.post("/v1/completions", neighbour)["choices"] == quiet
    assert httpx.get(server.url + "/health").status_code == 200
    assert server.idle().used_slots == 0


def test_conditions_that_leave_no_token_are_the_askers_mistake(server):
    """min_tokens with every token a stop: 400, not 500."""
    wanted = {"prompt": PROMPT, "max_tokens": 5, "min_tokens": 5, "logit_bias": {}, "stop_token_ids": [*range(64)]}
    assert server.post("/v1/completions", wanted)["usage"]["completion_tokens"] == 5
    put = Reply._put
    try:
        Reply._put = lambda self, event, most: put(
            self, TokenEvent(event.request_id, -1, 0.0, "error", error=NOTHING_ALLOWED), most
        )
        found = httpx.post(server.url + "/v1/completions", json=wanted)
    finally:
        Reply._put = put
    assert found.status_code == 400 and found.json()["error"]["message"] == NOTHING_ALLOWED


def test_dead_engine_fails_health():
    """Dropping fails, too: the thread ends, who waits is told, and the port no longer looks alive."""
    with running() as server:

        def broken(*_):
            raise torch.OutOfMemoryError("planted")

        server.backend.step, server.backend.drop = broken, broken
        found = httpx.post(server.url + "/v1/completions", json={"prompt": PROMPT})
        assert found.status_code == 500 and "planted" in found.json()["error"]["message"]
        assert httpx.get(server.url + "/health").status_code == 503
        assert httpx.get(server.url + "/ready").status_code == 503
        assert httpx.post(server.url + "/v1/completions", json={"prompt": PROMPT}).status_code in (429, 500, 503)


def test_a_step_that_raises_is_survived():
    """The backend could not say whose fault it was: all that were served are told, the next is answered."""
    with running() as server:
        step, calls = server.backend.step, []

        def once():
            calls.append(1)
            if len(calls) == 3:
                raise RuntimeError("planted")
            return step()

        server.backend.step = once
        found = httpx.post(
            server.url + "/v1/completions", json={"prompt": PROMPT, "max_tokens": 9, "logit_bias": no_end(server)}
        )
        assert found.status_code == 500 and "planted" in found.json()["error"]["message"]
        assert server.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 2})["usage"]["prompt_tokens"] == 3
        assert server.idle().used_slots == 0 and server.service.engine.failures == 1


def test_stale_heartbeat_fails_health():
    """A step that does not come back."""
    with running(stale_seconds=1) as server:
        server.backend.seconds_per_step = 3.0
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(server.url + "/v1/completions", json={"prompt": PROMPT, "max_tokens": 2}, timeout=2)
        assert httpx.get(server.url + "/health").status_code == 503
        server.backend.seconds_per_step = 0.0
        end = time.monotonic() + 30
        while httpx.get(server.url + "/health").status_code != 200:
            assert time.monotonic() < end, "it comes back to life with its next step"
            time.sleep(0.05)


def test_answers_are_held_to_a_schema_and_bad_schemas_are_refused(server):
    """Where the engine can: JSON of the form that was asked, whole or cut short; a forced call; nonsense is 400."""
    if "json_schema" not in server.backend.capabilities().sampling:
        pytest.skip("this engine cannot")
    form = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    body = {**HI, "max_tokens": 60, "seed": 1, "temperature": 1}
    asked = {"type": "json_schema", "json_schema": {"name": "a", "schema": form}}
    (choice,) = server.post("/v1/chat/completions", {**body, "response_format": asked})["choices"]
    assert choice["finish_reason"] == "stop" and json.loads(choice["message"]["content"]) in ({"a": 1}, {"a": 2})
    tools = [{"type": "function", "function": {"name": "f", "parameters": form}}]
    (choice,) = server.post("/v1/chat/completions", {**body, "tools": tools, "tool_choice": "required"})["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "f" and json.loads(call["function"]["arguments"]) in ({"a": 1}, {"a": 2})
    for bad in ({"type": "nonsense"}, {"$ref": "#/nowhere"}, {"type": "string", "pattern": "("}, {"not": {}}):
        asked = {"type": "json_schema", "json_schema": {"name": "a", "schema": bad}}
        found = httpx.post(server.url + "/v1/chat/completions", json={**body, "response_format": asked}, timeout=60)
        assert found.status_code == 400 and found.json()["error"]["message"], (bad, found.text)
    assert server.idle().used_slots == 0
