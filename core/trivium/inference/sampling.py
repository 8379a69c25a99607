"""Drawing tokens: vectorised over rows, each with its own parameters and its own randomness.

A row's random number is a function of (seed, request, position) alone, so neighbours in a batch never change an
answer, and a seed never leaks from one request to another.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trivium.data.position import key_of
from trivium.types import Request, SamplingParams


def uniforms(requests: Sequence[Request], positions: Sequence[int]) -> Tensor:
    """(B,) fp64 numbers in [0, 1), one for each request at its position."""
    keys = [key_of(r.params.seed, r.id, p) for r, p in zip(requests, positions, strict=True)]
    return torch.tensor([(k >> 11) / 2**53 for k in keys], dtype=torch.float64)


def filtered_probabilities(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor) -> tuple[Tensor, Tensor]:
    """(B, V) logits -> probabilities sorted downwards, and the token of each, after temperature, top-k, then top-p.

    Kept probabilities sum to 1. top-p keeps the likeliest tokens up to and including the one that reaches p.

    >>> one = torch.tensor([1.0])
    >>> p, ids = filtered_probabilities(torch.tensor([[0.0, 2.0, 1.0]]), one, torch.tensor([2]), one)
    >>> ids[0, :2].tolist(), [round(x, 4) for x in p[0].tolist()]  # e/(1+e) and 1/(1+e)
    ([1, 2], [0.7311, 0.2689, 0.0])
    """
    ordered, ids = (_wide(logits) / _wide(temperature)[:, None]).sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(logits.shape[1], device=logits.device)
    limit = torch.where(top_k > 0, top_k, logits.shape[1])
    probabilities = ordered.masked_fill(rank >= limit[:, None], -torch.inf).softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    kept = probabilities.masked_fill(before >= _wide(top_p)[:, None], 0.0)
    return kept / kept.sum(-1, keepdim=True), ids


def sample(logits: Tensor, requests: Sequence[Request], positions: Sequence[int]) -> Tensor:
    """(B, V) fp32 logits -> (B,) tokens; temperature 0 is exactly argmax."""
    tokens = logits.argmax(-1)
    drawn = [i for i, r in enumerate(requests) if r.params.temperature > 0]
    cut = [i for i in drawn if requests[i].params.top_k or requests[i].params.top_p < 1]
    whole = [i for i in drawn if i not in set(cut)]  # most of the time: nothing is cut, and nothing need be sorted
    for rows, filtered in ((cut, True), (whole, False)):
        if rows:
            params = [requests[i].params for i in rows]
            u = uniforms([requests[i] for i in rows], [positions[i] for i in rows])
            tokens[rows] = _draw(logits[rows], params, u.to(logits.device), filtered)
    return tokens


def _draw(logits: Tensor, params: Sequence[SamplingParams], u: Tensor, filtered: bool) -> Tensor:
    """The token at which the cumulated probability passes u, for each row. filtered: with top-k and top-p."""
    device = logits.device
    temperature = torch.tensor([p.temperature for p in params], device=device)
    ids = None
    if filtered:
        top_k = torch.tensor([p.top_k for p in params], device=device)
        top_p = torch.tensor([p.top_p for p in params], device=device)
        probabilities, ids = filtered_probabilities(logits, temperature, top_k, top_p)
    else:
        probabilities = (logits / temperature[:, None]).softmax(-1)
    cumulated = _wide(probabilities).cumsum(-1)
    # of the sum that rounding really left, so that a token is always found, and never one of probability 0
    chosen = torch.searchsorted(cumulated, u.to(cumulated.dtype)[:, None] * cumulated[:, -1:], right=True)
    return (chosen if ids is None else ids.gather(1, chosen))[:, 0]


def _wide(x: Tensor) -> Tensor:
    """fp64, or fp32 where there is none (Apple's GPUs)."""
    return x.to(torch.float32 if x.device.type == "mps" else torch.float64)
