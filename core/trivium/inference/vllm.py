"""vLLM over a Hugging Face folder: many requests at once on GPUs.

Written against vLLM's documented Python API (https://docs.vllm.ai: LLMEngine, EngineArgs, SamplingParams,
RequestOutput). No machine that this project is tested on can run it: take it as a beginning that was never run, and
run its test (`pytest -m gpu tests/inference/test_backends.py`) where vLLM is installed before you rely on it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from trivium.data.position import key_of
from trivium.data.tokenizer import Tokenizer
from trivium.errors import BackendError
from trivium.inference.config import VLLMConfig
from trivium.inference.protocol import BASIC, Backend, Capabilities, Stats
from trivium.inference.sampling import bias_of
from trivium.models.protocol import CausalLM
from trivium.types import Request, SamplingParams, TokenEvent

INSTALL = "inference=vllm needs vllm, which is not installed: pip install vllm (CUDA GPUs)"
MOST_LOGPROBS = 20
"""vLLM's own limit unless its engine is told otherwise."""


class VLLMBackend(Backend):
    """`config.path` is what is read; of the model only its sizes are used, and it must be the same one."""

    def __init__(self, config: VLLMConfig, model: CausalLM, tokenizer: Tokenizer) -> None:
        if not config.path:
            raise BackendError("inference=vllm reads a Hugging Face folder; name it in inference.path=")
        self.config, self.tokenizer = config, tokenizer
        self._context, self._vocab_size = config.context or model.context, model.vocab_size
        self._requests: dict[str, Request] = {}
        self._stats = Stats()
        vllm = _vllm()
        self._engine = vllm.LLMEngine.from_engine_args(
            vllm.EngineArgs(
                model=config.path,
                skip_tokenizer_init=True,  # ids in, ids out
                dtype=config.dtype,
                max_model_len=self._context,
                gpu_memory_utilization=config.gpu_memory,
                tensor_parallel_size=config.tensor_parallel,
                generation_config="vllm",  # not the folder's, which would change what was asked for
                max_logprobs=MOST_LOGPROBS,
                logprobs_mode="raw_logprobs",
                trust_remote_code=False,
            )
        )

    def capabilities(self) -> Capabilities:
        """Repetition is penalised as ours is; the other two count the answer alone, as ours do."""
        more = {"min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias", "min_tokens"}
        return Capabilities(
            context=self._context, vocab_size=self._vocab_size, sampling=BASIC | more | {"top_logprobs"}
        )

    def check(self, request: Request) -> None:
        super().check(request)
        if request.params.min_p > 0 and request.params.top_p < 1:
            raise BackendError(
                f"request {request.id}: VLLMBackend cannot honour min_p beside top_p: it cuts by min_p first, not last"
            )
        if request.params.top_logprobs > MOST_LOGPROBS:
            raise BackendError(
                f"request {request.id}: VLLMBackend tells of at most top_logprobs={MOST_LOGPROBS}, "
                f"not {request.params.top_logprobs}"
            )

    def stats(self) -> Stats:
        return replace(self._stats, running=len(self._requests))

    @property
    def busy(self) -> bool:
        return bool(self._requests)

    def add(self, request: Request) -> None:
        self.check(request)
        if request.id in self._requests:
            raise BackendError(f"two requests have the id {request.id!r}")
        prompt = {"prompt_token_ids": list(request.prompt_ids)}
        self._engine.add_request(request.id, prompt, self._settings(request))
        self._requests[request.id] = request
        self._count(requests=1, prompt_tokens=len(request.prompt_ids))

    def _settings(self, request: Request) -> Any:
        p: SamplingParams = request.params
        vllm = _vllm()
        return vllm.SamplingParams(
            temperature=p.temperature,
            top_k=p.top_k,
            top_p=p.top_p,
            min_p=p.min_p,
            # a seed is the request's own, so neighbours change nothing
            seed=key_of(p.seed, request.stream or request.id, 0) >> 1,
            max_tokens=p.max_tokens,
            min_tokens=p.min_tokens,
            stop_token_ids=list(p.stop_ids),
            ignore_eos=True,  # only what the request names ends it
            repetition_penalty=p.repetition_penalty,
            presence_penalty=p.presence_penalty,
            frequency_penalty=p.frequency_penalty,
            logit_bias=bias_of(p) or None,
            logprobs=p.top_logprobs,
            detokenize=False,
            output_kind=vllm.sampling_params.RequestOutputKind.DELTA,
        )

    def drop(self, request_id: str) -> None:
        if self._requests.pop(request_id, None) is not None:
            self._engine.abort_request([request_id])

    def step(self) -> list[TokenEvent]:
        started, events = time.perf_counter(), []
        for output in self._engine.step():
            if output.request_id in self._requests:
                events += self._events(output.request_id, output.outputs[0])
        made = sum(event.token_id >= 0 for event in events)
        self._count(seconds=time.perf_counter() - started, generated_tokens=made)
        return events

    def _events(self, name: str, said: Any) -> list[TokenEvent]:
        """Of what is new in an answer. The last one says why it ended."""
        events = []
        for place, (token, told) in enumerate(zip(said.token_ids, said.logprobs, strict=True)):
            likeliest = sorted((one.rank, id, one.logprob) for id, one in told.items() if one.rank is not None)
            count = self._requests[name].params.top_logprobs
            top = tuple((id, logprob) for _, id, logprob in likeliest[:count])
            reason = said.finish_reason if place == len(said.token_ids) - 1 else None
            events.append(TokenEvent(name, token, told[token].logprob, reason, top=top))
        if said.finish_reason is not None:
            if said.finish_reason not in ("stop", "length") or not events:
                events.append(TokenEvent(name, -1, 0.0, "error", error=f"vLLM ended it: {said.finish_reason}"))
            del self._requests[name]
        return events

    def _count(self, **more: float) -> None:
        self._stats = replace(self._stats, **{name: getattr(self._stats, name) + n for name, n in more.items()})

    def score(self, token_ids: Sequence[int]) -> list[float]:
        if self.busy:
            raise BackendError("vLLM scores only while no request is served")
        if not 1 < len(token_ids) <= self._context - 1:
            raise BackendError(f"{len(token_ids)} tokens cannot be scored: 2 to {self._context - 1} can")
        vllm = _vllm()
        asked = vllm.SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
        self._engine.add_request("score", {"prompt_token_ids": list(token_ids)}, asked)
        told: Any = None
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                told = output.prompt_logprobs or told
        return [row[token].logprob for token, row in zip(token_ids[1:], told[1:], strict=True)]

    def update_weights(self, version: int) -> None:
        raise BackendError("inference=vllm reads its weights from a folder, which does not change; use native")


def _vllm() -> Any:
    try:
        import vllm  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise BackendError(INSTALL) from error
    return vllm
