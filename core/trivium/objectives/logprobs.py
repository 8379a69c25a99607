"""From hidden states to log-probabilities of the next token: the one place where labels are shifted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trivium.types import IGNORE

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


def token_sums(head: nn.Linear, states: Tensor, targets: Tensor, token_loss: TokenLoss, chunk: int = CHUNK) -> Tensor:
    """Sums over N tokens of what `token_loss` returns, as one vector, without ever holding (N, V) logits.

    The first sum carries the gradient. It is made in the forward pass, chunk by chunk, which is right because a sum's
    gradient does not depend on anything that follows but a factor (Hsu et al. 2024, https://arxiv.org/abs/2410.10989).
    """
    tensors = (states, head.weight, head.bias)
    if not torch.is_grad_enabled():  # the function below would make gradients that nobody asked for
        tensors = tuple(None if t is None else t.detach() for t in tensors)
    return _TokenSums.apply(*tensors, targets, token_loss, chunk)


class _TokenSums(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        token_loss: TokenLoss,
        chunk: int,
    ) -> Tensor:
        needed = ctx.needs_input_grad
        w = weight.detach().requires_grad_(needed[1])
        b = None if bias is None else bias.detach().requires_grad_(needed[2])
        states_grad = torch.zeros_like(states) if needed[0] else None
        totals = []
        for start in range(0, max(len(states), 1), chunk):
            here = slice(start, start + chunk)
            with torch.set_grad_enabled(any(needed)):
                h = states[here].detach().requires_grad_(needed[0])
                # A last chunk of another size each step would have the matrix library make, and keep, a kernel for it.
                full = F.pad(h, (0, 0, 0, chunk - len(h)))
                sums = [s.sum() for s in token_loss(at_least_fp32(F.linear(full, w, b))[: len(h)], targets[here])]
            if any(needed):
                sums[0].backward()
            if states_grad is not None and h.grad is not None:
                states_grad[here] = h.grad
            totals.append(torch.stack([s.detach() for s in sums]))
        ctx.save_for_backward(states_grad, w.grad, None if b is None else b.grad)
        return torch.stack(totals).sum(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        factor = grads[0][0]  # of the first sum; the others are figures
        return (*(None if g is None else g * factor for g in ctx.saved_tensors), None, None, None)
