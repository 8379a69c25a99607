"""Whatever is sent, in whatever amount and at whatever pace: 4xx, never 5xx, and good clients do not notice."""

import asyncio
import json
import random
import socket
import statistics
import threading
import time

import httpx
import pytest
from tests.inference.serving import raw, running, sse

from trivium.errors import BackendError
from trivium.inference import openai as wire
from trivium.inference import server as server_module

HI = {"messages": [{"role": "user", "content": "hello there"}], "max_tokens": 12, "temperature": 0}
GOOD = [
    ("/v1/chat/completions", HI),
    ("/v1/completions", {"prompt": "the cat", "max_tokens": 12, "temperature": 0}),
    ("/v1/completions", {"prompt": ["a dog", "the mat"], "max_tokens": 12, "temperature": 1, "seed": 5, "n": 2}),
    ("/v1/embeddings", {"input": ["the cat sat"]}),
]
ODD = [
    None,
    True,
    -1,
    0,
    1,
    3,
    0.5,
    1e308,
    -1e-320,
    2**63,
    2**200,
    "",
    "a",
    "\x00",
    "é😀",
    "None",
    [],
    [[]],
    [1],
    ["a"],
    [None],
    [-1],
    [10**9],
    {},
    {"a": 1},
    {"type": "text"},
    {"type": None},
    [{}],
    [{"role": "user"}],
    "x" * 5000,
    [["a"]],
    [[0], ["a"]],
    {"1": 101},
    {"999999": 1},
    {"type": "json_schema"},
    ["a", "a", "a", "a", "a"],
]
FIELDS = {
    "/v1/chat/completions": (
        HI,
        [
            "messages",
            "model",
            "temperature",
            "top_p",
            "n",
            "stop",
            "max_tokens",
            "logit_bias",
            "seed",
            "stream",
            "stream_options",
            "tools",
            "tool_choice",
            "response_format",
            "logprobs",
            "top_logprobs",
            "frequency_penalty",
            "top_k",
            "min_p",
            "repetition_penalty",
            "min_tokens",
            "stop_token_ids",
            "user",
            "foo",
            "metadata",
            "parallel_tool_calls",
            "max_completion_tokens",
            "modalities",
            "service_tier",
        ],
    ),
    "/v1/completions": (GOOD[1][1], ["prompt", "best_of", "echo", "suffix", "logprobs", "stop", "n"]),
    "/v1/responses": (
        {"input": "hi", "max_output_tokens": 2},
        [
            "input",
            "instructions",
            "previous_response_id",
            "store",
            "text",
            "tools",
            "truncation",
            "include",
            "max_output_tokens",
            "stream",
            "reasoning",
        ],
    ),
    "/v1/embeddings": ({"input": "a"}, ["input", "encoding_format", "dimensions"]),
    "/v1/rerank": ({"query": "a", "documents": ["b"]}, ["query", "documents", "top_n", "return_documents"]),
    "/v1/feedback": ({"id": "a"}, ["id", "kind"]),
}
MESSAGES = (
    [{"role": "user", "content": v} for v in ODD]
    + [{"role": v, "content": "a"} for v in ODD]
    + [{"role": "assistant", "content": None, "tool_calls": v} for v in ODD]
    + [
        {
            "role": "assistant",
            "tool_calls": [{"id": "a", "type": "function", "function": {"name": "f", "arguments": v}}],
        }
        for v in (*ODD, "{", "[1]", '{"a":' * 300, "NaN")
    ]
    + [{"role": "tool", "content": "a", "tool_call_id": v} for v in ODD]
)
BODIES = [b"", b"{", b"[]", b"null", b"1", b'"a"', b"\xff\xfe", b"\x00", b"[" * 100_000, b'{"a":' * 5000,
          b'{"messages":[{"role":"user","content":"\\ud800"}]}', b'{"messages":NaN}', b'{"seed":' + b"9" * 5000 + b"}",
          json.dumps({**HI, "messages": [{"role": "user", "content": "a " * 500_000}]}).encode(),
          json.dumps({**HI, "messages": [{"role": "user", "content": "a"}] * 3000}).encode(),
          json.dumps({"prompt": [10] * 100_000}).encode(), b" " * 2_100_000]  # fmt: skip

