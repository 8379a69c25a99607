"""Linear layers whose weights are held in 4 or 8 bits, by bitsandbytes: the frozen base that adapters are trained on.

NF4 and double quantisation: Dettmers et al. 2023, https://arxiv.org/abs/2305.14314, section 3. int8: one scale for each
row (Dettmers et al. 2022, https://arxiv.org/abs/2208.07339, section 2). Weights are restored for each product, in the
forward and again in the backward pass; activations are never quantised.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

# on CPUs that compute in bf16 it looks for a kernel of another package, for a format that is not used here
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
import bitsandbytes.functional as bnb  # noqa: E402

BLOCK = 64  # weights that share a scale, in 4 bits


class Quantised(nn.Module):
    """Stands in for a linear layer. Its weights are no parameters: nothing trains, averages, casts or saves them."""

    packed: Tensor
    bias: nn.Parameter | None

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.out_features, self.in_features = layer.weight.shape
        self.held = layer.weight.numel()
        self.bias = layer.bias
        if self.bias is not None:
            self.bias.requires_grad_(False)

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return self.packed.device

    def restored(self) -> Tensor:
        """(out, in): the values that it computes with."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in the precision of autocast where that is on."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        with torch.autocast(kind, enabled=False):
            output = _Product.apply(x.to(dtype), self)
            return output if self.bias is None else output + self.bias.to(dtype)


class Quantised4(Quantised):
    """4 bits a weight, in blocks of 64 with a scale each. kind: "nf4" or "fp4". double: the scales have 8 bits."""

    def __init__(self, layer: nn.Linear, kind: str, double: bool) -> None:
        super().__init__(layer)
        weight = layer.weight.detach().contiguous()
        self.packed, self._state = bnb.quantize_4bit(
            weight, blocksize=BLOCK, compress_statistics=double, quant_type=kind
        )

    def restored(self) -> Tensor:
        return bnb.dequantize_4bit(self.packed, self._state)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self.packed = fn(self.packed)
        self._state.to(self.packed.device)
        return self


class Quantised8(Quantised):
    """8 bits a weight, a scale for each row."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer)
        weight = layer.weight.detach().float()
        scale = weight.abs().amax(1)
        self._scale = scale.clamp(min=torch.finfo(torch.float32).tiny)
        self.packed = (weight * (127 / self._scale)[:, None]).round().to(torch.int8)

    def restored(self) -> Tensor:
        return bnb.int8_vectorwise_dequant(self.packed, self._scale)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self.packed = fn(self.packed)
        self._scale = self._scale.to(self.packed.device)
        return self


class _Product(torch.autograd.Function):
    """x W^T, keeping neither W nor x: the gradient of x is that of the output times W, restored again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Quantised) -> Tensor:  # type: ignore[override]
        ctx.layer = layer
        return linear(x, layer.restored().to(x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient @ ctx.layer.restored().to(gradient.dtype), None


def quantiser(kind: str, double: bool) -> Callable[[nn.Linear], Quantised]:
    """What turns a linear layer into one that is held as `kind`: nf4, fp4 or int8."""
    if kind == "int8":
        return Quantised8
    return lambda layer: Quantised4(layer, kind, double)
