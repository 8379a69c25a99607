"""llama.cpp as the export gate's reader of a GGUF file: its own server, in a process of its own.

Where llama.cpp does not like a file it may end the process; and the server renders chats and stops as it will for those
who use the file. It computes in fp32 where the file does: keys and values are kept in fp32 (fp16 is its default), and
attention is not fused.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trivium.errors import CheckpointError, ConfigError

INSTALL = "pip install trivium-llm[gguf], or pip install xllamacpp"
SECONDS = 1800
FORCED = 1e6
PROBABLE = 20
"""How many tokens' log-probabilities are told of each step of the answer; of its first all are."""


@dataclass(frozen=True)
class Asked:
    """texts: to be tokenised as documents. message: what a user says, for the chat template; empty for none. prompt:
    ids that an answer of up to `answer` tokens is to follow. ends: ids that should end an answer. size: of the
    vocabulary."""

    texts: Sequence[str]
    message: str
    prompt: Sequence[int]
    answer: int
    ends: Sequence[int]
    size: int


@dataclass(frozen=True)
class Told:
    """ids: of each text, with its beginning. chat: ids of the rendered message. template: as it found it. answer:
    greedy, its end included where it ended. ended: whether an end ended it. first: the log-probability of every token
    (by id) to be the answer's first. steps: of the most probable ones of each step, by id. ends: those that did end an
    answer. version: of its package."""

    ids: list[list[int]]
    chat: list[int]
    template: str
    answer: list[int]
    ended: bool
    first: dict[int, float]
    steps: list[dict[int, float]]
    ends: list[int]
    version: str


def installed() -> None:
    """Raise ConfigError with what to install unless llama.cpp is there."""
    try:
        __import__("xllamacpp")
    except ImportError as error:
        raise ConfigError(
            f"format=gguf is checked with llama.cpp before it is called good, which is not installed: {INSTALL}"
        ) from error


def ask(file: Path, asked: Asked) -> Told:
    """What llama.cpp makes of a file. Raises CheckpointError with its own last words where it cannot read it."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "trivium.phases.llamacpp"], input=json.dumps({"file": str(file), **asdict(asked)}),
            capture_output=True, text=True, errors="replace", timeout=SECONDS, env=environment,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise CheckpointError(f"{file}: llama.cpp has not answered within {SECONDS} seconds") from error
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        said = [line for line in lines if "error" in line.lower() or "assert" in line.lower()] or lines[-1:]
        raise CheckpointError(f"{file}: llama.cpp cannot read it: {said[0][:300] if said else done.returncode}")
    told = json.loads(done.stdout.splitlines()[-1])
    numbered = [{int(id): logprob for id, logprob in step} for step in (told.pop("first"), *told.pop("steps"))]
    return Told(first=numbered[0], steps=numbered[1:], **told)


class _Server:
    """A GGUF file in llama.cpp's server, on a port of this machine that nobody else is told."""

    def __init__(self, file: str, length: int) -> None:
        xllamacpp: Any = importlib.import_module("xllamacpp")  # its types are not told
        settings = xllamacpp.CommonParams()
        settings.model.path = file
        settings.n_ctx, settings.n_parallel, settings.n_gpu_layers = length, 1, 0
        settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        settings.warmup = settings.fit_params = False
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = len(os.sched_getaffinity(0))
        self.version = f"xllamacpp {xllamacpp.__version__}"
        self._server = xllamacpp.Server(settings)

    def get(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._server.listening_address + path, data)
        request.add_header("Content-Type", "application/json")
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(request, timeout=SECONDS) as answer:
            return json.load(answer)

    def tokenise(self, text: str, rendered: bool = False) -> list[int]:
        body = {"content": text, "add_special": True, "parse_special": rendered}
        return self.get("/tokenize", body)["tokens"]

    def complete(self, prompt: Sequence[int], count: int, **more: Any) -> dict[str, Any]:
        """A greedy answer of up to `count` tokens."""
        body = {"prompt": list(prompt), "n_predict": count, "temperature": 0, "return_tokens": True, **more}
        return self.get("/completion", body)

    def logprobs(self, prompt: Sequence[int], count: int, end: int) -> list[tuple[int, float]]:
        """Of the `count` most probable tokens after a prompt. end: an end, which is forced: of a token that is half a
        character the server tells none. What is forced changes no log-probability that it tells."""
        said = self.complete(prompt, 1, n_probs=count, logit_bias=[[end, FORCED]])
        return [(token["id"], token["logprob"]) for token in said["completion_probabilities"][0]["top_logprobs"]]


def answers(order: Mapping[str, Any]) -> dict[str, Any]:
    """What `Told` holds."""
    prompt, count, ends = order["prompt"], order["answer"], order["ends"]
    server = _Server(order["file"], len(prompt) + count + 1)
    facts = server.get("/props")
    spoken = server.complete(prompt, count)
    answer = spoken["tokens"]
    chat: list[int] = []
    if order["message"]:
        asked = {"messages": [{"role": "user", "content": order["message"]}]}
        chat = server.tokenise(server.get("/apply-template", asked)["prompt"], rendered=True)
    forced = {end: server.complete(prompt, 2, logit_bias=[[end, FORCED]]) for end in ends}
    return {
        "ids": [server.tokenise(text) for text in order["texts"]],
        "chat": chat,
        "template": facts["chat_template"],
        "answer": answer,
        "ended": spoken["stop_type"] == "eos",
        "first": server.logprobs(prompt, order["size"], ends[0]),
        "steps": [server.logprobs(prompt + answer[:i], PROBABLE, ends[0]) for i in range(len(answer))],
        "ends": [end for end, said in forced.items() if said["stop_type"] == "eos"],
        "version": server.version,
    }


def main() -> None:
    """Read the order, obey, and tell."""
    told = answers(json.load(sys.stdin))
    sys.stdout.write("\n" + json.dumps(told) + "\n")
    sys.stdout.flush()
    os._exit(0)  # nothing is left to be put in order


if __name__ == "__main__":
    main()
