"""Bootstrap intervals, and accuracy as the mean over tasks."""

import pytest

from trivium.evaluation.intervals import ratio_interval
from trivium.evaluation.probes import Answer, accuracy
from trivium.types import Score


def interval(top, bottom, resamples=2000, confidence=0.95, seed=0):
    return ratio_interval(top, bottom, resamples=resamples, confidence=confidence, seed=seed)


def test_ratio_is_of_sums_not_a_mean_of_ratios():
    """(1 + 9) / (1 + 3) = 2.5; the mean of 1/1 and 9/3 would be 2."""
    assert interval([1, 9], [1, 3]).value == 2.5
    assert interval([1, 9], [1, 3]).count == 2


def test_interval_of_equal_things_has_no_width():
    found = interval([2, 4, 6], [1, 2, 3])
    assert (found.value, found.low, found.high) == (2, 2, 2)


def test_interval_resamples_in_pairs():
    """Ratios 1 and 3 by turns with equal weight: every resample is between 1 and 3. Unpaired, 9/1 could come up."""
    found = interval([1, 9] * 3, [1, 3] * 3, confidence=0.9999)
    assert 1 <= found.low < 2.5 < found.high <= 3


def test_interval_of_a_mean_equals_the_normal_one():
    """400 coins, half heads: standard error 0.025, so 0.5 -+ 1.96 * 0.025 = 0.451 to 0.549 (0.006 is two grid steps of
    1/400 and the quantiles' own noise at 4,000 resamples)."""
    found = interval([0, 1] * 200, [1] * 400, resamples=4000)
    assert found.value == 0.5
    assert (found.low, found.high) == pytest.approx((0.451, 0.549), abs=0.006)


def test_interval_grows_with_confidence():
    widths = [(e := interval([0, 1] * 50, [1] * 100, confidence=c)).high - e.low for c in (0.5, 0.9, 0.99)]
    assert widths[0] < widths[1] < widths[2]


def test_interval_is_a_function_of_its_seed():
    data = ([0.3, 1.7, 2.2, 0.1, 0.9], [1, 1, 2, 1, 1])
    assert interval(*data) == interval(*data)
    assert interval(*data, resamples=50, seed=1) != interval(*data, resamples=50, seed=2)


def answers(**tasks):
    """task="110" is three answers, two of them right."""
    return [
        Answer({"id": f"{task}{i}", "task": task}, "", Score(float(c), c == "1"))
        for task, verdicts in tasks.items()
        for i, c in enumerate(verdicts)
    ]


def test_accuracy_is_the_mean_over_tasks():
    """add 1 of 1, copy 0 of 3: (1 + 0) / 2 = 0.5, though one answer of four is right."""
    found = accuracy(answers(copy="000", add="1"), resamples=100, confidence=0.95)
    assert {name: e.value for name, e in found.items()} == {"accuracy": 0.5, "accuracy/add": 1.0, "accuracy/copy": 0.0}
    assert {name: e.count for name, e in found.items()} == {"accuracy": 4, "accuracy/add": 1, "accuracy/copy": 3}


def test_accuracy_of_mixed_tasks_by_hand():
    """2/4, 3/3 and 0/2: mean (0.5 + 1 + 0) / 3 = 0.5; all answers together would be 5/9."""
    found = accuracy(answers(a="1100", b="111", c="00"), resamples=500, confidence=0.95)
    assert found["accuracy"].value == pytest.approx(0.5)
    assert found["accuracy/a"].value == 0.5
    assert 0 <= found["accuracy"].low < 0.5 < found["accuracy"].high <= 1


def test_accuracy_does_not_depend_on_the_order_of_answers():
    """Tasks by turns or in blocks: the same figures."""
    blocks = answers(a="1100", b="111")
    turns = [blocks[i] for i in (0, 4, 1, 5, 2, 6, 3)]
    assert accuracy(turns, resamples=10, confidence=0.9)["accuracy"].value == pytest.approx(
        accuracy(blocks, resamples=10, confidence=0.9)["accuracy"].value
    )


def test_accuracy_counts_verdicts_not_rewards():
    """A reward of 0.9 for a wrong answer (a near miss) is not 0.9 right."""
    near = [Answer({"id": "x", "task": "t"}, "", Score(0.9, False))]
    assert accuracy(near, resamples=10, confidence=0.95)["accuracy"].value == 0.0
