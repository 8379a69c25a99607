"""A model's weights laid out for reading prompts and decoding: bf16, or 8 or 4 bits a weight. A copy, never trained.

On CPUs decoding waits for memory: a step cannot be faster than the weights can be read. So fewer bits are faster there,
and layers that see the same input are one product. Weights are rounded in groups along the input: 8 bits in groups of
64 to -128..127 times the group's scale, 4 bits in groups of 32 to 16 steps from its smallest weight to its largest,
which is the grid of GGUF's Q4_1; the head stays at 8 bits then. Activations are bf16, sums fp32.

Of torch's CPU kernels the one for 4 bits alone reads weights as fast as memory gives them, for few rows at a time.
8 bits are two weights of 4 there: w = 16 high + low. Prompts, with many rows, multiply restored bf16 weights.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trivium.errors import BackendError
from trivium.models import adapters
from trivium.models.attention import Attention
from trivium.models.layers import GatedFFN, Head, Linear
from trivium.models.protocol import CausalLM

multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
GROUP = {"int8": 64, "int4": 32}
ORDERED = 16
"""Rows for which oneDNN puts weights in order: 4 to 16 take half the time then, and one no more (LOG.md)."""
KINDS = ("fp32", "bf16", "int8", "int4")
FEW = {"int8": 8, "int4": 16}
"""Rows up to which reading fewer bits beats restoring them (LOG.md)."""


@torch.no_grad()
def packed(model: CausalLM, kind: str, *, compiled: bool = False) -> CausalLM:
    """A copy of `model` for inference. Adapters are merged into the copy. Raises BackendError for another kind.

    compiled: single tokens go through compiled blocks, for which fp32 and bf16 weights are held a second time.
    """
    if kind not in KINDS:
        raise BackendError(f"weights of kind {kind!r} are not known; there are {', '.join(KINDS)}")
    made = copy.deepcopy(model).requires_grad_(False).eval()
    if adapters.has_adapter(made):
        adapters.dequantise(made)
        adapters.merge(made)
        adapters.detach(made)
    on_cpu = next(made.parameters()).device.type == "cpu"
    wide = on_cpu and made.mixes
    made = made.float() if kind == "fp32" else made if wide else made.to(torch.bfloat16)
    if compiled and not on_cpu:
        raise BackendError("inference.compile=true is for CPUs; on a GPU leave it false")
    if not on_cpu:
        if kind in GROUP:
            quantised = importlib.import_module("trivium.models.quantised")  # it needs bitsandbytes, and a second
            adapters.quantise(made, quantised.quantiser("nf4" if kind == "int4" else "int8", double=False))
    else:
        for module in list(made.modules()):
            _pack_children(module, kind, wide and kind != "fp32")
        if not any(isinstance(module, Packed) and module.kind == kind for module in made.modules()):
            sizes = f"inputs must be multiples of {GROUP[kind]}, outputs of 32"
            raise BackendError(f"no layer of this model can be held as {kind}: {sizes}")
    if compiled:
        importlib.import_module("trivium.models.compiled").compile_tokens(made)
    return made


def _pack_children(module: nn.Module, kind: str, wide: bool) -> None:
    """Put packed layers in place of a module's linear ones."""
    if isinstance(module, Attention):
        module.joined = together([module.q, module.k, module.v], kind)
        del module.q, module.k, module.v
    elif isinstance(module, GatedFFN):
        module.gated = Gated(together([module.gate, module.up], kind), module.act)
        del module.gate, module.up
    for name, child in list(module.named_children()):
        if wide and type(child) is nn.Embedding:
            setattr(module, name, Wide(child.weight))
        if isinstance(child, nn.Linear) and type(child) in (nn.Linear, Linear, Head):
            bits = "int8" if kind == "int4" and isinstance(child, Head) else kind  # of 4 it would be what costs most
            setattr(module, name, Packed(child.weight, child.bias, bits, getattr(child, "cap", 0.0)))


class Wide(nn.Module):
    """An embedding held in bf16 that gives fp32: what layers add to is not rounded, nor cast between them."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight.detach().to(torch.bfloat16)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) -> (B, T, C)."""
        return F.embedding(tokens, self.weight).float()


