"""Weights in 4 and 8 bits: the values by hand from the papers, and the gradient that goes through them."""

import pytest
import torch
from torch import nn

from trivium.models.quantised import Quantised4, Quantised8, quantiser

NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
"""Appendix E of Dettmers et al. 2023."""


def linear(weight, bias=None):
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    layer.weight.data = weight
    if bias is not None:
        layer.bias.data = bias
    return layer


def test_nf4_levels_by_hand():
    """A block of 64: the nearest of 16 levels, scaled by the largest absolute value, here 2."""
    weight = torch.zeros(1, 64)
    weight[0, :5] = torch.tensor([2.0, -2.0, 0.15, 0.33, -1.0])
    found = Quantised4(linear(weight), "nf4", double=False).restored()
    nearest = [2 * min(NF4, key=lambda level: abs(level - w / 2)) for w in weight[0].tolist()]
    torch.testing.assert_close(found[0], torch.tensor(nearest), rtol=1e-6, atol=0)
    assert found[0, :4].tolist() == pytest.approx([2.0, -2.0, 2 * 0.07958029955625534, 2 * 0.16093020141124725])


def test_each_block_has_a_scale_of_its_own():
    weight = torch.full((2, 64), 1e-3)
    weight[1] = 1e3
    found = Quantised4(linear(weight), "nf4", double=False).restored()
    torch.testing.assert_close(found, weight)


def test_int8_by_hand():
    """One scale a row, the largest absolute value over 127; a row of zeros stays zero."""
    weight = torch.tensor([[1.27, -0.5, 0.006], [0.0, 0.0, 0.0], [-254.0, 3.1, 100.0]])
    found = Quantised8(linear(weight)).restored()
    torch.testing.assert_close(found, torch.tensor([[1.27, -0.5, 0.01], [0, 0, 0], [-254.0, 4.0, 100.0]]))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False])
def test_four_bits_are_those_of_bitsandbytes_own_layer(kind, double):
    import bitsandbytes as bnb

    torch.manual_seed(0)
    layer = linear(torch.randn(48, 128), torch.randn(48))
    theirs = bnb.nn.Linear4bit(128, 48, quant_type=kind, compress_statistics=double)
    theirs.load_state_dict({"weight": layer.weight.detach(), "bias": layer.bias.detach()})
    x = torch.randn(3, 5, 128)
    ours = quantiser(kind, double)(layer)
    torch.testing.assert_close(ours(x), theirs.to("cpu")(x))
    assert ours.packed.numel() == 48 * 128 // 2


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_gradient_is_that_of_the_restored_weights(kind):
    torch.manual_seed(0)
    quantised = quantiser(kind, True)(linear(torch.randn(24, 64), torch.randn(24)))
    x, y = torch.randn(4, 7, 64, requires_grad=True), torch.randn(4, 7, 24)
    (quantised(x) * y).sum().backward()
    whole = x.detach().requires_grad_()
    wanted = nn.functional.linear(whole, quantised.restored(), quantised.bias)
    (wanted * y).sum().backward()
    torch.testing.assert_close(quantised(x), wanted)
    torch.testing.assert_close(x.grad, whole.grad)
    assert not list(p for p in quantised.parameters() if p.requires_grad)


def test_weights_are_no_parameters_and_are_not_cast():
    quantised = quantiser("nf4", True)(linear(torch.randn(24, 64)))
    before = quantised.restored()
    assert not list(quantised.parameters()) and not list(quantised.buffers()) and not quantised.state_dict()
    assert quantised.to(torch.bfloat16).restored().equal(before)
    assert quantised.held == 24 * 64


def test_products_are_in_the_precision_of_autocast():
    quantised = quantiser("int8", True)(linear(torch.randn(24, 64)))
    x = torch.randn(2, 64)
    with torch.autocast("cpu", torch.bfloat16):
        found = quantised(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, x.bfloat16() @ quantised.restored().bfloat16().t())


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_gpu_computes_with_the_values_of_a_cpu(kind):
    """Quantised here and there, moved there, and back: the same values; the product to rounding."""
    torch.manual_seed(0)
    layer, x = linear(torch.randn(96, 128), torch.randn(96)), torch.randn(4, 128)
    here = quantiser(kind, False)(layer)
    wanted, values = here(x), here.restored()
    there = quantiser(kind, False)(layer.cuda())
    torch.testing.assert_close(there.restored().cpu(), values, rtol=1e-6, atol=1e-7)
    moved = here.cuda()
    torch.testing.assert_close(moved(x.cuda()).cpu(), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(moved.cpu().restored(), values, rtol=1e-6, atol=1e-7)
