"""From hidden states to log-probabilities of the next token: the one place where labels are shifted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from trivium.types import IGNORE, TokenBatch

CHUNK = 256
"""Tokens that meet the vocabulary at once: the logits of a chunk stay in the processor's cache. At a vocabulary of
4,096 a step's loss took 52 ms against 110 ms for all 4,096 tokens at once; see LOG.md."""

TokenLoss = Callable[[Tensor, Tensor], tuple[Tensor, ...]]
"""(N, V) fp32 logits and (N,) targets -> a tuple of (N,) tensors, the first of which is the loss."""


def shift(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Pair each hidden state with the label of the next token, trained positions only.

    (B, T, C), (B, T) -> (N, C), (N,) where N counts labels other than -100 in columns 1..T-1. The label of column 0
    has no hidden state before it; every document's first label is -100, so no pair crosses a document border.
    Choosing the positions before the head keeps prompts and padding out of the largest matrix product.
    """
    targets = labels[:, 1:]
    trained = targets != IGNORE
    return hidden[:, :-1][trained], targets[trained]


def count_targets(labels: Tensor) -> Tensor:
    """Number of pairs `shift` makes, without a forward pass."""
    return (labels[:, 1:] != IGNORE).sum()


def at_least_fp32(x: Tensor) -> Tensor:
    """Every log-probability is computed in fp32 (or fp64) from here, whatever the matrix products used."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """(N, V) logits and (N,) targets -> (N,) natural log-probabilities, log p(target).

    >>> logprobs(torch.zeros(1, 4), torch.tensor([2]))  # uniform over four: -ln 4
    tensor([-1.3863])
    """
    return -F.cross_entropy(logits, targets, reduction="none")


def token_sums(
    head: nn.Linear,
    states: Tensor,
    targets: Tensor,
    token_loss: TokenLoss,
    chunk: int = CHUNK,
    parts: tuple[Tensor, int] | None = None,
) -> Tensor:
    """Sums over N tokens of what `token_loss` returns, as one vector, without ever holding (N, V) logits.

    parts: (N,) int64 below a number: to which of so many parts each token belongs; the losses' sums over each part
    follow the others. The first sum carries the gradient. It is made in the forward pass, chunk by chunk, which is
    right because a sum's gradient does not depend on anything that follows but a factor (Hsu et al. 2024,
    https://arxiv.org/abs/2410.10989).
    """
    tensors = (states, head.weight, head.bias)
    if not torch.is_grad_enabled():  # the function below would make gradients that nobody asked for
        tensors = tuple(None if t is None else t.detach() for t in tensors)
    return _TokenSums.apply(*tensors, head, targets, token_loss, chunk, parts)


def chunk_logits(head: nn.Module, states: Tensor, chunk: int = CHUNK, **replaced: Tensor | None) -> Tensor:
    """(n, C) states, n <= chunk -> (n, V) logits, at least fp32. Always computed for `chunk` rows: for a last chunk of
    another size each step the matrix library would make, and keep, a kernel of its own (LOG.md).

    replaced: the head's weight and bias in another format than its own.
    """
    full = states if len(states) == chunk else F.pad(states, (0, 0, 0, chunk - len(states)))  # it copies in any case
    given = {name: tensor for name, tensor in replaced.items() if tensor is not None}
    logits = functional_call(head, given, (full,)) if given else head(full)
    return at_least_fp32(logits)[: len(states)]


def token_values(head: nn.Linear, states: Tensor, targets: Tensor, value: Callable, chunk: int = CHUNK) -> Tensor:
    """(N,) what `value` makes of each token's (N, V) logits and target, each with a gradient of its own.

    For losses that are no sum over tokens. A chunk's logits are made again in the backward pass (Chen et al. 2016,
    https://arxiv.org/abs/1604.06174), so (N, V) is never held here either.
    """

    def some(h: Tensor, y: Tensor) -> Tensor:
        return value(chunk_logits(head, h, chunk), y)

    parts = [
        checkpoint(some, states[i : i + chunk], targets[i : i + chunk], use_reentrant=False, preserve_rng_state=False)
        for i in range(0, max(len(states), 1), chunk)
    ]
    return torch.cat(parts)  # type: ignore[arg-type]


def target_logprobs(forward: Any, batch: TokenBatch, temperature: float = 1.0) -> Tensor:
    """(N,) log-probability of each trained token of `batch`, in the order of the rows, with gradient."""
    states, targets = shift(forward(batch.tokens, batch.positions, batch.segments), batch.labels)
    return token_values(forward.head, states, targets, lambda logits, y: logprobs(logits / temperature, y))


def token_origins(batch: TokenBatch) -> Tensor | None:
    """(N,) the number, in `batch.origins`, of each trained token; None where losses are not counted apart."""
    if batch.origin is None:
        return None
    segments = torch.ones_like(batch.labels) if batch.segments is None else batch.segments
    return batch.origin.gather(1, (segments - 1).clamp(min=0))[:, 1:][batch.labels[:, 1:] != IGNORE]


def num_segments(batch: TokenBatch) -> int:
    """S: the largest number of documents in a row."""
    return 1 if batch.segments is None else int(batch.segments.max())


def segment_index(batch: TokenBatch) -> Tensor:
    """(N,) where each trained token's document stands in a flat (B * S,) table; column s-1 is segment s."""
    trained = batch.labels[:, 1:] != IGNORE
    rows = torch.arange(len(trained), device=trained.device)[:, None].expand_as(trained)
    if batch.segments is None:
        return rows[trained]
    return (rows * num_segments(batch) + batch.segments[:, 1:] - 1)[trained]


def segment_sums(values: Tensor, batch: TokenBatch) -> Tensor:
    """(N,) values of trained tokens -> (B, S) their sums over each document; 0 where a row has fewer documents."""
    rows, columns = len(batch.tokens), num_segments(batch)
    sums = values.new_zeros(rows * columns).index_add(0, segment_index(batch), values)
    return sums.view(rows, columns)


def sequence_logprobs(forward: Any, batch: TokenBatch) -> Tensor:
    """(B, S) log-probability of each document's trained tokens: a sum, prompts and padding left out."""
    return segment_sums(target_logprobs(forward, batch), batch)


def spread(values: Tensor, labels: Tensor) -> Tensor:
    """(N,) values of trained tokens -> (B, T), aligned with the tokens themselves, 0 elsewhere."""
    out = values.new_zeros(labels.shape)
    out[:, 1:][labels[:, 1:] != IGNORE] = values
    return out


def _cast(weight: Tensor, needed: bool) -> Tensor:
    """A leaf of its own in the format of matrix products. Autocast would cast one too, and keep it, with its gradient,
    until the step is over: at a vocabulary of 20,000 and a width of 512 that was 61 MB a micro-batch."""
    device, dtype = weight.device.type, weight.dtype
    if torch.is_autocast_enabled(device) and dtype == torch.float32:
        dtype = torch.get_autocast_dtype(device)
    return weight.detach().to(dtype).requires_grad_(needed)


class _TokenSums(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: nn.Module,
        targets: Tensor,
        token_loss: TokenLoss,
        chunk: int,
        parts: tuple[Tensor, int] | None,
    ) -> Tensor:
        needed = ctx.needs_input_grad
        w, b = _cast(weight, needed[1]), None if bias is None else _cast(bias, needed[2])
        grads = [
            torch.zeros_like(t, dtype=torch.promote_types(t.dtype, torch.float32)) if t is not None and need else None
            for t, need in ((w, needed[1]), (b, needed[2]))
        ]
        states_grad = torch.zeros_like(states) if needed[0] else None
        totals = []
        for start in range(0, max(len(states), 1), chunk):
            here = slice(start, start + chunk)
            with torch.set_grad_enabled(any(needed)):
                h = states[here].detach().requires_grad_(needed[0])
                values = token_loss(chunk_logits(head, h, chunk, weight=w, bias=b), targets[here])
                sums = [v.sum() for v in values]
            if any(needed):
                sums[0].backward()
            if states_grad is not None and h.grad is not None:
                states_grad[here] = h.grad
            for part, grad in zip((w, b), grads, strict=True):
                if grad is not None and part is not None and part.grad is not None:
                    grad += part.grad
                    part.grad = None
            totals.append(torch.stack([s.detach() for s in sums]))
            if parts:
                apart = values[0].new_zeros(parts[1]).index_add(0, parts[0][here], values[0].detach())
                totals[-1] = torch.cat([totals[-1], apart])
        ctx.save_for_backward(states_grad, *grads)
        return torch.stack(totals).sum(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        factor = grads[0][0]  # of the first sum; the others are figures
        return (*(None if g is None else g * factor for g in ctx.saved_tensors), None, None, None, None, None)
