"""Our own engine: batched, ragged, cached decoding on the very weights that are being trained.

Prompts of a batch are padded on the right; since a cache slot is a position and a query sees only slots up to its own
position, padding is never read and is overwritten as the row grows. Rows that finish leave the batch, rows that wait
take their place when it is empty.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from trivium.errors import BackendError
from trivium.inference.config import NativeConfig
from trivium.inference.protocol import Backend, Capabilities, Stats
from trivium.inference.sampling import sample
from trivium.models.protocol import CausalLM
from trivium.types import Request, TokenEvent

GROWTH = 64
"""Cache slots are added this many at a time: few reallocations, little unread memory."""


class NativeBackend(Backend):
    """Decodes in the precision of the weights, in eval mode, and puts the model's mode back."""

    def __init__(self, config: NativeConfig, model: CausalLM, pad_id: int) -> None:
        self.config, self.model, self.pad_id = config, model, pad_id
        self._stats = Stats()
        self._aborted: set[str] = set()

    def capabilities(self) -> Capabilities:
        return Capabilities(context=self.model.context, shares_weights=True)

    def stats(self) -> Stats:
        return self._stats

    def update_weights(self, version: int) -> None:
        self._stats = replace(self._stats, weight_version=version)  # weights are shared; nothing derived is kept yet

    def abort(self, request_id: str) -> None:
        self._aborted.add(request_id)

    def generate(self, requests: Sequence[Request]) -> Iterator[TokenEvent]:
        seen: set[str] = set()
        for request in requests:
            self._admit(request, seen)
        try:
            for start in range(0, len(requests), self.config.max_batch):
                yield from self._batch(list(requests[start : start + self.config.max_batch]))
        finally:
            self._aborted -= seen  # a later request may have the same id

    def _admit(self, request: Request, seen: set[str]) -> None:
        if request.id in seen:
            raise BackendError(f"two requests have the id {request.id!r}")
        seen.add(request.id)
        wanted, room = len(request.prompt_ids) + request.params.max_tokens, self.model.context
        if not request.prompt_ids:
            raise BackendError(f"request {request.id}: the prompt is empty")
        if wanted > room:
            raise BackendError(
                f"request {request.id}: {len(request.prompt_ids)} prompt tokens and "
                f"max_tokens={request.params.max_tokens} need {wanted}, the model's context is {room}; "
                "shorten the prompt or lower inference.sampling.max_tokens"
            )
        if not 0 <= min(request.prompt_ids) <= max(request.prompt_ids) < self.model.vocab_size:
            raise BackendError(f"request {request.id}: token ids must be below {self.model.vocab_size}")

    def _batch(self, rows: list[Request]) -> Iterator[TokenEvent]:
        """Decode one batch to its end. The state is small: rows, their last tokens, their next positions, a cache."""
        started, was_training = time.perf_counter(), self.model.training
        num_requests, num_prompt, made = len(rows), sum(len(r.prompt_ids) for r in rows), 0
        device = next(self.model.parameters()).device
        try:
            lengths = [len(r.prompt_ids) for r in rows]
            longest = max(lengths)
            cache = self.model.new_cache(len(rows), min(self.model.context, longest + GROWTH))
            tokens = torch.full((len(rows), longest), self.pad_id)
            for b, request in enumerate(rows):
                tokens[b, : lengths[b]] = torch.tensor(request.prompt_ids)
            positions = torch.arange(longest).expand(len(rows), -1)
            logits = self._logits(tokens.to(device), positions.to(device), cache, [n - 1 for n in lengths])
            generated = [0] * len(rows)
            while rows:
                drawn = sample(logits, rows, lengths)
                logprobs = torch.log_softmax(logits, -1).gather(1, drawn[:, None])[:, 0].tolist()
                alive = []
                for b, (request, token) in enumerate(zip(rows, drawn.tolist(), strict=True)):
                    generated[b] += 1
                    made += 1
                    reason = self._finish(request, token, generated[b])
                    if request.id in self._aborted:
                        continue
                    yield TokenEvent(request.id, token, logprobs[b], reason)
                    if reason is None:
                        alive.append(b)
                if not alive:
                    break
                if len(alive) < len(rows):
                    keep = torch.tensor(alive, device=device)
                    cache.select(keep)
                    drawn = drawn[keep]
                    rows, lengths, generated = ([xs[b] for b in alive] for xs in (rows, lengths, generated))
                if max(lengths) >= cache.length:
                    cache.grow(min(self.model.context, cache.length + GROWTH))
                logits = self._logits(
                    drawn[:, None], torch.tensor(lengths, device=device)[:, None], cache, [0] * len(rows)
                )
                lengths = [n + 1 for n in lengths]
        finally:
            self.model.train(was_training)
            old = self._stats
            self._stats = replace(
                old,
                requests=old.requests + num_requests,
                generated_tokens=old.generated_tokens + made,
                prompt_tokens=old.prompt_tokens + num_prompt,
                seconds=old.seconds + time.perf_counter() - started,
            )

    def _finish(self, request: Request, token: int, generated: int) -> str | None:
        if token in request.params.stop_ids:
            return "stop"
        return "length" if generated >= request.params.max_tokens else None

    @torch.no_grad()
    def _logits(self, tokens: Tensor, positions: Tensor, cache: object, columns: list[int]) -> Tensor:
        """(B, V) fp32 logits after each row's column."""
        self.model.eval()
        hidden = self.model(tokens, positions, cache=cache)  # type: ignore[arg-type]
        states = hidden[torch.arange(len(columns)), torch.tensor(columns)]
        return self.model.head(states).float()

    @torch.no_grad()
    def score(self, token_ids: Sequence[int]) -> list[float]:
        if len(token_ids) > self.model.context:
            raise BackendError(f"{len(token_ids)} tokens do not fit the model's context of {self.model.context}")
        was_training = self.model.training
        self.model.eval()
        tokens = torch.tensor([list(token_ids)], device=next(self.model.parameters()).device)
        hidden = self.model(tokens, torch.arange(tokens.shape[1], device=tokens.device)[None])
        logprobs = torch.log_softmax(self.model.head(hidden).float(), -1)
        self.model.train(was_training)
        return logprobs[0, :-1].gather(1, tokens[0, 1:, None])[:, 0].tolist()


def collect(backend: Backend, requests: Sequence[Request]) -> dict[str, list[TokenEvent]]:
    """Run requests to their end: request id -> its events."""
    events: dict[str, list[TokenEvent]] = {r.id: [] for r in requests}
    for event in backend.generate(requests):
        events[event.request_id].append(event)
    return events