POST = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def bad_requests():
    """(path, body) of requests that are wrong, odd, or oddly right."""
    for path, (body, fields) in FIELDS.items():
        for field in fields:
            yield from ((path, json.dumps({**body, field: value}).encode()) for value in ODD)
            yield path, json.dumps({k: v for k, v in body.items() if k != field}).encode()
        yield from ((path, body) for body in BODIES)
    yield from (("/v1/chat/completions", json.dumps({**HI, "messages": [m]}).encode()) for m in MESSAGES)


def mutations(count):
    """Good requests with bytes changed, taken out, doubled, or pieces of others put in."""
    draw = random.Random(0)
    seeds = [(path, json.dumps(body).encode()) for path, body in GOOD]
    words = [b"null", b"-1", b"1e999", b'"', b"[[", b"}}", b"\\ud83d", b"\xf0\x9f", b"true", b"0", b"\x00", b"9" * 40]
    for _ in range(count):
        path, body = draw.choice(seeds)
        data = bytearray(body)
        for _ in range(draw.randint(1, 4)):
            at = draw.randrange(len(data) + 1)
            end = min(len(data), at + draw.randint(0, 6))
            data[at:end] = draw.choice([b"", data[at:end] * 2, draw.choice(words), bytes([draw.randrange(256)])])
        yield path, bytes(data)


def choices_of(body):
    """What of an answer is the same each time."""
    return json.dumps(body.get("choices") or body["data"])


async def attack(server, requests, width=8):
    """Send `requests`, eight at a time, while four clients ask again and again: statuses, and the clients' answers."""
    statuses, answers, done = [], [[] for _ in GOOD], asyncio.Event()
    left = iter(requests)
    limits = httpx.Limits(max_connections=width + len(GOOD))
    async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits, trust_env=False) as client:

        async def bad():
            for path, body in left:
                found = await client.post(path, content=body, headers={"Content-Type": "application/json"})
                statuses.append((found.status_code, path, body))
                if found.status_code >= 400:
                    error = found.json()["error"]
                    assert (
                        isinstance(error["message"], str)
                        and error["message"]
                        and set(error) == {"message", "type", "param", "code"}
                    )

        async def good(number):
            path, body = GOOD[number]
            while not done.is_set():
                found = await client.post(path, json=body)
                answers[number].append(choices_of(found.json()) if found.status_code == 200 else found.text)

        goods = [asyncio.create_task(good(i)) for i in range(len(GOOD))]
        await asyncio.gather(*(bad() for _ in range(width)))
        done.set()
        await asyncio.gather(*goods)
    return statuses, answers


def check_attack(server, requests):
    quiet = [choices_of(server.post(path, body)) for path, body in GOOD]
    statuses, answers = asyncio.run(attack(server, requests))
    assert [s for s in statuses if s[0] >= 500] == []
    assert [s for s in statuses if s[0] not in (200, 400, 404, 413, 415, 422)] == []
    for number, mine in enumerate(answers):
        assert len(mine) > 3 and set(mine) == {quiet[number]}, GOOD[number]
    assert server.idle().used_slots == 0
    return statuses


@pytest.fixture(scope="module")
def server():
    with running(max_tokens=64) as one:
        yield one


def test_bad_requests_are_4xx_and_good_clients_do_not_notice(server):
    """Every field with every odd value, and bodies that are no JSON; what happens to be right is answered."""
    requests = list(bad_requests())
    assert len(requests) >= 1500
    statuses = check_attack(server, requests)
    refused = sum(s[0] >= 400 for s in statuses)
    print(f"bad requests: {len(statuses)} tried, {refused} refused, {len(statuses) - refused} answered, 0 5xx")
    assert refused > 1000


def test_mutations(server):
    statuses = check_attack(server, mutations(500))
    assert len(statuses) == 500


@pytest.mark.slow
def test_many_mutations(server):
    statuses = check_attack(server, mutations(5000))
    print(f"mutations: {len(statuses)} tried, {sum(s[0] >= 400 for s in statuses)} refused, 0 5xx")


