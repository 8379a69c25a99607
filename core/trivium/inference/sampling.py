"""Drawing tokens: vectorised over rows, each with its own parameters and its own randomness.

A row's random number is a function of (seed, request, position) alone, so neighbours in a batch never change an
answer, and a seed never leaks from one request to another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from trivium.data.position import key_of
from trivium.errors import BackendError
from trivium.types import Request, SamplingParams

SAMPLING = frozenset(f.name for f in fields(SamplingParams))
NOTHING_ALLOWED = "no token is allowed to come next"
"""The error of a request whose own conditions (a constraint, min_tokens) exclude every token."""
COLDEST = 1e-6
"""A temperature below it is greedy: logits divided by it would no longer be numbers."""
FEW = 512
"""So many of the likeliest tokens are sorted first; nearly always top-k, top-p and min-p keep fewer."""


class Constraint(Protocol):
    """What a row's answer must be, token by token."""

    def forbid(self, logits: Tensor) -> None:
        """Set the (V,) logits of every token that cannot come next to -inf."""
        ...

    def accept(self, token: int) -> None:
        """`token` was drawn."""
        ...

    @property
    def done(self) -> bool:
        """Whether nothing more can come."""
        ...


@dataclass(frozen=True)
class Place:
    """Where a token is to be drawn: request, the tokens before it, and how many of them are its prompt's."""

    request: Request
    ids: Sequence[int]
    prompt: int
    constraint: Constraint | None = None


class Drawn(NamedTuple):
    """A drawn token; see TokenEvent for the rest."""

    token: int
    logprob: float
    drawn_logprob: float
    kept: float
    top: tuple[tuple[int, float], ...]


def uniforms(requests: Sequence[Request], positions: Sequence[int]) -> Tensor:
    """(B,) fp64 numbers in [0, 1), one for each request at its position."""
    keys = [key_of(r.params.seed, r.stream or r.id, p) for r, p in zip(requests, positions, strict=True)]
    return torch.tensor([(k >> 11) / 2**53 for k in keys], dtype=torch.float64)


