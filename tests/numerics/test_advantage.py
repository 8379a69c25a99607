"""Advantages within groups, worked by hand."""

import pytest
import torch

from trivium.objectives.advantage import group_advantage


def test_group_divides_by_the_unbiased_deviation():
    """(1, 0, 0, 3): mean 1; squares 0 + 1 + 1 + 4 = 6, std sqrt(6 / 3) = 1.414214; -1 / (1.414214 + 1e-4)."""
    found = group_advantage(torch.tensor([[1.0, 0.0, 0.0, 3.0]]), "group")
    assert found.tolist() == [pytest.approx([0.0, -0.707057, -0.707057, 1.414114], abs=1e-6)]


def test_none_subtracts_the_mean():
    assert group_advantage(torch.tensor([[1.0, 0.0, 0.0, 3.0]]), "none").tolist() == [[0.0, -1.0, -1.0, 2.0]]


def test_rloo_compares_with_the_mean_of_the_others():
    """3 against (1 + 0 + 0) / 3: 2.666667; 0 against (1 + 0 + 3) / 3: -1.333333; 1 against (0 + 0 + 3) / 3: 0."""
    found = group_advantage(torch.tensor([[1.0, 0.0, 0.0, 3.0]]), "rloo")
    assert found.tolist() == [pytest.approx([0.0, -1.333333, -1.333333, 2.666667], abs=1e-6)]


def test_batch_has_one_deviation_for_all_groups_and_a_mean_for_each():
    """(0, 2), (1, 5): centred -1, 1, -2, 2. All four: mean 2, squares 4 + 0 + 1 + 9 = 14, std sqrt(14/3) = 2.160247."""
    found = group_advantage(torch.tensor([[0.0, 2.0], [1.0, 5.0]]), "batch")
    expected = [[-0.462889, 0.462889], [-0.925778, 0.925778]]  # 1 / 2.160347 and 2 / 2.160347
    assert found.tolist() == [pytest.approx(row, abs=1e-6) for row in expected]


@pytest.mark.parametrize("kind", ["group", "none", "rloo", "batch"])
@pytest.mark.parametrize("value", [0.1, 0.7, 1 / 3, 0.0, -2.3])
@pytest.mark.parametrize("samples", [2, 3, 6, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_give_exactly_zero(kind, value, samples, dtype):
    """The mean of equal floats need not be that float: 0.1 + 0.1 + 0.1 is more than 3 * 0.1, and what is left of it,
    divided by 0 + 1e-4, is an advantage. fp32 rewards are safe in fp64 anyhow; fp64 ones are not.

    Another group, of unequal rewards, stands beside it: it must not be taken for idle.
    """
    other = torch.arange(float(samples), dtype=dtype)
    found = group_advantage(torch.stack([torch.full((samples,), value, dtype=dtype), other]), kind)
    assert found[0].tolist() == [0.0] * samples
    assert found[1].abs().max() > 0.1


def test_nearly_equal_rewards_are_not_taken_for_equal():
    """0.1 and the next fp32 number after it: a difference of 7.45e-9, small but there."""
    low = torch.tensor(0.1)
    high = torch.nextafter(low, torch.tensor(1.0))
    found = group_advantage(torch.stack([low, high])[None], "none")
    assert found[0, 1].item() == pytest.approx((high.double() - low.double()).item() / 2, rel=1e-6)
    assert found[0, 0] == -found[0, 1]


@pytest.mark.parametrize("kind", ["group", "none", "rloo"])
def test_groups_do_not_see_one_another(kind):
    one, two = torch.tensor([[1.0, 4.0, 2.0]]), torch.tensor([[-7.0, 0.0, 0.5]])
    together = group_advantage(torch.cat((one, two)), kind)
    assert torch.equal(together, torch.cat((group_advantage(one, kind), group_advantage(two, kind))))


@pytest.mark.parametrize("kind", ["group", "none", "rloo", "batch"])
def test_negative_rewards_keep_their_sign_and_zero_is_a_reward(kind):
    """-1 is worse than 0, and 0 worse than 1; were 0 read as missing, the middle would not be 0."""
    found = group_advantage(torch.tensor([[-1.0, 0.0, 1.0]]), kind)[0].tolist()
    assert found[0] < 0 == found[1] < found[2] == -found[0]


def test_one_sample_is_no_group():
    with pytest.raises(ValueError, match="a group of 1 sample has nothing to be compared with"):
        group_advantage(torch.zeros(3, 1))
