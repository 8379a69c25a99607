"""Schedules at chosen steps: by hand, and against transformers' where it has the same one."""

import math

import pytest
import torch

from trivium.errors import ConfigError
from trivium.training.config import ConstantConfig, CyclicConfig, InverseSqrtConfig, ScheduleConfig, WSDConfig
from trivium.training.schedule import constant, cosine, cyclic, inverse_sqrt, linear, wsd

MANY = 101
"""10 steps of warmup, steps 0 to 9, then 91, steps 10 to 100: step 55 is half way."""
HALF = {"warmup_steps": 10, "final": 0.2}


@pytest.mark.parametrize(
    ("make", "config", "expected"),
    [
        # (1 + 0.2) / 2 half way; a quarter at step 32.5, so at 33 progress is 23/90
        (cosine, ScheduleConfig(**HALF), {55: 0.6, 33: 0.2 + 0.4 * (1 + math.cos(math.pi * 23 / 90)), 100: 0.2}),
        (linear, ScheduleConfig(**HALF), {55: 0.6, 33: 1 - 0.8 * 23 / 90, 100: 0.2}),
        (constant, ConstantConfig(warmup_steps=10), {55: 1.0, 100: 1.0}),
        # a fifth of 101 steps is 20.2 of the 91 after the warmup: it begins where progress is 1 - 20.2 / 91
        (wsd, WSDConfig(**HALF), {55: 1.0, 79: 1.0, 100: 0.2, 95: 1 - 0.8 * (85 / 90 - 1 + 20.2 / 91) * 91 / 20.2}),
        # timescale 10: a quarter of the peak's square after 30 steps, half of the peak
        (inverse_sqrt, InverseSqrtConfig(warmup_steps=10), {40: 0.5, 100: math.sqrt(10 / 100)}),
        (inverse_sqrt, InverseSqrtConfig(warmup_steps=10, timescale=90), {100: math.sqrt(90 / 180), 10: 1.0}),
        (inverse_sqrt, InverseSqrtConfig(warmup_steps=10, final=0.4), {40: 0.5, 100: 0.4}),
        # cycles of 91/7, 182/7 and 364/7 steps: 13, 26 and 52; they begin at 10, 23 and 49
        (
            cyclic,
            CyclicConfig(**HALF, num_cycles=3, t_mult=2.0),
            {22: 0.2, 23: 1.0, 48: 0.2, 49: 1.0, 16: 0.6, 32: 0.2 + 0.4 * (1 + math.cos(math.pi * 9 / 25)), 100: 0.2},
        ),
    ],
    ids=lambda v: getattr(v, "__name__", None),
)
def test_factor_at_step(make, config, expected):
    factor = make(config, MANY)
    found = {step: factor(step) for step in (*expected, 0, 4, 9, 10)}
    assert found == pytest.approx({0: 0.1, 4: 0.5, 9: 1.0, 10: 1.0} | expected, abs=1e-12)


def test_one_cycle_is_a_cosine():
    shapes = [make(config, 50) for make, config in ((cosine, ScheduleConfig()), (cyclic, CyclicConfig(num_cycles=1)))]
    assert [shapes[0](step) for step in range(50)] == [shapes[1](step) for step in range(50)]


def test_warmup_as_a_number_is_the_share_that_it_is():
    by_share, by_number = cosine(ScheduleConfig(warmup=0.1), 200), cosine(ScheduleConfig(warmup_steps=20), 200)
    assert [by_share(s) for s in range(200)] == [by_number(s) for s in range(200)]
    assert cosine(ScheduleConfig(warmup=0.1), 400)(39) == cosine(ScheduleConfig(warmup_steps=20), 400)(19) == 1.0


def theirs(make, **settings):
    """What transformers' schedule says for 200 steps."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule, found = make(optimizer, **settings), []
    for _ in range(200):
        found.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return found


def test_inverse_sqrt_is_transformers():
    """From the end of the warmup on (theirs starts from 0, ours from the first step's share)."""
    from transformers import get_inverse_sqrt_schedule

    for timescale in (20, 50):
        expected = theirs(get_inverse_sqrt_schedule, num_warmup_steps=20, timescale=timescale)
        factor = inverse_sqrt(InverseSqrtConfig(warmup_steps=20, timescale=timescale), 200)
        assert [factor(s) for s in range(20, 200)] == pytest.approx(expected[20:], abs=1e-12)


def test_cycles_are_transformers():
    """Its cycles end one step later than ours, which reach `final` themselves: a shift of at most one step's fall."""
    from transformers import get_cosine_with_hard_restarts_schedule_with_warmup as restarts

    expected = theirs(restarts, num_warmup_steps=20, num_training_steps=200, num_cycles=3)
    factor = cyclic(CyclicConfig(warmup_steps=20, num_cycles=3, final=0.0), 200)
    assert [s for s in range(20, 200) if factor(s) == 1.0] == [20, 80, 140]
    assert [s for s in range(20, 200) if expected[s] == 1.0] == [20, 80, 140]
    assert max(abs(factor(s) - expected[s]) for s in range(20, 200)) < math.pi / 2 / 59


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: cosine(ScheduleConfig(warmup_steps=50), 50), "schedule.warmup_steps=50 leaves nothing of trainer."),
        (lambda: ScheduleConfig(warmup_steps=-1), "schedule.warmup_steps=-1 must not be negative"),
        (lambda: wsd(WSDConfig(warmup_steps=45), 50), "schedule.decay=0.2 does not fit beside warmup_steps=45 of 50"),
        (lambda: WSDConfig(warmup=0.9), "schedule.decay=0.2 must be more than 0 and fit beside warmup=0.9"),
        (lambda: ConstantConfig(final=0.5), "schedule.final=0.5: a constant rate ends at its peak"),
        (lambda: inverse_sqrt(InverseSqrtConfig(warmup=0.0), 50), "without a warmup needs schedule.timescale"),
        (lambda: cyclic(CyclicConfig(num_cycles=30), 50), "schedule.num_cycles=30 are too many for 48 steps"),
        (lambda: CyclicConfig(num_cycles=0), "schedule.num_cycles=0 must be at least 1"),
        (lambda: CyclicConfig(t_mult=0.5), "schedule.t_mult=0.5 must be at least 1"),
        (lambda: InverseSqrtConfig(timescale=-1), "schedule.timescale=-1 must not be negative"),
    ],
)
def test_schedule_that_cannot_be_is_refused(make, sentence):
    with pytest.raises(ConfigError) as told:
        make()
    assert sentence in str(told.value)
