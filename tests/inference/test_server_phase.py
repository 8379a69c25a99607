"""phase=serve as a process: one line that says where it is, signals, and what it refuses to start with."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
from tests.inference.serving import sse

from trivium.errors import ConfigError
from trivium.inference.loop import aside
from trivium.schema import ServerConfig


@pytest.fixture
def serve(fork, tuned, tmp_path):
    """serve("server.x=y") -> a process that answers, and its address."""
    started = []

    def serve(*settings):
        process = fork("phase=serve", f"init_from={tuned}", f"runs={tmp_path}", "server.port=0", *settings)
        started.append(process)
        end = time.monotonic() + 120
        while not (found := re.search(r"answers at (http://\S+)/v1", process.out)):
            assert process.poll() is None and time.monotonic() < end, process.out + process.err
            time.sleep(0.02)
        return process, found[1]

    yield serve
    for process in started:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)


HELPERS = """
import os, time, torch
from trivium.inference.loop import aside

def threads():
    return len(os.listdir("/proc/self/task"))

def compute():
    return torch.ones(1 << 22).sum().item()

torch.set_num_threads(2)
before = threads()
assert aside(compute) == 1 << 22
end = time.monotonic() + 10
while threads() > before and time.monotonic() < end:
    time.sleep(0.01)
beside = threads() - before
compute()
print(beside, threads() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="THREADS ARE NOT COUNTED HERE: no /proc")
def test_what_computes_beside_the_engine_leaves_no_helpers_behind():
    """OpenMP's, of which one too many makes each of the engine's operations wait. Computed here they stay: one."""
    said = subprocess.run(
        [sys.executable, "-c", HELPERS], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "2"}
    )
    assert said.stdout == "0 1\n", said.stderr


INTERRUPTED = """
import sys, threading, torch
from trivium.inference.loop import aside

told = threading.Thread(target=sys.stdin.read, daemon=True)
told.start()

def compute():
    x = torch.ones(400, 400)
    print("begun", flush=True)
    while told.is_alive():  # until the test has sent its signal, however long that takes
        x = (x @ x).tanh()

aside(compute)
"""


def test_an_interrupt_while_loading_waits_for_what_is_computed():
    """Python that ends in the middle of it is aborted, with a core dump."""
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None, "it waits for what is computed"
    said = process.communicate(timeout=60)[1]
    assert process.returncode == -signal.SIGINT and said.rstrip().endswith("KeyboardInterrupt"), said


def test_what_fails_aside_fails_here():
    with pytest.raises(ZeroDivisionError):
        aside(lambda: 1 // 0)


LONG = {"messages": [{"role": "user", "content": "hello"}], "stream": True, "max_tokens": 30, "min_tokens": 30}


def streams(url, count, body):
    """Threads that each read a stream to its end; their texts."""
    texts = [""] * count
    began = threading.Semaphore(0)

    def read(i):
        with httpx.stream("POST", url + "/v1/chat/completions", json=body, timeout=120, trust_env=False) as response:
            assert response.status_code == 200
            for n, piece in enumerate(response.iter_text()):
                texts[i] += piece
                if n == 0:
                    began.release()

    threads = [threading.Thread(target=read, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for _ in threads:
        assert began.acquire(timeout=60)
    return threads, texts


def test_it_says_how_to_ask_and_ends_with_143(serve):
    process, url = serve()
    line = " ".join(process.out.split())
    assert f"ask: curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{{\"messages\"" in line
    body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}
    assert httpx.post(url + "/v1/chat/completions", json=body, timeout=60).json()["usage"]["completion_tokens"] <= 3
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143 and process.err == ""


def test_sigterm_lets_eight_streams_end(serve):
    """Each is whole, with its counts and [DONE]; the port takes nothing new meanwhile; exit code 143."""
    process, url = serve()
    threads, texts = streams(url, 8, {**LONG, "stream_options": {"include_usage": True}})
    process.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join(60)
    for text in texts:
        *events, usage, done = sse(text)
        assert done == "[DONE]" and usage["usage"]["completion_tokens"] == 30
        assert events[-1]["choices"][0]["finish_reason"] == "length"
    assert process.wait(60) == 143, process.err
    with pytest.raises(httpx.ConnectError):
        httpx.get(url + "/health")


def test_sigterm_ends_streams_at_the_deadline(serve):
    """A drain of a hundredth of a second: each stream ends with an error event and [DONE], not amid a line."""
    process, url = serve("server.drain_seconds=0.01")
    threads, texts = streams(url, 8, {**LONG, "max_tokens": 200, "min_tokens": 200})
    process.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join(60)
    ends = [sse(text)[-2:] for text in texts]
    assert all(done == "[DONE]" for _, done in ends)
    assert any("error" in last for last, _ in ends), "the signal must hit streams that are not done"
    said = [last.get("error", {}).get("message") for last, _ in ends]
    assert all(m == "the server is shutting down" or last["choices"] for m, (last, _) in zip(said, ends, strict=True))
    assert process.wait(60) == 143, process.err


def test_a_second_signal_ends_it_at_once(serve):
    process, url = serve()
    threads, _ = streams(url, 1, LONG | {"max_tokens": 1} | {"min_tokens": 1})
    for thread in threads:
        thread.join()
    with socket.create_connection(
        ("127.0.0.1", int(url.rpartition(":")[2]))
    ) as held:  # a body that does not come keeps it up
        held.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/json\r\nContent-Length: 9\r\n\r\n{"
        )
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 1
    assert "stopped at once by a second signal" in process.err and "answers were cut off" in process.err


def test_the_key_is_in_no_file(serve, tmp_path):
    process, url = serve("server.key=open-sesame")
    assert httpx.get(url + "/v1/models").status_code == 401
    assert httpx.get(url + "/v1/models", headers={"Authorization": "Bearer open-sesame"}).status_code == 200
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 143
    written = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert written and not [p for p in written if b"open-sesame" in p.read_bytes()]
    assert "open-sesame" not in process.out


def test_what_it_does_not_start_with(main, tuned, tmp_path):
    where = ("phase=serve", f"init_from={tuned}", f"runs={tmp_path}")
    public = main(*where, "server.host=0.0.0.0")
    assert public.code == 2 and "server.host=0.0.0.0 can be reached by others: set server.key=" in public.err
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        used = main(*where, f"server.port={port}")
    assert used.code == 2 and f"server.port={port} cannot be listened at" in used.err
    assert main("phase=serve", f"runs={tmp_path}").code == 2
    assert main(*where, "server.prot=1").code == 2


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("127.0.0.1", True),
        ("localhost", True),
        ("::1", True),
        ("127.8.8.8", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.0.2", False),
        ("example.org", False),
    ],
)
def test_public_addresses_need_a_key(host, local):
    if local:
        assert ServerConfig(host=host).is_local
    else:
        with pytest.raises(ConfigError, match="can be reached by others"):
            ServerConfig(host=host)
        assert not ServerConfig(host=host, key="k").is_local


@pytest.mark.parametrize("key", ["a b\n", "ключ", " a", "\x00"])
def test_keys_that_no_header_carries_are_refused(key):
    with pytest.raises(ConfigError, match="printable ASCII"):
        ServerConfig(key=key)
