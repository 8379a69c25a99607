"""Completions of a list of prompts, as text."""

from __future__ import annotations

from collections.abc import Sequence

from trivium.data.tokenizer import Tokenizer
from trivium.inference.protocol import Backend
from trivium.types import Request, SamplingParams


def complete(
    backend: Backend, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], params: SamplingParams
) -> list[str]:
    """The text that follows each prompt (token ids), without the stop token."""
    requests = [Request(str(i), tuple(prompt), params) for i, prompt in enumerate(prompts)]
    drawn: dict[str, list[int]] = {r.id: [] for r in requests}
    for event in backend.generate(requests):
        if event.token_id not in params.stop_ids:  # a constraint may end an answer with a token that is text
            drawn[event.request_id].append(event.token_id)
    return [tokenizer.decode(drawn[r.id]) for r in requests]
