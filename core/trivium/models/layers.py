"""The small parts that families share."""

from __future__ import annotations

from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS = {"silu": F.silu, "gelu_tanh": partial(F.gelu, approximate="tanh")}


class Linear(nn.Linear):
    """torch's layer. Where nothing is trained, fp32 on a CPU goes through oneDNN, which takes half of MKL's time for
    few rows (LOG.md)."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        if not direct(input) or input.dtype != torch.float32 or type(self.weight) is not nn.Parameter:
            return super().forward(input)  # a distributed weight, for one
        return torch.ops.mkldnn._linear_pointwise(input, self.weight, self.bias, "none", [], "")


class RMSNorm(nn.RMSNorm):
    """torch's layer (Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467). Where nothing is trained on a CPU, in
    half as many operations: for a single token their number is what takes time."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        if not direct(x) or x.dtype not in (torch.float32, torch.bfloat16):
            return super().forward(x)
        size = torch.linalg.vector_norm(x, 2, -1, True, dtype=torch.float32)
        scale = torch.addcmul(_constant(self.eps or torch.finfo(x.dtype).eps), size, size, value=1 / x.shape[-1])
        return (x * scale.rsqrt_()).mul_(self.weight).to(x.dtype)


@cache
def _constant(value: float) -> Tensor:
    """As a tensor, which a Python number becomes at each use."""
    return torch.tensor(value)


def direct(x: Tensor) -> bool:
    """Whether operations on `x` may go past autograd, autocast and compilation to a CPU kernel of their own."""
    return not (
        x.device.type != "cpu"
        or torch.is_grad_enabled()
        or torch.is_autocast_enabled("cpu")
        or torch.compiler.is_compiling()
    )


class GatedFFN(nn.Module):
    """Gated feed-forward: down(act(gate x) * up x); SwiGLU with silu (Shazeer 2020, https://arxiv.org/abs/2002.05202)."""

    def __init__(self, dim: int, hidden: int, activation: str = "silu") -> None:
        super().__init__()
        self.gate = Linear(dim, hidden, bias=False)
        self.up = Linear(dim, hidden, bias=False)
        self.down = Linear(hidden, dim, bias=False)
        self.act = ACTIVATIONS[activation]
        self.gated: nn.Module | None = None  # (..., C) -> (..., hidden), in place of gate and up

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        return self.down(self.gated(x) if self.gated is not None else self.act(self.gate(x)) * self.up(x))


class Head(Linear):
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
