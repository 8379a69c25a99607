"""Estimators of KL(policy || reference): their values, and what their gradients are gradients of.

Expectations are exact sums over a vocabulary of three tokens, so nothing is left to sampling.
"""

import pytest
import torch

from trivium.objectives.policy_gradient import kl_estimates

REFERENCE = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).log()
LOGITS = torch.tensor([0.9, -0.4, 0.1], dtype=torch.float64)
EXACT = {"rtol": 0, "atol": 1e-14}  # fp64, three terms below 1


def kl(p, q):
    return (p.exp() * (p - q)).sum()


def gradient_of(loss):
    """Of loss(log-probabilities) with respect to the three logits."""
    logits = LOGITS.clone().requires_grad_()
    loss(logits.log_softmax(-1)).backward()
    return logits.grad


def expected_gradient(kind):
    """sum_y pi(y) d k(y): the mean of what samples of the policy give when the estimate is used as a loss."""
    return gradient_of(lambda p: (p.detach().exp() * kl_estimates(p, REFERENCE, kind)).sum())


@pytest.mark.parametrize(
    ("k1", "values"),
    [
        (1.0, {"k1": 1.0, "k2": 0.5, "k3": 0.367879, "k3+": 0.367879}),  # e^-1 - 1 + 1
        (-1.0, {"k1": -1.0, "k2": 0.5, "k3": 0.718282, "k3+": 0.718282}),  # e - 1 - 1
        (0.0, {"k1": 0.0, "k2": 0.0, "k3": 0.0, "k3+": 0.0}),
    ],
)
def test_values_of_the_estimators(k1, values):
    for kind, value in values.items():
        assert kl_estimates(torch.tensor(k1 - 2.0), torch.tensor(-2.0), kind).item() == pytest.approx(value, abs=1e-6)


def test_k1_and_k3_are_unbiased_and_k2_is_not():
    p = LOGITS.log_softmax(-1)
    exact = kl(p, REFERENCE)
    mean = {kind: (p.exp() * kl_estimates(p, REFERENCE, kind)).sum() for kind in ("k1", "k2", "k3", "k3+")}
    for kind in ("k1", "k3", "k3+"):
        torch.testing.assert_close(mean[kind], exact, **EXACT)
    assert abs(mean["k2"] - exact) > 0.01


def test_k1_as_a_loss_has_no_expected_gradient():
    """sum_y pi(y) d log pi(y) = d sum_y pi(y) = 0: a penalty that looks alive and pulls nowhere."""
    torch.testing.assert_close(expected_gradient("k1"), torch.zeros(3, dtype=torch.float64), **EXACT)


@pytest.mark.parametrize("kind", ["k2", "k3+"])
def test_k2_and_k3_plus_have_the_gradient_of_the_kl_from_policy_to_reference(kind):
    """sum_y pi (log pi - log ref) d log pi = d KL(pi || ref)."""
    torch.testing.assert_close(expected_gradient(kind), gradient_of(lambda p: kl(p, REFERENCE)), **EXACT)


def test_k3_has_the_gradient_of_the_kl_from_reference_to_policy():
    """sum_y pi (1 - ref/pi) d log pi = -sum_y ref d log pi = d KL(ref || pi)."""
    torch.testing.assert_close(expected_gradient("k3"), gradient_of(lambda p: kl(REFERENCE, p)), **EXACT)


def test_the_two_directions_differ_here():
    """Otherwise the tests above could not tell them apart."""
    assert (expected_gradient("k2") - expected_gradient("k3")).abs().max() > 0.01


def test_k3_is_never_negative_and_exact_near_zero():
    """k3 is about k1^2 / 2 for small k1: 5e-13 at k1 = 1e-6, where exp(-k1) - 1 + k1 in fp32 would be 0 or noise."""
    ratios = torch.linspace(-3, 3, 601)
    assert (kl_estimates(ratios, torch.zeros(601), "k3") >= 0).all()
    small = torch.tensor(1e-6, dtype=torch.float64)
    assert kl_estimates(small, torch.zeros((), dtype=torch.float64), "k3").item() == pytest.approx(5e-13, rel=1e-3)
