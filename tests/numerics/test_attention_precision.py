"""Narrow heads attend in fp32 on a CPU without matrix tiles, whatever the matrix products around them use."""

import pytest
import torch
import torch.nn.functional as F

from trivium.models import attention
from trivium.models.attention import Attention, training_precision
from trivium.models.rope import rope_angles


@pytest.mark.parametrize(
    ("width", "dtype", "tiles", "expected"),
    [
        (32, torch.bfloat16, False, torch.float32),
        (32, torch.float16, False, torch.float32),
        (64, torch.bfloat16, False, torch.bfloat16),  # wide heads are faster as they are
        (32, torch.bfloat16, True, torch.bfloat16),  # and so are all with matrix tiles
        (32, torch.float64, False, torch.float64),
        (32, torch.float32, False, torch.float32),
    ],
)
def test_what_attention_is_computed_in(monkeypatch, width, dtype, tiles, expected):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: tiles)
    assert training_precision(torch.zeros(1, 1, 2, width, dtype=dtype)) == expected


@pytest.mark.parametrize("tiles", [False, True])
def test_autocast_does_not_round_narrow_heads_again(monkeypatch, tiles):
    """What reaches the kernel under autocast: fp32 for heads of width 32 without tiles, bf16 with them."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: tiles)
    seen, kernel = [], F.scaled_dot_product_attention

    def spy(q, k, v, **kwargs):
        seen.append((q.dtype, k.dtype, v.dtype))
        return kernel(q, k, v, **kwargs)

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", spy)
    layer, positions = Attention(64, 2, 1, 32), torch.arange(5)[None]
    x = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x, rope_angles(positions, 32, 1e4), None, positions)
    assert seen == [((torch.bfloat16 if tiles else torch.float32),) * 3]
    assert out.dtype == torch.bfloat16
    exact = layer(x, rope_angles(positions, 32, 1e4), None, positions)
    assert (out - exact).abs().max() < 0.02 * exact.abs().max() + 0.01
