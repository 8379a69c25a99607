"""llama.cpp over a GGUF file: its server in a process of its own, asked for one token at a time.

Its ids, order of sampling steps and log-probabilities are checked to be ours. One request is answered after another,
each alone, so that neighbours change nothing; what was read of a prompt stays, so a token costs a token. Random numbers
are a function of (seed, request, position), and other ones than the native engine's.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
import urllib.error
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any

from trivium.data.position import key_of
from trivium.data.tokenizer import Tokenizer
from trivium.errors import BackendError
from trivium.inference.config import LlamaCppConfig
from trivium.inference.llamacpp_server import FORCED, Client, environment, last_words
from trivium.inference.protocol import BASIC, Backend, Capabilities, Stats
from trivium.inference.sampling import bias_of
from trivium.models.protocol import CausalLM
from trivium.types import Request, TokenEvent

INSTALL = "inference=llamacpp needs xllamacpp, which is not installed: pip install trivium-llm[gguf]"
CHAIN = ["penalties", "temperature", "top_k", "top_p", "min_p"]
"""Its default cuts first and divides by the temperature last."""
SEEDS = 2**32 - 1  # the last one asks for a random one


class LlamaCppBackend(Backend):
    """`config.path` is what is read; of the model only its sizes are used, and it must be the same one."""

    def __init__(self, config: LlamaCppConfig, model: CausalLM, tokenizer: Tokenizer) -> None:
        self.config, self.model, self.tokenizer = config, model, tokenizer
        self._waiting: deque[tuple[Request, list[int]]] = deque()
        self._stats = Stats()
        self._context = config.context or model.context
        if self._context > model.context:
            raise BackendError(
                f"inference.context={config.context} is more than the model's context of {model.context}"
            )
        if not config.path:
            raise BackendError("inference=llamacpp reads a GGUF file; name it in inference.path=")
        self._process, self._client = _started(config, self._context)
        weakref.finalize(self, _ended, self._process)

    def capabilities(self) -> Capabilities:
        return Capabilities(
            context=self._context,
            vocab_size=self.model.vocab_size,
            sampling=BASIC | {"min_p", "repetition_penalty", "logit_bias", "min_tokens", "top_logprobs"},
        )

    def stats(self) -> Stats:
        return replace(self._stats, running=min(1, len(self._waiting)), waiting=max(0, len(self._waiting) - 1))

    def health(self) -> bool:
        return self._process.poll() is None

    @property
    def busy(self) -> bool:
        return bool(self._waiting)

    def add(self, request: Request) -> None:
        self.check(request)
        if any(other.id == request.id for other, _ in self._waiting):
            raise BackendError(f"two requests have the id {request.id!r}")
        self._waiting.append((request, list(request.prompt_ids)))
        self._count(requests=1, prompt_tokens=len(request.prompt_ids))

    def drop(self, request_id: str) -> None:
        self._waiting = deque(one for one in self._waiting if one[0].id != request_id)

    def update_weights(self, version: int) -> None:
        raise BackendError("inference=llamacpp reads its weights from a file, which does not change; use native")

    def _count(self, **more: float) -> None:
        self._stats = replace(self._stats, **{name: getattr(self._stats, name) + n for name, n in more.items()})

    def step(self) -> list[TokenEvent]:
        if not self._waiting:
            return []
        started, (request, ids) = time.perf_counter(), self._waiting[0]
        try:
            event = self._next(request, ids)
        except BackendError as error:
            event = TokenEvent(request.id, -1, 0.0, "error", error=str(error))
        if event.finish_reason is not None:
            self._waiting.popleft()
        self._count(seconds=time.perf_counter() - started, generated_tokens=event.token_id >= 0)
        return [event]

    def _next(self, request: Request, ids: list[int]) -> TokenEvent:
        p, made = request.params, len(ids) - len(request.prompt_ids)
        bias: list[list[Any]] = [[token, False if value == -inf else value] for token, value in bias_of(p).items()]
        bias += [[token, False] for token in p.stop_ids if made < p.min_tokens]
        said = self._ask(
            ids,
            samplers=CHAIN,
            temperature=p.temperature,
            top_k=p.top_k,
            top_p=p.top_p,
            min_p=p.min_p,
            repeat_penalty=p.repetition_penalty,
            repeat_last_n=self._context,
            logit_bias=bias,
            seed=key_of(p.seed, request.stream or request.id, len(ids)) % SEEDS,
            n_probs=max(1, p.top_logprobs),
        )
        (token,) = said["tokens"]
        logprob, top = self._told(ids, said, token, p.top_logprobs)
        ids.append(token)
        reason = "stop" if token in p.stop_ids else "length" if made + 1 >= p.max_tokens else None
        return TokenEvent(request.id, token, logprob, reason, top=top)

    def _told(self, ids: Sequence[int], said: Any, token: int, count: int) -> tuple[float, tuple]:
        """A token's log-probability, and those of the likeliest; asked for anew where it is a part of a character."""
        found = said.get("completion_probabilities") or []
        if found and found[0]["id"] == token:
            top = [(one["id"], one["logprob"]) for one in found[0]["top_logprobs"]]
            return found[0]["logprob"], tuple(top[:count])
        try:
            every = self._client.logprobs(ids, self.model.vocab_size, self.tokenizer.eos_id)
        except (OSError, ValueError, LookupError) as error:
            raise self._failed(error) from error
        return dict(every)[token], tuple(every[:count])

    def _ask(self, ids: Sequence[int], **more: Any) -> Any:
        try:
            return self._client.complete(ids, 1, cache_prompt=True, **more)
        except (OSError, ValueError) as error:
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> BackendError:
        if not self.health():
            return BackendError(f"llama.cpp has ended ({self._process.returncode}); start anew")
        told = error.read().decode(errors="replace")[:200] if isinstance(error, urllib.error.HTTPError) else error
        return BackendError(f"llama.cpp could not answer: {told}")

    def score(self, token_ids: Sequence[int]) -> list[float]:
        if len(token_ids) > self._context:
            raise BackendError(f"{len(token_ids)} tokens do not fit the context of {self._context}")
        scores = []
        for place in range(1, len(token_ids)):
            before, token = token_ids[:place], token_ids[place]
            said = self._ask(before, n_probs=1, logit_bias=[[token, FORCED]])
            scores.append(self._told(before, said, token, 0)[0])
        return scores


def _started(config: LlamaCppConfig, context: int) -> tuple[subprocess.Popen, Client]:
    """The process and how to talk to it; it ends with the backend. Raises BackendError with its last words."""
    try:
        __import__("xllamacpp")
    except ImportError as error:
        raise BackendError(INSTALL) from error
    order = {"file": str(Path(config.path).resolve()), "length": context}
    order |= {"threads": config.threads, "gpu_layers": config.gpu_layers}
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "trivium.inference.llamacpp_server"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True, env=environment(),
        )  # fmt: skip
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(order) + "\n")
        process.stdin.flush()
        told = next((line for line in process.stdout if line.startswith('{"address"')), "")
        if not told:
            process.wait()
            said.seek(0)
            raise BackendError(f"{config.path}: llama.cpp cannot read it: {last_words(said.read())}")
    return process, Client(json.loads(told)["address"])


def _ended(process: subprocess.Popen) -> None:
    """Tell it that nobody is there, which it waits for."""
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
