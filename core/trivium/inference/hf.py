"""transformers' own `generate` behind our protocol: the slow and independent one, to hold others against.

A token is one call of `generate` that goes on from its cache. Requests take turns, each alone in its calls, so that
neighbours change nothing. Random numbers are a function of (seed, request, position), as everywhere, and other ones
than the native engine's.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from trivium.data.position import key_of
from trivium.data.tokenizer import Tokenizer
from trivium.errors import BackendError, ConfigError
from trivium.inference.config import HFBackendConfig
from trivium.inference.protocol import BASIC, Backend, Capabilities, Stats
from trivium.inference.sampling import Place, adjusted, bias_of
from trivium.models.hf import HuggingFace
from trivium.models.protocol import CausalLM
from trivium.models.weights import family_of, hf_tensors
from trivium.types import Request, TokenEvent


@dataclass(eq=False)
class Served:
    """A request, prompt and answer so far, and what transformers remembers of them."""

    request: Request
    ids: list[int]
    cache: Any = None
    made: int = 0


class HFBackend(Backend):
    """A copy of the model in transformers, made anew when the weights change; one that runs through transformers
    (model=hf) is used itself."""

    def __init__(self, config: HFBackendConfig, model: CausalLM, tokenizer: Tokenizer | None = None) -> None:
        self.config, self.model, self.tokenizer = config, model, tokenizer
        self._served: list[Served] = []
        self._stats = Stats()
        self._theirs = self._copy()

    def _copy(self) -> Any:
        transformers = quiet_transformers()
        theirs = self.model.inner if isinstance(self.model, HuggingFace) else copy_of(self.model)
        theirs.generation_config = transformers.GenerationConfig()  # a folder's may hold settings that nobody asked for
        self._cache_name = "cache" if "cache" in signature(theirs.forward).parameters else "past_key_values"
        return theirs.eval()

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def capabilities(self) -> Capabilities:
        return Capabilities(
            context=self.model.context,
            vocab_size=self.model.vocab_size,
            sampling=BASIC | {"min_p", "repetition_penalty", "logit_bias", "min_tokens", "top_logprobs"},
            embeds=True,
        )

    def stats(self) -> Stats:
        return replace(self._stats, running=len(self._served))

    @property
    def busy(self) -> bool:
        return bool(self._served)

    def add(self, request: Request) -> None:
        self.check(request)
        if any(s.request.id == request.id for s in self._served):
            raise BackendError(f"two requests have the id {request.id!r}")
        self._served.append(Served(request, list(request.prompt_ids)))
        self._count(requests=1, prompt_tokens=len(request.prompt_ids))

    def drop(self, request_id: str) -> None:
        self._served = [s for s in self._served if s.request.id != request_id]

    def update_weights(self, version: int) -> None:
        if self.busy:
            raise BackendError("weights cannot change while requests are being answered")
        self._theirs = self._copy()
        self._stats = replace(self._stats, weight_version=version)

    def _count(self, **more: float) -> None:
        self._stats = replace(self._stats, **{name: getattr(self._stats, name) + n for name, n in more.items()})

    def step(self) -> list[TokenEvent]:
        started, events = time.perf_counter(), []
        for served in list(self._served):
            try:
                event = self._next(served)
            except Exception as error:  # of one request; the others go on
                told = (str(error).splitlines() or [type(error).__name__])[0]
                event = TokenEvent(served.request.id, -1, 0.0, "error", error=told)
            if event.finish_reason is not None:
                self._served.remove(served)
            events.append(event)
        self._count(seconds=time.perf_counter() - started, generated_tokens=sum(e.token_id >= 0 for e in events))
        return events

    @torch.no_grad()
    def _next(self, served: Served) -> TokenEvent:
        request, params = served.request, served.request.params
        tokens = torch.tensor([served.ids], device=self._device)
        place = Place(request, list(served.ids), len(request.prompt_ids))
        devices = [tokens.device] if tokens.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(key_of(params.seed, request.stream or request.id, len(served.ids)) >> 1)
            out = self._theirs.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                generation_config=self._settings(served),
                **{self._cache_name: served.cache},
            )
        token, served.cache = int(out.sequences[0, -1]), out[self._cache_name]
        raw, processed = out.logits[0].float(), out.scores[0].double()
        if not raw.isfinite().all():
            raise BackendError("the model's logits are not finite")
        logprobs, drawn, kept = raw[0].log_softmax(-1), 0.0, 1.0
        if params.temperature > 0:
            whole = adjusted(raw, [place]).double() / params.temperature
            drawn = processed[0].log_softmax(-1)[token].item()
            kept = (processed.logsumexp(-1) - whole.logsumexp(-1)).exp().item()
        values, ids = logprobs.topk(min(params.top_logprobs, len(logprobs)))
        served.ids.append(token)
        served.made += 1
        reason = "stop" if token in params.stop_ids else "length" if served.made >= params.max_tokens else None
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
        return TokenEvent(request.id, token, logprobs[token].item(), reason, drawn, kept, top)

    def _settings(self, served: Served) -> Any:
        """transformers' order is ours: bias, repetition, what is forbidden, temperature, top-k, top-p, min-p."""
        p = served.request.params
        sampled: dict[str, Any] = {"do_sample": False}
        if p.temperature > 0:
            cuts = {"top_k": p.top_k, "top_p": p.top_p, "min_p": p.min_p or None}
            sampled = {"do_sample": True, "temperature": p.temperature, **cuts}
        return quiet_transformers().GenerationConfig(
            **sampled,
            max_new_tokens=1,
            suppress_tokens=list(p.stop_ids) if served.made < p.min_tokens else None,
            eos_token_id=list(p.stop_ids) or None,
            pad_token_id=0,
            repetition_penalty=p.repetition_penalty,
            sequence_bias=[[[token], value] for token, value in bias_of(p).items()] or None,
            return_dict_in_generate=True,
            output_logits=True,
            output_scores=True,
            use_cache=True,
        )

    @torch.no_grad()
    def score(self, token_ids: Sequence[int]) -> list[float]:
        tokens = self._tokens(token_ids)
        logprobs = self._theirs(tokens, use_cache=False).logits[0].float().log_softmax(-1)
        return logprobs[:-1].gather(1, tokens[0, 1:, None])[:, 0].tolist()

    @torch.no_grad()
    def embed(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        hidden = [self._theirs.base_model(self._tokens(ids), use_cache=False).last_hidden_state[0] for ids in sequences]
        return torch.nn.functional.normalize(torch.stack([h.float().mean(0) for h in hidden]).cpu(), dim=-1)

    def _tokens(self, token_ids: Sequence[int]) -> Tensor:
        if len(token_ids) > self.model.context:
            raise BackendError(f"{len(token_ids)} tokens do not fit the model's context of {self.model.context}")
        return torch.tensor([list(token_ids)], device=self._device)


def copy_of(model: CausalLM) -> Any:
    """transformers' model of the same family, settings and weights. Raises ConfigError where there is none."""
    transformers = quiet_transformers()
    family = family_of(model)
    if model.adapters is not None:
        raise ConfigError("inference=hf takes no model with an adapter; export it merged first (phase=export)")
    try:
        config = transformers.AutoConfig.for_model(family, **model.hf_config())
        tensors = {name: tensor.detach().clone() for name, tensor in hf_tensors(model).items()}
        theirs, told = transformers.AutoModelForCausalLM.from_config(config).__class__.from_pretrained(
            None, config=config, state_dict=tensors, attn_implementation="eager", output_loading_info=True,
            dtype=model.embed.weight.dtype,
        )  # fmt: skip
    except (ValueError, KeyError, RuntimeError) as error:
        told = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"inference=hf: transformers makes no model of model={family}: {told}") from error
    tied = {"lm_head.weight"} if model.head.weight is model.embed.weight else set()
    if set(told["missing_keys"]) - tied or told["unexpected_keys"] or told["mismatched_keys"]:
        raise ConfigError(f"inference=hf: transformers reads model={family} otherwise: {told}")
    theirs.tie_weights()
    return theirs.to(model.embed.weight.device)


def quiet_transformers(needed: str = "inference=hf") -> Any:
    """transformers without its progress bars. needed: what for, if it is not installed."""
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(
            f"{needed} needs transformers, which is not installed: pip install trivium-llm[hf]"
        ) from error
    transformers.utils.logging.disable_progress_bar()
    return transformers
