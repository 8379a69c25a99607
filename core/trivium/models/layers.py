"""The small parts that families share."""

from __future__ import annotations

from functools import partial

import torch
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
        self.gated: nn.Module | None = None  # (..., C) -> (..., hidden), in place of gate and up

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        return self.down(self.gated(x) if self.gated is not None else self.act(self.gate(x)) * self.up(x))


class Head(nn.Linear):
    """Hidden states to logits. cap: logits become cap * tanh(logit / cap); 0 is off."""

    def __init__(self, dim: int, vocab_size: int, cap: float = 0.0) -> None:
        super().__init__(dim, vocab_size, bias=False)
        self.cap = cap

    def forward(self, input: Tensor) -> Tensor:
        """(..., C) -> (..., V)."""
        logits = super().forward(input)
        return self.cap * (logits / self.cap).tanh() if self.cap else logits


@torch.no_grad()
def draw_weights(model: nn.Module, seed: int, std: float, layers: int, residual: tuple[str, ...]) -> None:
    """Matrices from N(0, std), those whose names end in `residual` from N(0, std / sqrt(2 layers)) (GPT-2's scaling of
    the branches); biases 0, norms 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            size = std / (2 * layers) ** 0.5 if name.endswith(residual) else std
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)