class Packed(nn.Module):
    """A linear layer of (N, K) weights: rounds what it is given to bf16, and gives bf16 (fp32 where that is its kind).
    cap: as of Head."""

    plain: Tensor | None = None
    """Of fp32 and bf16: the weights in no kernel's own order, for compilation."""
    number: Tensor | None = None
    """By which compiled code asks for its product of several rows."""

    def __init__(self, weight: Tensor, bias: Tensor | None, kind: str, cap: float = 0.0) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.kind, self.cap = kind, cap
        self.dtype = torch.float32 if kind == "fp32" else torch.bfloat16
        self.bias = None if bias is None else bias.detach().to(self.dtype)
        if kind in GROUP and (self.in_features % GROUP[kind] or self.out_features % 32):
            self.kind = "bf16"
        if self.kind in ("fp32", "bf16"):
            self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().to(self.dtype).contiguous(), ORDERED)
        else:
            self.codes, self.scales, self.zeros = rounded(weight.float(), self.kind)
            self.planes = _planes(self.codes, self.scales, self.zeros)
            if self.kind == "int4":
                self.codes = _halved(self.codes)

    def restored(self) -> Tensor:
        """(N, K) bf16: the values that it computes with."""
        codes = _unhalved(self.codes) if self.kind == "int4" else self.codes
        groups = codes.view(self.out_features, -1, GROUP[self.kind]) * self.scales[..., None]
        return (groups if self.zeros is None else groups + self.zeros[..., None]).view(self.out_features, -1)

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        if torch.compiler.is_compiling():
            if x.shape[0] > 1:
                return torch.ops.trivium.packed(x, self.number, self.dtype, self.out_features)
            if self.kind != "int4":
                return self.streamed(x)
        x = x if x.dtype == self.dtype else x.to(self.dtype)
        if self.kind in ("fp32", "bf16"):
            out = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        else:
            rows = x if x.dim() == 2 else x.reshape(-1, self.in_features)
            if len(rows) <= FEW[self.kind]:
                parts = [multiply(rows, codes, GROUP[self.kind], scales) for codes, scales in self.planes]
                out = parts[0] if len(parts) == 1 else parts[0] + parts[1]
            else:
                out = F.linear(rows, self.restored())
            out = out if x.dim() == 2 else out.view(*x.shape[:-1], self.out_features)
            out = out if self.bias is None else out + self.bias
        return self.cap * (out / self.cap).tanh() if self.cap else out

    def streamed(self, x: Tensor) -> Tensor:
        """(1, K) -> (1, N) in fp32, as sums of which torch.compile makes loops."""
        if self.kind == "int8":
            groups = self.codes.view(self.out_features, -1, GROUP["int8"]).float() * self.scales.float()[..., None]
            out = (groups * x.float().view(-1, GROUP["int8"])).sum((-1, -2))[None]
        else:
            assert self.plain is not None
            out = (self.plain.float() * x.float()).sum(-1)[None]
        out = out if self.bias is None else out + self.bias.float()
        return self.cap * (out / self.cap).tanh() if self.cap else out


def together(layers: Sequence[nn.Linear], kind: str) -> Packed:
    """Layers of one input as one product, their outputs side by side."""
    biases = [layer.bias for layer in layers]
    bias = None if biases[0] is None else torch.cat(biases)  # pyright: ignore[reportCallIssue, reportArgumentType]
    return Packed(torch.cat([layer.weight for layer in layers]), bias, kind)


class Gated(nn.Module):
    """act(gate x) * up x."""

    def __init__(self, joined: Packed, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.joined, self.act = joined, act

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., hidden)."""
        gate, up = self.joined(x).chunk(2, -1)
        return self.act(gate).mul_(up)


def rounded(weight: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """(N, K) fp32 -> (N, K) int8 codes, (N, K / GROUP) bf16 scales and zeros: weight is about code * scale + zero.

    >>> codes, scales, zeros = rounded(torch.linspace(-1.0, 2.0, 32)[None], "int4")
    >>> codes[0, [0, 15, 31]].tolist(), round(scales.item(), 4), round(zeros.item(), 4)  # 3 / 15; -1 + 8 * 0.2
    ([-8, -1, 7], 0.2002, 0.6016)
    """
    groups = weight.view(len(weight), -1, GROUP[kind])
    if kind == "int8":
        scales, zeros = (groups.abs().amax(-1) / 127.5).to(torch.bfloat16), None
        middle = 0.0
    else:
        scales = ((groups.amax(-1) - groups.amin(-1)) / 15).to(torch.bfloat16)
        zeros = (groups.amin(-1) + 8 * scales.float()).to(torch.bfloat16)
        middle = zeros.float()[..., None]
    wide = scales.float().clamp(min=torch.finfo(torch.float32).tiny)
    most = 128 if kind == "int8" else 8
    codes = ((groups - middle) / wide[..., None]).round().clamp(-most, most - 1)
    return codes.to(torch.int8).view(weight.shape), scales, zeros


def _planes(codes: Tensor, scales: Tensor, zeros: Tensor | None) -> list[tuple[Tensor, Tensor]]:
    """What the kernel reads: it computes (q - 8) * scale + zero of q in 0..15."""
    if zeros is not None:
        return [_plane(codes.int() + 8, scales, zeros)]
    shifted = codes.int() + 128  # 16 high + low, both 0..15: the code is 16 (high - 8) + low
    return [_plane(shifted // 16, 16 * scales, torch.zeros_like(scales)), _plane(shifted % 16, scales, 8 * scales)]


def _plane(values: Tensor, scales: Tensor, zeros: Tensor) -> tuple[Tensor, Tensor]:
    pairs = torch.stack([scales, zeros], -1).transpose(0, 1).contiguous()
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(values, 1), pairs


def _halved(codes: Tensor) -> Tensor:
    """Two codes of -8..7 a byte."""
    return (codes[:, ::2] << 4) | (codes[:, 1::2] & 15)


def _unhalved(pairs: Tensor) -> Tensor:
    return torch.stack([pairs >> 4, (pairs << 4) >> 4], -1).flatten(1)
