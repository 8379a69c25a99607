"""Rotary positions (Su et al. 2021, https://arxiv.org/abs/2104.09864), in Hugging Face's half-split layout.

Scaling to longer contexts: linear (2306.15595), dynamic NTK and YaRN (2309.00071), Llama 3 (2407.21783, section 3).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trivium.models.config import RopeScaling

UNSCALED = RopeScaling()


def rope_angles(
    positions: Tensor, width: int, theta: float, scaling: RopeScaling = UNSCALED, context: int = 0
) -> tuple[Tensor, Tensor]:
    """cos and signed sin of (B, T) positions, each (B, 1, T, D) in fp32; pair i turns by position * theta^(-2i/D).

    sin is negative in the first half: what `rotate` multiplies the exchanged halves with.

    context: the model's, which is where scaling starts from unless it names another. Dynamic scaling turns by the
    length so far: keys that a cache holds keep the turn of their own time, there as in transformers.
    """
    pairs = torch.arange(0, width, 2, device=positions.device, dtype=torch.float32)
    original = scaling.original_context or context
    size = 1.0
    if scaling.kind == "dynamic":  # the base grows with each row's own length
        length = (positions.amax(-1).float() + 1).clamp(min=original)
        grown = theta * (scaling.factor * length / original - (scaling.factor - 1)) ** (width / (width - 2))
        turns = grown[:, None, None, None] ** (-pairs / width)
    else:
        turns = theta ** (-pairs / width)
    if scaling.kind == "linear":
        turns = turns / scaling.factor
    elif scaling.kind == "llama3":
        turns = _llama3(turns, scaling, original)
    elif scaling.kind == "yarn":
        turns = _yarn(turns, scaling, original, theta)
        size = scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1
    angles = positions[:, None, :, None].float() * turns
    cos, sin = torch.cat((angles, angles), dim=-1).cos(), angles.sin()
    sin = torch.cat((-sin, sin), dim=-1)
    return (cos, sin) if size == 1 else (cos * size, sin * size)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn (B, H, T, D) by its positions' angles, in fp32."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((second, first), dim=-1) * sin


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rotate` in fewer operations, where nothing is trained: (B, H, T, D) -> the same."""
    x = x.to(torch.promote_types(x.dtype, cos.dtype))
    if torch.compiler.is_compiling():  # what is put together is held: no loop over slots turns it once for each
        (a, b), (to_a, to_b) = x.chunk(2, -1), (f.chunk(2, -1) for f in (cos, sin))
        return torch.cat((a * to_a[0] + b * to_b[0], b * to_a[1] + a * to_b[1]), -1)
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def _llama3(turns: Tensor, scaling: RopeScaling, original: int) -> Tensor:
    """Short waves stay, long ones are stretched, those between go from one to the other."""
    per_context = original * turns / (2 * math.pi)  # how often a pair turns within the original context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    stay = ((per_context - low) / (high - low)).clamp(0, 1)
    return stay * turns + (1 - stay) * turns / scaling.factor


def _yarn(turns: Tensor, scaling: RopeScaling, original: int, theta: float) -> Tensor:
    """The same by pair number: from the pair that turns beta_fast times to the one that turns beta_slow times."""
    width = 2 * len(turns)

    def pair(rotations: float) -> float:
        return width * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair(scaling.beta_fast)), 0)
    high = min(math.ceil(pair(scaling.beta_slow)), width - 1)
    number = torch.arange(len(turns), device=turns.device, dtype=torch.float32)
    stretch = ((number - low) / max(high - low, 0.001)).clamp(0, 1)
    return (1 - stretch) * turns + stretch * turns / scaling.factor