def filtered_probabilities(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(B, V) logits -> probabilities sorted downwards, and the token of each, after temperature, top-k, top-p, min-p.

    Kept probabilities sum to 1. top-p keeps the likeliest tokens up to and including the one that reaches p.

    >>> one = torch.tensor([1.0])
    >>> p, ids = filtered_probabilities(torch.tensor([[0.0, 2.0, 1.0]]), one, torch.tensor([2]), one)
    >>> ids[0, :2].tolist(), [round(x, 4) for x in p[0].tolist()]  # e/(1+e) and 1/(1+e)
    ([1, 2], [0.7311, 0.2689, 0.0])
    """
    scaled = _wide(logits) / _wide(temperature)[:, None]
    ordered, ids = scaled.sort(dim=-1, descending=True, stable=True)
    kept, _ = _cut(ordered, scaled.logsumexp(-1), top_k, top_p, min_p)
    return kept / kept.sum(-1, keepdim=True), ids


def _cut(ordered: Tensor, whole: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor | None) -> tuple[Tensor, Tensor]:
    """(B, N) scaled logits of the N likeliest tokens, downwards, and (B,) the log of the sum over all of them ->
    probabilities with 0 for what is cut, and whether every cut falls before the end of the N."""
    number = ordered.shape[1]
    rank = torch.arange(number, device=ordered.device)
    probabilities = (ordered - whole[:, None]).exp()
    limit = torch.where(top_k > 0, top_k, torch.iinfo(torch.int64).max)[:, None]
    probabilities = probabilities.masked_fill(rank >= limit, 0.0)
    # top-p is of what top-k left: without top-k that is everything, also what was not sorted
    mass = torch.where(top_k > 0, probabilities.sum(-1), 1.0)[:, None]
    before = probabilities.cumsum(-1) - probabilities
    beyond = (before >= _wide(top_p)[:, None] * mass) & (rank > 0)  # the first stays: a top-p may be rounded to 0
    kept = probabilities.masked_fill(beyond, 0.0)
    if min_p is not None:
        kept = kept.masked_fill(kept < _wide(min_p)[:, None] * kept[:, :1], 0.0)
    # with a top-k beyond the N, the mass that top-p is of is not known here
    return kept, torch.where(top_k > 0, limit[:, 0] <= number, kept[:, -1] == 0)


def sample(logits: Tensor, requests: Sequence[Request], positions: Sequence[int]) -> Tensor:
    """(B, V) fp32 logits -> (B,) tokens by temperature, top-k, top-p and min-p; temperature 0 is exactly argmax."""
    return _draw(logits, requests, positions)[0]


def _draw(logits: Tensor, requests: Sequence[Request], positions: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, the log-probability of each where it was drawn from, and the mass of that before it was cut."""
    tokens = logits.argmax(-1)
    logprobs = torch.zeros(len(requests), dtype=torch.float64)
    masses = torch.ones(len(requests), dtype=torch.float64)
    drawn = [i for i, r in enumerate(requests) if r.params.temperature >= COLDEST]
    cut = [i for i in drawn if _cuts(requests[i].params)]
    whole = [i for i in drawn if not _cuts(requests[i].params)]  # mostly: nothing is cut, and nothing need be sorted
    for rows, filtered in ((cut, True), (whole, False)):
        if rows:
            here = logits if len(rows) == len(requests) else logits[rows]
            u = uniforms([requests[i] for i in rows], [positions[i] for i in rows]).to(logits.device)
            params = [requests[i].params for i in rows]
            found = _drawn_cut(here, params, u) if filtered else _drawn_whole(here, params, u)
            tokens[rows], logprobs[rows], masses[rows] = found[0], found[1].cpu().double(), found[2].cpu().double()
    return tokens, logprobs, masses


def _cuts(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1 or params.min_p > 0


def _column(params: Sequence[SamplingParams], name: str, device: torch.device) -> Tensor:
    return torch.tensor([getattr(p, name) for p in params], device=device)


def _drawn_whole(logits: Tensor, params: Sequence[SamplingParams], u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    probabilities = (logits / _column(params, "temperature", logits.device)[:, None]).softmax(-1)
    chosen = _chosen(probabilities, u)
    return chosen, probabilities.gather(1, chosen[:, None])[:, 0].log(), torch.ones_like(u)


def _drawn_cut(logits: Tensor, params: Sequence[SamplingParams], u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A row's result depends on its own logits alone: how many of them are sorted is decided row by row."""
    device = logits.device
    scaled = _wide(logits) / _wide(_column(params, "temperature", device))[:, None]
    whole = scaled.logsumexp(-1)
    limits = [_column(params, name, device) for name in ("top_k", "top_p", "min_p")]
    tokens, logprobs, masses = torch.zeros_like(u, dtype=torch.int64), torch.zeros_like(u), torch.zeros_like(u)
    left = torch.arange(len(params), device=device)
    for count in (min(FEW, logits.shape[1]), logits.shape[1]):
        here = scaled[left]
        if count < logits.shape[1]:
            ordered, ids = here.topk(count, dim=-1)
        else:
            ordered, ids = here.sort(dim=-1, descending=True, stable=True)
        kept, ended = _cut(ordered, whole[left], *(x[left] for x in limits))
        ended = ended | (count == logits.shape[1])
        chosen = _chosen(kept[ended], u[left[ended]])[:, None]
        mass = kept[ended].sum(-1)
        rows = left[ended]
        tokens[rows] = ids[ended].gather(1, chosen)[:, 0]
        logprobs[rows] = (kept[ended].gather(1, chosen)[:, 0] / mass).log().to(logprobs.dtype)
        masses[rows] = mass.to(masses.dtype)
        left = left[~ended]
        if not len(left):
            break
    return tokens, logprobs, masses


def _chosen(probabilities: Tensor, u: Tensor) -> Tensor:
    """The column at which the cumulated probability passes u, for each row."""
    cumulated = _wide(probabilities).cumsum(-1)
    # of the sum that rounding really left, so that a token is always found, and never one of probability 0
    return torch.searchsorted(cumulated, u.to(cumulated.dtype)[:, None] * cumulated[:, -1:], right=True)[:, 0]


def sample_places(logits: Tensor, places: Sequence[Place]) -> list[Drawn | BackendError]:
    """Draw a token at each place from its (B, V) fp32 logits; an error for a place where there is none to be drawn."""
    finite = (logits.amin(-1).isfinite() & logits.amax(-1).isfinite()).tolist()  # NaN where one is; aminmax is slower
    changed = adjusted(logits, places)
    possible = (
        finite
        if changed is logits
        else (changed.amax(-1) > -torch.inf).logical_and(torch.tensor(finite, device=logits.device)).tolist()
    )
    if not all(possible):
        changed = changed.masked_fill(~torch.tensor(possible, device=logits.device)[:, None], 0.0)
    requests = [place.request for place in places]
    tokens, drawn, kept = _draw(changed, requests, [len(place.ids) for place in places])
    raw = logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(-1)
    tops = _tops(logits, requests)
    rows = zip(tokens.tolist(), raw.tolist(), drawn.tolist(), kept.tolist(), tops, strict=True)
    out: list[Drawn | BackendError] = [Drawn(*row) for row in rows]
    for i, fine in enumerate(possible):
        if not fine:
            said = NOTHING_ALLOWED if finite[i] else "the model's logits are not finite"
            out[i] = BackendError(said)
    return out


def adjusted(logits: Tensor, places: Sequence[Place]) -> Tensor:
    """The logits after bias, penalties and what is forbidden; the very same tensor where nothing is asked."""
    params = [place.request.params for place in places]
    repeated = [i for i, p in enumerate(params) if p.repetition_penalty != 1]
    counted = [i for i, p in enumerate(params) if p.presence_penalty or p.frequency_penalty]
    biased = [i for i, p in enumerate(params) if p.logit_bias]
    early = [i for i, p in enumerate(params) if p.stop_ids and len(places[i].ids) - places[i].prompt < p.min_tokens]
    bound = [i for i, place in enumerate(places) if place.constraint is not None]
    if not (repeated or counted or biased or early or bound):
        return logits
    logits = logits.clone()
    for i in biased:
        ids, values = zip(*params[i].logit_bias, strict=True)
        logits[i].index_add_(0, _ids(ids, logits), torch.tensor(values, device=logits.device, dtype=logits.dtype))
    if repeated:
        seen = _counts(logits, [places[i].ids for i in repeated]) > 0
        penalty = torch.tensor([params[i].repetition_penalty for i in repeated], device=logits.device)[:, None]
        rows = logits[repeated]
        logits[repeated] = torch.where(seen, torch.where(rows > 0, rows / penalty, rows * penalty), rows)
    if counted:
        counts = _counts(logits, [places[i].ids[places[i].prompt :] for i in counted])
        presence, frequency = (
            torch.tensor([getattr(params[i], name) for i in counted], device=logits.device)[:, None]
            for name in ("presence_penalty", "frequency_penalty")
        )
        logits[counted] -= presence * (counts > 0) + frequency * counts
    for i in early:
        logits[i, _ids(params[i].stop_ids, logits)] = -torch.inf
    for i in bound:
        constraint = places[i].constraint
        assert constraint is not None
        constraint.forbid(logits[i])
    return logits


def bias_of(params: SamplingParams) -> dict[int, float]:
    """What is added to each token's logit: of a token that is named twice the sum."""
    found: dict[int, float] = {}
    for token, value in params.logit_bias:
        found[token] = found.get(token, 0.0) + value
    return found


def _ids(ids: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor(list(ids), device=like.device)


def _counts(logits: Tensor, ids: Sequence[Sequence[int]]) -> Tensor:
    """(R, V): how often each token occurs in each of R sequences."""
    longest = max(1, *(len(x) for x in ids)) if ids else 1
    padded = torch.tensor([[*x, *[0] * (longest - len(x))] for x in ids], device=logits.device)
    one = torch.tensor([[1.0] * len(x) + [0.0] * (longest - len(x)) for x in ids], device=logits.device)
    return torch.zeros(len(ids), logits.shape[1], device=logits.device).scatter_add_(1, padded, one)


def _tops(logits: Tensor, requests: Sequence[Request]) -> list[tuple[tuple[int, float], ...]]:
    found: list[tuple[tuple[int, float], ...]] = [()] * len(requests)
    for i, request in enumerate(requests):
        if count := min(request.params.top_logprobs, logits.shape[1]):
            values, ids = logits[i].log_softmax(-1).topk(count)
            found[i] = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return found


def _wide(x: Tensor) -> Tensor:
    """fp64, or fp32 where there is none (Apple's GPUs)."""
    return x.to(torch.float32 if x.device.type == "mps" else torch.float64)