# ---- what is no HTTP, or hardly


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
        (b"GET / HTTP/9.9\r\nConnection: close\r\n\r\n", 421),
        (b"GET  /  HTTP/1.1\r\n\r\n", 400),
        (b"\r\n\r\n\r\nhello\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nA: " + b"b" * 40_000 + b"\r\n\r\n", 431),
        (b"GET /" + b"a" * 40_000 + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", 431),
        (b"GET /%ff%00%2e%2e/etc HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", 404),
        (b"GET /v1/models/%ff HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", 404),
        (b"GET /v1/responses/%00 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", 404),
        (b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n", 400),
        (b"BREW /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", 405),
        (POST + b"Content-Length: -1\r\n\r\n", 400),
        (b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
         b"Content-Length: 99999999999999999999\r\nConnection: close\r\n\r\n", 413),
        (b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
         b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n", 400),
        (b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: text/\xff\r\nContent-Length: 0\r\n"
         b"Connection: close\r\n\r\n", 415),
        (b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\n"
         b"Connection: Upgrade, close\r\n\r\n", 200),
    ],
)  # fmt: skip
def test_odd_bytes_get_an_answer_in_json(server, data, status):
    head, _, body = raw(server.port, data).partition(b"\r\n\r\n")
    assert int(head.split()[1]) == status, head
    found = json.loads(body)
    assert status == 200 or found["error"]["message"]


def test_a_chunked_body_over_the_limit_is_cut(server):
    head = POST + b"Transfer-Encoding: chunked\r\n\r\n"
    chunk = b"10000\r\n" + b" " * 65536 + b"\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as s:
        s.sendall(head)
        found, sent = b"", 0
        try:
            for sent in range(200):  # noqa: B007
                s.sendall(chunk)
        except OSError:
            pass
        try:
            found = s.recv(65536)
        except OSError:
            pass
    assert sent < 200 or b" 413 " in found.split(b"\r\n")[0]
    assert httpx.get(server.url + "/health").status_code == 200


def test_slow_heads_and_bodies_are_cut():
    """Heads a byte at a time, bodies that never come, silence: gone, with 408 where it can be said."""
    with running(header_seconds=1, body_seconds=1) as server:

        def drip(data):
            with socket.create_connection(("127.0.0.1", server.port), timeout=20) as s:
                try:
                    for i in range(len(data)):
                        s.sendall(data[i : i + 1])
                        time.sleep(0.05)
                except OSError:
                    pass
                try:
                    return s.recv(65536)
                except OSError:
                    return b""

        started = time.monotonic()
        assert raw(server.port, b"") == b"", "silence is closed"
        assert raw(server.port, b"GET / HT").startswith(b"HTTP/1.1 408")
        body = POST + b"Content-Length: 100\r\n\r\n{"
        assert raw(server.port, body).startswith(b"HTTP/1.1 408")
        drip(b"GET /" + b"a" * 400)
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as s:  # the second of a connection, too
            s.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            time.sleep(1.5)  # silence between two is no slow head
            assert s.recv(65536).startswith(b"HTTP/1.1 200")
            s.sendall(b"GET / HT")
            assert s.recv(65536).startswith(b"HTTP/1.1 408")
        assert time.monotonic() - started < 60
        wait_for(lambda: not connections(server))


def connections(server):
    """Open connections to the server, from the kernel."""
    port = f":{server.port:04X}"
    lines = [line.split() for line in open("/proc/net/tcp").read().splitlines()[1:]]
    return [f for f in lines if f[1].endswith(port) and f[3] in ("01", "08")]


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not come true"
        time.sleep(0.01)


# ---- leaving


def no_end(server):
    return {str(i): -100 for i in server.tokenizer.stop_ids}


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_row_within_a_step(stream):
    """A hundredth of a second a step, 400 steps wanted. The engine takes it out before the step after the next."""
    with running() as server:
        server.backend.seconds_per_step = 0.02
        dropped = []
        drop = server.backend.drop
        server.backend.drop = lambda name: (dropped.append(server.backend._stats.generated_tokens), drop(name))[1]
        body = {"prompt": [10] * 40, "max_tokens": 400, "stream": stream, "logit_bias": no_end(server)}
        with httpx.Client() as client:
            try:
                with client.stream("POST", server.url + "/v1/completions", json=body, timeout=0.5) as response:
                    for i, _ in enumerate(response.iter_raw()):
                        if i == 5:
                            break
            except httpx.ReadTimeout:
                assert not stream
        left = server.backend._stats.generated_tokens
        wait_for(lambda: dropped)
        stats = server.idle()
        assert stats.used_slots == 0 and stats.generated_tokens < 200
        assert dropped[0] - left <= 25, "the engine acts at its next step"


def test_two_hundred_leave_in_every_way_and_nothing_is_left():
    """Streams and not, at once or after a while, reset or closed: 0 slots used, all pages free or cached, none live."""
    count = 200
    with running() as server:
        server.backend.seconds_per_step = 0.002
        draw = random.Random(0)

        def leave(number):
            body = json.dumps({"prompt": [10 + number % 90] * draw.randint(1, 60), "max_tokens": 300,
                               "stream": bool(number % 2), "logit_bias": no_end(server)}).encode()  # fmt: skip
            head = POST + f"Content-Length: {len(body)}\r\n\r\n".encode()
            with socket.create_connection(("127.0.0.1", server.port), timeout=20) as s:
                if number % 3 == 0:
                    s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
                s.sendall(head + (body if number % 5 else body[: len(body) // 2]))
                time.sleep(draw.random() * 0.3)

        threads = [threading.Thread(target=leave, args=(i,)) for i in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        stats = server.idle(60)
        assert (stats.used_slots, stats.running, stats.waiting, server.service.engine.live) == (0, 0, 0, 0)
        assert not server.service.engine._known
        assert server.post("/v1/completions", {"prompt": "a", "max_tokens": 2})["choices"]


# ---- too much at once


def test_a_flood_is_answered_or_told_to_come_later():
    """500 at once where 16 have room: each gets 200 or 429 with Retry-After. Prints how long the refusals took."""
    with running(max_requests=16) as server:
        server.backend.seconds_per_step = 0.01

        async def flood():
            took = []
            limits = httpx.Limits(max_connections=600)
            async with httpx.AsyncClient(timeout=120, limits=limits, trust_env=False) as client:

                async def one():
                    started = time.perf_counter()
                    found = await client.post(server.url + "/v1/completions", json={"prompt": "a", "max_tokens": 20})
                    took.append((found.status_code, time.perf_counter() - started))
                    assert found.status_code == 200 or found.headers["retry-after"] == "1"

                await asyncio.gather(*(one() for _ in range(500)))
                long = {"prompt": "a", "max_tokens": 400, "logit_bias": no_end(server)}
                full = [client.post(server.url + "/v1/completions", json=long) for _ in range(16)]
                filling = [asyncio.create_task(f) for f in full]
                while server.service.engine.live < 16:
                    assert not any(task.done() for task in filling)
                    await asyncio.sleep(0.01)
                alone = []
                for _ in range(50):
                    started = time.perf_counter()
                    found = await client.post(server.url + "/v1/completions", json={"prompt": "a"})
                    alone.append(time.perf_counter() - started)
                    assert found.status_code == 429
                for task in filling:
                    task.cancel()
                await asyncio.gather(*filling, return_exceptions=True)
            return took, alone

        took, alone = asyncio.run(flood())
        assert {status for status, _ in took} == {200, 429} and len(took) == 500
        assert sum(status == 200 for status, _ in took) >= 16
        print(f"flood: 500 tried, {sum(s == 200 for s, _ in took)} answered, the rest 429; alone while full, 429 in "
              f"{statistics.median(alone) * 1000:.1f} ms (worst {max(alone) * 1000:.1f})")  # fmt: skip
        assert server.idle(60).used_slots == 0


def test_nothing_waits_for_an_acknowledgement(monkeypatch):
    """A refusal was told in 44 ms where it took 0.2: head and body go out apart, and the body waited (Nagle)."""
    made, own = [], server_module.Connection.connection_made
    monkeypatch.setattr(
        server_module.Connection,
        "connection_made",
        lambda self, transport: (made.append(transport), own(self, transport)),
    )
    with running() as server, httpx.Client(trust_env=False) as client:
        client.get(server.url + "/health")
        sockets = [transport.get_extra_info("socket") for transport in made]
        assert sockets and all(s.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) for s in sockets)


def test_too_many_connections_are_turned_away():
    with running(max_connections=20) as server:
        held = [socket.create_connection(("127.0.0.1", server.port), timeout=20) for _ in range(20)]
        wait_for(lambda: len(connections(server)) >= 20)
        assert raw(server.port, b"").startswith(b"HTTP/1.1 429")
        for s in held:
            s.close()
        wait_for(lambda: httpx.get(server.url + "/health").status_code == 200)


def slow_readers(count, slow_heads):
    """`count` that ask for a long stream and do not read, `slow_heads` that never finish asking, one that is fine."""
    with running(write_seconds=2, header_seconds=3, max_unread=64, max_requests=count + 50) as server:
        held = []
        body = json.dumps(
            {"prompt": "a", "max_tokens": 400, "stream": True, "logprobs": 20, "logit_bias": no_end(server)}
        ).encode()
        head = POST + f"Content-Length: {len(body)}\r\n\r\n".encode()
        for i in range(count + slow_heads):
            s = socket.socket()
            s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            s.connect(("127.0.0.1", server.port))
            s.sendall(head + body if i < count else b"GET / HTTP/1.1\r\nHost: lo")
            held.append(s)
        fine = [
            server.post("/v1/completions", {"prompt": "the cat", "max_tokens": 9, "temperature": 0}, timeout=300)[
                "choices"
            ]
            for _ in range(3)
        ]
        assert fine[0] == fine[1] == fine[2]
        stats = server.idle(300)
        assert stats.used_slots == 0
        wait_for(lambda: not connections(server), 60)
        for s in held:
            s.close()


def test_slow_readers_and_heads(monkeypatch):
    monkeypatch.setattr(server_module, "KEEP_ALIVE", 3)  # some answers lie whole in the kernel: those are idle
    slow_readers(10, 30)


@pytest.mark.slow
def test_a_hundred_slow_readers_and_three_hundred_slow_heads(monkeypatch):
    monkeypatch.setattr(server_module, "KEEP_ALIVE", 3)
    slow_readers(100, 300)


def test_unread_answers_are_given_up():
    """A reader that stops: the buffer is bounded in tokens, and its row is freed while others go on."""
    with running(max_unread=8, write_seconds=60) as server:
        body = {"prompt": "a", "max_tokens": 400, "logit_bias": no_end(server), "stream": True}

        async def stalled():
            service = server.service
            answer = await service.begin_completion(wire.parsed(wire.CompletionRequest, json.dumps(body).encode()))
            async for _ in answer.chunks():
                await asyncio.sleep(0.2)

        future = asyncio.run_coroutine_threadsafe(stalled(), server.service.engine._events)
        with pytest.raises(BackendError, match="more than 8 tokens were made and not read"):
            future.result(60)
        assert server.idle().generated_tokens < 400


def test_streams_of_many_are_whole():
    """32 streams at once, each the very events of its own answer."""
    with running() as server:

        async def all_of():
            async with httpx.AsyncClient(
                timeout=120, limits=httpx.Limits(max_connections=64), trust_env=False
            ) as client:

                async def one(i):
                    body = {"prompt": [10 + i], "max_tokens": 20, "temperature": 0}
                    whole = (await client.post(server.url + "/v1/completions", json=body)).json()["choices"][0]["text"]
                    events = sse(
                        (await client.post(server.url + "/v1/completions", json={**body, "stream": True})).text
                    )
                    assert "".join(e["choices"][0]["text"] for e in events[:-1]) == whole

                await asyncio.gather(*(one(i) for i in range(32)))

        asyncio.run(all_of())
