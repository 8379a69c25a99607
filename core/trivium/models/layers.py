"""The small parts that families share."""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS = {"silu": F.silu, "gelu_tanh": partial(F.gelu, approximate="tanh")}


class GatedFFN(nn.Module):
    """Gated feed-forward: down(act(gate x) * up x); SwiGLU with silu (Shazeer 2020, https://arxiv.org/abs/2002.05202)."""

    def __init__(self, dim: int, hidden: int, activation: str = "silu") -> None:
        super().__init__()
        self.gate = nn.Linear(dim, hidden, bias=False)
        self.up = nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)
        self.act = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        return self.down(self.act(self.gate(x)) * self.up(x))


class Head(nn.Linear):
    """Hidden states to logits. cap: logits become cap * tanh(logit / cap); 0 is off."""

    def __init__(self, dim: int, vocab_size: int, cap: float = 0.0) -> None:
        super().__init__(dim, vocab_size, bias=False)
        self.cap = cap

    def forward(self, input: Tensor) -> Tensor:
        """(..., C) -> (..., V)."""
        logits = super().forward(input)
        return self.cap * (logits / self.cap).tanh() if self.cap else logits
