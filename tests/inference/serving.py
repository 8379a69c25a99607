"""A real server for tests: uvicorn on loopback in a thread, a small random model, a real tokenizer."""

import asyncio
import dataclasses
import json
import socket
import threading
import time
from contextlib import contextmanager

import httpx
import torch

from trivium.data.config import BPEConfig
from trivium.data.tokenizer import train_bpe
from trivium.inference.config import NativeConfig, SamplingConfig
from trivium.inference.loop import EngineLoop
from trivium.inference.native.engine import NativeBackend
from trivium.inference.server import listen, serve
from trivium.inference.service import Served, Service
from trivium.models.config import LlamaConfig
from trivium.models.llama import Llama
from trivium.schema import ServerConfig

TEXTS = ["hello there, the cat sat on the mat and said 112 to the dog"] * 3
CONTEXT = 512


def tokenizer_of(template="chatml_tools"):
    """Byte-level, few merges: an emoji is four tokens."""
    made = train_bpe(BPEConfig(vocab_size=320), TEXTS)
    return made.extended((), template) if template else made


def model_of(tokenizer, seed=0, context=CONTEXT):
    """init_std 0.3: far from uniform, so that rounding chooses no token."""
    config = LlamaConfig(dim=32, layers=1, heads=2, kv_heads=1, ffn_dim=48, context=context, tied=False, init_std=0.3)
    model = Llama(config, tokenizer.vocab_size)
    model.init_weights(seed=seed)
    return model.eval()


class Scripted(NativeBackend):
    """The real engine, which draws what a test wants: `script` maps a prompt's ids to the ids of its answer."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.script, self.seconds_per_step = {}, 0.0

    def step(self):
        if self.seconds_per_step:
            time.sleep(self.seconds_per_step)
        return super().step()

    def _commit(self, row, found):
        answer = self.script.get(tuple(row.request.prompt_ids))
        if answer is not None and row.made < len(answer):
            if answer[row.made] == "boom":
                raise RuntimeError("planted")
            found = [found[0]._replace(token=answer[row.made])]
        return super()._commit(row, found)


@dataclasses.dataclass
class Running:
    """url, port: where it is. stop: ask it to end; `thread` ends when it has."""

    url: str
    port: int
    service: Service
    backend: Scripted
    stop: threading.Event
    thread: threading.Thread

    @property
    def tokenizer(self):
        return self.service.tokenizer

    def post(self, path, body=None, timeout=60, **more):
        """The JSON that comes back."""
        found = httpx.post(self.url + path, json=body, timeout=timeout, trust_env=False, **more)
        assert found.status_code == 200, (found.status_code, found.text)
        return found.json()

    def idle(self, seconds=20):
        """Wait until nothing is answered; the engine's counts then."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            stats = self.service.engine.stats
            if not (self.service.engine.live or stats.running or stats.waiting or stats.used_slots):
                return stats
            time.sleep(0.01)
        raise AssertionError(f"not idle: {self.service.engine.live} {self.service.engine.stats}")


@contextmanager
def running(
    tokenizer=None,
    *,
    model=None,
    sampling=None,
    native=None,
    feedback=None,
    system="",
    sessions=None,
    full="error",
    engine=None,
    form="chat",
    **settings,
):
    """A server while the block runs. engine: a backend in place of the native one."""
    torch.set_num_threads(1)
    tokenizer = tokenizer or tokenizer_of()
    limits = ServerConfig(port=0, **settings)
    backend = engine or Scripted(native or NativeConfig(), model or model_of(tokenizer), tokenizer)
    engine = EngineLoop(backend, most=limits.max_requests, most_unread=limits.max_unread)
    served = Served("tiny", "ab" * 32, tokenizer, sampling or SamplingConfig(max_tokens=16), system, 1, form)
    service = Service(engine, served, limits, feedback=feedback, sessions=sessions, full=full)
    sock = listen(limits)
    port = sock.getsockname()[1]
    stop, ready = threading.Event(), threading.Event()
    thread = threading.Thread(target=serve, args=(service, limits, sock, stop.is_set, ready.set), daemon=True)
    thread.start()
    assert ready.wait(60)
    yield Running(f"http://127.0.0.1:{port}", port, service, backend, stop, thread)
    stop.set()
    thread.join(60)
    assert not thread.is_alive()


def sse(text):
    """Events of a stream: JSON values, "[DONE]" as it is. Each must end with a blank line."""
    assert text.endswith("\n\n"), text[-100:]
    events = []
    for block in text[:-2].split("\n\n"):
        (data,) = [line for line in block.split("\n") if line.startswith("data: ")]
        events.append(data[6:] if data == "data: [DONE]" else json.loads(data[6:]))
    return events


def streamed(server, path, body):
    """A stream's events."""
    found = httpx.post(server.url + path, json={**body, "stream": True}, timeout=60, trust_env=False)
    assert found.status_code == 200, found.text
    assert found.headers["content-type"].startswith("text/event-stream")
    return sse(found.text)


def raw(port, data, seconds=20):
    """Bytes out, bytes in until the other side closes or is silent for so long."""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as s:
        s.sendall(data)
        found = b""
        try:
            while piece := s.recv(65536):
                found += piece
        except TimeoutError:
            pass
        return found


def together(*jobs):
    """Results of coroutines that run at once."""

    async def all_of():
        return await asyncio.gather(*jobs)

    return asyncio.run(all_of())
