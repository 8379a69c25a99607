"""llama.cpp's own server over a GGUF file, on a port of this machine that nobody else is told. No torch here.

Run as a module it is a process of its own: an order of one line comes in, where it listens goes out, and it ends with
whoever started it. Where llama.cpp does not like a file it may end the process.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

SECONDS = 1800
FORCED = 1e6


class Client:
    """Talks to a server."""

    def __init__(self, address: str) -> None:
        self.address = address

    def get(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data)
        request.add_header("Content-Type", "application/json")
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(request, timeout=SECONDS) as answer:
            return json.load(answer)

    def tokenise(self, text: str, rendered: bool = False) -> list[int]:
        body = {"content": text, "add_special": True, "parse_special": rendered}
        return self.get("/tokenize", body)["tokens"]

    def complete(self, prompt: Sequence[int], count: int, **more: Any) -> dict[str, Any]:
        """An answer of up to `count` tokens, greedy unless `more` says otherwise."""
        body = {"prompt": list(prompt), "n_predict": count, "temperature": 0, "return_tokens": True, **more}
        return self.get("/completion", body)

    def logprobs(self, prompt: Sequence[int], count: int, end: int) -> list[tuple[int, float]]:
        """Of the `count` most probable tokens after a prompt. end: an end, which is forced: of a token that is half a
        character the server tells none. What is forced changes no log-probability that it tells."""
        said = self.complete(prompt, 1, n_probs=count, logit_bias=[[end, FORCED]])
        return [(token["id"], token["logprob"]) for token in said["completion_probabilities"][0]["top_logprobs"]]


class Server(Client):
    """A file, for prompt and answer of `length` tokens together. It computes in fp32 where the file does: keys and
    values are kept in fp32 (fp16 is its default), and attention is not fused. threads: 0 is all there are."""

    def __init__(self, file: str, length: int, threads: int = 0, gpu_layers: int = 0) -> None:
        xllamacpp: Any = importlib.import_module("xllamacpp")  # its types are not told
        settings = xllamacpp.CommonParams()
        settings.model.path = file
        settings.n_ctx, settings.n_parallel, settings.n_gpu_layers = length, 1, gpu_layers
        settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        settings.warmup = settings.fit_params = False
        threads = threads or len(os.sched_getaffinity(0))
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
        self.version = f"xllamacpp {xllamacpp.__version__}"
        self._server = xllamacpp.Server(settings)
        super().__init__(self._server.listening_address)


def environment() -> dict[str, str]:
    """For a process that is to import what this one can."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}


def last_words(stderr: str) -> str:
    """What a process that llama.cpp ended said of it."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    said = [line for line in lines if "error" in line.lower() or "assert" in line.lower()] or lines[-1:]
    return said[0][:300] if said else "it said nothing"


def main() -> None:
    """Serve until nobody is there."""
    server = Server(**json.loads(sys.stdin.readline()))
    sys.stdout.write("\n" + json.dumps({"address": server.address, "version": server.version}) + "\n")
    sys.stdout.flush()
    sys.stdin.read()
    os._exit(0)  # nothing is left to be put in order


if __name__ == "__main__":
    main()
