"""Drawing tokens: vectorised over rows, each with its own parameters and its own randomness.

A row's random number is a function of (seed, request, position) alone, so neighbours in a batch never change an
answer, and a seed never leaks from one request to another.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trivium.data.position import key_of
from trivium.types import Request


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
    wide = torch.float32 if logits.device.type == "mps" else torch.float64  # Apple's GPUs have no fp64
    ordered, ids = (logits.to(wide) / temperature.to(wide)[:, None]).sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(logits.shape[1], device=logits.device)
    limit = torch.where(top_k > 0, top_k, logits.shape[1])
    probabilities = ordered.masked_fill(rank >= limit[:, None], -torch.inf).softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    kept = probabilities.masked_fill(before >= top_p.to(wide)[:, None], 0.0)
    return kept / kept.sum(-1, keepdim=True), ids


def sample(logits: Tensor, requests: Sequence[Request], positions: Sequence[int]) -> Tensor:
    """(B, V) fp32 logits -> (B,) tokens; temperature 0 is exactly argmax."""
    tokens = logits.argmax(-1)
    drawn = [i for i, r in enumerate(requests) if r.params.temperature > 0]
    if not drawn:
        return tokens
    params = [requests[i].params for i in drawn]
    device = logits.device
    probabilities, ids = filtered_probabilities(
        logits[drawn],
        torch.tensor([p.temperature for p in params], device=device),
        torch.tensor([p.top_k for p in params], device=device),
        torch.tensor([p.top_p for p in params], device=device),
    )
    u = uniforms([requests[i] for i in drawn], [positions[i] for i in drawn]).to(device, probabilities.dtype)
    chosen = (probabilities.cumsum(-1) <= u[:, None]).sum(-1)
    last = (probabilities > 0).sum(-1) - 1  # rounding may leave the whole sum a hair under u
    tokens[drawn] = ids.gather(1, torch.minimum(chosen, last)[:, None])[:, 0]
    return tokens
