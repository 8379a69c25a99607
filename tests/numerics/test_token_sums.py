"""The chunked loss equals the dense one, in value and in every gradient."""

import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from trivium.objectives.config import NextTokenConfig, SFTConfig
from trivium.objectives.logprobs import count_targets, logprobs, shift, token_sums
from trivium.objectives.next_token import SFT, NextToken

N, C, V = 37, 8, 23
EXACT = {"rtol": 0, "atol": 1e-12}  # fp64, sums of some hundred terms of order 1


def case(tokens=N, bias=True, dtype=torch.float64):
    torch.manual_seed(0)
    head = nn.Linear(C, V, bias=bias, dtype=dtype)
    return head, torch.randn(tokens, C, dtype=dtype, requires_grad=True), torch.randint(V, (tokens,))


def gradients(head, states):
    return [None if t is None else t.grad for t in (states, head.weight, head.bias)]


@pytest.mark.parametrize("chunk", [1, 5, 36, 37, 38, 256])
@pytest.mark.parametrize("bias", [True, False])
def test_token_sums_equal_dense_cross_entropy(chunk, bias):
    """The factor 3 stands for what comes after the sum (1 / count): the gradient must take it up."""
    results = []
    plain = NextToken(NextTokenConfig())
    for dense in (True, False):
        head, states, targets = case(bias=bias)
        if dense:
            loss = F.cross_entropy(head(states), targets, reduction="sum")
        else:
            loss = token_sums(head, states, targets, plain.token_loss, chunk)[0]
        (3 * loss).backward()
        results.append([loss.detach(), *gradients(head, states)])
    for one, other in zip(*results, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(other, one, **EXACT)


@pytest.mark.parametrize("chunk", [4, 100])
def test_token_sums_equal_dense_with_every_option(chunk):
    """z-loss, label smoothing and DFT's detached weight together, written out densely here."""
    objective = SFT(SFTConfig(z_loss=0.3, label_smoothing=0.2, dft=True))
    head, states, targets = case()
    sums = token_sums(head, states, targets, objective.token_loss, chunk)
    sums[0].backward()
    chunked = gradients(head, states)
    head, states, targets = case()
    logits = head(states)
    smoothed = F.cross_entropy(logits, targets, label_smoothing=0.2, reduction="none")
    weight = logits.softmax(-1).gather(1, targets[:, None])[:, 0].detach()
    loss = (weight * (smoothed + 0.3 * logits.logsumexp(-1) ** 2)).sum()
    loss.backward()
    torch.testing.assert_close(sums[0], loss, **EXACT)
    torch.testing.assert_close(sums[1], F.cross_entropy(logits, targets, reduction="sum"), **EXACT)
    for one, other in zip(gradients(head, states), chunked, strict=True):
        torch.testing.assert_close(other, one, **EXACT)


@pytest.mark.parametrize("frozen", ["weight", "bias", "states", "all"])
def test_token_sums_leave_frozen_parts_without_gradient(frozen):
    """A frozen head (an adapter's case) or frozen states: the others' gradients are still the dense ones."""
    results = []
    for dense in (True, False):
        head, states, targets = case()
        parts = {"weight": head.weight, "bias": head.bias, "states": states}
        for name, part in parts.items():
            part.requires_grad_(frozen not in (name, "all"))
        if dense:
            loss = F.cross_entropy(head(states), targets, reduction="sum")
        else:
            loss = token_sums(head, states, targets, NextToken(NextTokenConfig()).token_loss, 5)[0]
        if frozen == "all":
            assert not loss.requires_grad
        else:
            loss.backward()
        results.append([loss.detach(), *gradients(head, states)])
        if frozen != "all":
            assert parts[frozen].grad is None
    for one, other in zip(*results, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(other, one, **EXACT)


def test_token_sums_of_no_tokens_are_zero_with_zero_gradients():
    """A micro-batch of prompts only: exactly 0, and a gradient of zeros, not NaN and not an error."""
    head, states, targets = case(tokens=0)
    sums = token_sums(head, states, targets, NextToken(NextTokenConfig()).token_loss)
    assert sums.tolist() == [0.0, 0.0]
    sums[0].backward()
    assert torch.equal(head.weight.grad, torch.zeros_like(head.weight))
    assert states.grad.shape == (0, C)


def test_token_sums_accumulate_over_calls():
    """Two calls on halves of the tokens leave the gradient of one call on all."""
    loss_of = NextToken(NextTokenConfig()).token_loss
    head, states, targets = case()
    token_sums(head, states, targets, loss_of)[0].backward()
    whole = gradients(head, states)
    head, states, targets = case()
    for half in (slice(0, 20), slice(20, N)):
        token_sums(head, states[half], targets[half], loss_of)[0].backward()
    for one, other in zip(whole, gradients(head, states), strict=True):
        torch.testing.assert_close(other, one, **EXACT)


def test_token_sums_compute_logits_of_half_precision_in_fp32():
    """bf16 states and head: the sums are fp32, within bf16's rounding (2^-8 relative) of the fp64 loss."""
    head, states, targets = case()
    exact = F.cross_entropy(head(states), targets, reduction="sum").item()
    sums = token_sums(head.bfloat16(), states.bfloat16(), targets, NextToken(NextTokenConfig()).token_loss, 5)
    assert sums.dtype == torch.float32
    assert sums[0].item() == pytest.approx(exact, rel=2**-8)


def test_shift_pairs_each_state_with_the_next_label():
    """States are numbered 10 b + t; labels of row 0: t=2 -> 7; of row 1: t=1 -> 8, t=3 -> 9."""
    hidden = torch.tensor([[[10.0 * b + t] for t in range(4)] for b in range(2)])
    labels = torch.tensor([[5, -100, 7, -100], [-100, 8, -100, 9]])  # the 5 in column 0 has nothing before it
    states, targets = shift(hidden, labels)
    assert states[:, 0].tolist() == [1.0, 10.0, 12.0]
    assert targets.tolist() == [7, 8, 9]
    assert count_targets(labels).item() == 3


def test_logprobs_equal_log_softmax():
    torch.manual_seed(0)
    logits, targets = torch.randn(5, V, dtype=torch.float64) * 10, torch.randint(V, (5,))
    expected = logits.log_softmax(-1)[torch.arange(5), targets]
    torch.testing.assert_close(logprobs(logits, targets), expected, **EXACT)


def test_token_sums_under_autocast_keep_no_copies_of_the_head():
    """Casts between the formats, four micro-batches of three chunks each: of the head, one a micro-batch, and one of
    its gradient a chunk. What is left of the head's shape within autocast: the weight and its gradient, in fp32.

    The story: autocast cached a cast of each call's own copy of the weight, and with it its gradient, to the end of the
    step. With a vocabulary of 20,000 and a width of 512 memory grew by 61 MB a micro-batch.
    """
    head, states, targets = case(tokens=12, bias=False, dtype=torch.float32)
    casts = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten._to_copy.default and args[0].shape == (V, C):
                casts.append((kwargs or {})["dtype"])
            return function(*args, **(kwargs or {}))

    loss_of = NextToken(NextTokenConfig()).token_loss
    with torch.autocast("cpu", torch.bfloat16):
        with Watch():
            for _ in range(4):
                token_sums(head, states, targets, loss_of, 4)[0].backward()
        gc.collect()
        held = [t for t in gc.get_objects() if type(t) in (torch.Tensor, nn.Parameter) and t.shape == (V, C)]
    assert casts == [torch.bfloat16] * 4
    assert sum(t is head.weight for t in held) == 1 and len(held) <= 2
    exact = head.weight.detach().double().requires_grad_()
    F.cross_entropy(states.detach().double() @ exact.T, targets, reduction="sum").backward()
    found = head.weight.grad.double() / 4
    torch.testing.assert_close(found, exact.grad, rtol=0, atol=0.01 * exact.grad.abs().max().item())  # 8 bits
