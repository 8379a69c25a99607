"""Each optimizer's steps in fp64 against somebody else's: a published package, torch's own, or a loop over floats.

Two by two weights, and gradients that depend on where they are taken and on the step:
g_t(w) = [[1, 2], [3, 4]] * (w - 1) + (-1)^t / t * [[0.5, -0.25], [1, 0.125]].
"""

import copy
import math

import pytest
import torch
from torch import nn

from trivium.training.config import (
    AdafactorConfig,
    AdamW8bitConfig,
    AdamWConfig,
    GroupConfig,
    LionConfig,
    MuonConfig,
    ScheduleFreeConfig,
    SGDConfig,
)
from trivium.training.eight_bit import adamw8bit
from trivium.training.lion import lion
from trivium.training.muon import muon
from trivium.training.optim import adafactor, adamw, set_rates
from trivium.training.schedule_free import schedule_free
from trivium.training.sgd import sgd

START = [[1.5, -2.0], [0.25, 3.0]]
SLOPES, PUSHES = [[1.0, 2.0], [3.0, 4.0]], [[0.5, -0.25], [1.0, 0.125]]
STEPS = 5


def gradient(weight, step):
    slopes, pushes = torch.tensor([SLOPES, PUSHES], dtype=weight.dtype)
    return slopes * (weight - 1) + (-1) ** step / step * pushes


def one_matrix():
    model = nn.Module()
    model.w = nn.Parameter(torch.tensor(START, dtype=torch.float64))
    return model


def trained(make, config, rate=lambda step: 1.0):
    """The weight after each of the steps, and the optimizer."""
    model = one_matrix()
    optimizer, path = make(config, model), []
    for step in range(1, STEPS + 1):
        set_rates(optimizer, rate(step))
        model.w.grad = gradient(model.w.detach(), step)
        optimizer.step()
        path.append(model.w.detach().clone())
    return path, optimizer


def by_hand(update, state=()):
    """The same with Python floats: update(w, g, step, *state) -> (w, *state), one weight at a time."""
    path = [[[0.0] * 2 for _ in range(2)] for _ in range(STEPS)]
    for i in range(2):
        for j in range(2):
            w, *rest = START[i][j], *state
            for step in range(1, STEPS + 1):
                g = SLOPES[i][j] * (w - 1) + (-1) ** step / step * PUSHES[i][j]
                w, *rest = update(w, g, step, *rest)
                path[step - 1][i][j] = w
    return torch.tensor(path, dtype=torch.float64).unbind()


def close(found, expected, tolerance=1e-12):
    torch.testing.assert_close(torch.stack(list(found)), torch.stack(list(expected)), rtol=tolerance, atol=tolerance)


def test_adamw_is_the_papers():
    """Loshchilov and Hutter, algorithm 2."""

    def update(w, g, step, m, v):
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        return w - 0.1 * (m / (1 - 0.9**step) / (math.sqrt(v / (1 - 0.95**step)) + 1e-8) + 0.3 * w), m, v

    close(trained(adamw, AdamWConfig(lr=0.1, weight_decay=0.3))[0], by_hand(update, (0.0, 0.0)))


def test_lion_is_the_papers():
    """Chen et al., algorithm 2. The first gradient of the first weight is 0, whose sign is 0.

    The rate is so large that gradients turn: only then do the two betas matter apart.
    """

    def update(w, g, step, m):
        c = 0.9 * m + 0.1 * g
        return w - 0.4 * ((c > 0) - (c < 0) + 0.5 * w), 0.99 * m + 0.01 * g

    close(trained(lion, LionConfig(lr=0.4, weight_decay=0.5))[0], by_hand(update, (0.0,)))


def test_lion_is_the_published_package():
    """lion-pytorch 0.2.5, Lion(lr=0.4, betas=(0.9, 0.99), weight_decay=0.5), after 5 steps."""
    path, _ = trained(lion, LionConfig(lr=0.4, weight_decay=0.5))
    expected = [[1.26272, 0.68928], [0.78656, 0.2784]]
    close(path[-1:], [torch.tensor(expected, dtype=torch.float64)])


SCHEDULE_FREE = {
    0: ([[1.1674299676157351, -1.510235142220385], [0.4813151585881151, 2.4266158557819586]],
        [[1.1882978333904126, -1.5393889570535846], [0.46774128382155905, 2.4604537326017737]]),
    3: ([[1.1794581642845303, -1.570392313725878], [0.45426706103006825, 2.4968933066346635]],
        [[1.1923425724775512, -1.58991018320978], [0.4447736877566383, 2.519572232481711]]),
}  # fmt: skip
"""y and x after 5 steps, by steps of warmup, from schedulefree 1.4.1: AdamWScheduleFree(lr=0.1, betas=(0.9, 0.95),
eps=1e-8, weight_decay=0.3); its x is worked out from y and z."""


@pytest.mark.parametrize("warmup", SCHEDULE_FREE)
def test_schedule_free_is_the_published_package(warmup):
    config = ScheduleFreeConfig(lr=0.1, weight_decay=0.3)
    path, optimizer = trained(schedule_free, config, lambda step: min(1.0, step / warmup) if warmup else 1.0)
    y, x = torch.tensor(SCHEDULE_FREE[warmup], dtype=torch.float64)
    close([path[-1], *optimizer.weights().values()], [y, x])


def test_schedule_free_average_is_the_mean_of_its_steps():
    """At a constant rate x is the plain mean of z_1 to z_t (eq. 5), and y is a tenth z and nine tenths x."""
    model = one_matrix()
    optimizer, zs = schedule_free(ScheduleFreeConfig(lr=0.1), model), []
    for step in range(1, STEPS + 1):
        model.w.grad = gradient(model.w.detach(), step)
        optimizer.step()
        zs.append(optimizer.state[model.w]["z"].clone())
        close([optimizer.weights()[model.w]], [sum(zs) / step])
        close([model.w.detach()], [0.1 * zs[-1] + 0.9 * optimizer.weights()[model.w]])


def test_schedule_free_average_of_bf16_weights_is_fp32():
    """A 300th step moves the average by a 300th; bf16, with 8 bits, would not move at all."""
    model = one_matrix().bfloat16()
    optimizer, moved = schedule_free(ScheduleFreeConfig(lr=1e-3), model), []
    for step in range(1, 301):
        model.w.grad = gradient(model.w.detach(), step)
        before = optimizer.weights().get(model.w, torch.zeros(())).clone()
        optimizer.step()
        moved.append((optimizer.weights()[model.w] - before).abs().min().item())
    assert optimizer.weights()[model.w].dtype is torch.float32 and model.w.dtype is torch.bfloat16
    assert min(moved) > 0


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_is_the_textbooks(nesterov):
    def update(w, g, step, m):
        g = g + 0.3 * w
        m = 0.9 * m + g
        return w - 0.1 * (g + 0.9 * m if nesterov else m), m

    config = SGDConfig(lr=0.1, weight_decay=0.3, nesterov=nesterov)
    close(trained(sgd, config)[0], by_hand(update, (0.0,)))
    close(trained(sgd, SGDConfig(lr=0.1, momentum=0.0))[0], by_hand(lambda w, g, step: (w - 0.1 * g,)))


KINDS = [(sgd, SGDConfig), (lion, LionConfig), (adamw, AdamWConfig), (schedule_free, ScheduleFreeConfig)]


@pytest.mark.parametrize(("make", "config"), KINDS, ids=lambda v: v.__name__)
def test_bf16_weights_step_as_fp32_ones_do(make, config):
    """torch's fused SGD left whole vectors of bf16 weights where they were (pytorch issue 191763).

    One step from the same start: 0.1 of rate is some 10 units of the 8 bits that a bf16 of 1 has.
    """
    ends = []
    for dtype in (torch.float32, torch.bfloat16):
        model = nn.Linear(40, 40, bias=False).to(dtype)
        draw = torch.Generator().manual_seed(0)
        start, push = (torch.randn(40, 40, generator=draw).bfloat16() for _ in range(2))
        model.weight.data, optimizer = start.to(dtype, copy=True), make(config(lr=0.1, weight_decay=0.0), model)
        model.weight.grad = push.to(dtype, copy=True)
        optimizer.step()
        ends.append(model.weight.detach().float() - start.float())
    assert ends[0].abs().mean() > 0.01
    torch.testing.assert_close(ends[1], ends[0], rtol=0.02, atol=0.02)


def test_adafactor_is_the_papers():
    """Shazeer and Stern, algorithm 4, with torch's relative step: at most lr, times the weights' root mean square."""
    path, w = [], torch.tensor(START, dtype=torch.float64)
    rows, columns = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for step in range(1, STEPS + 1):
        g, fresh = gradient(w, step), step**-0.8
        rows = (1 - fresh) * rows + fresh * (g**2).mean(1)
        columns = (1 - fresh) * columns + fresh * (g**2).mean(0)
        update = g / (rows[:, None] * columns[None] / rows.mean()).sqrt()
        update = update / max(1.0, update.pow(2).mean().sqrt().item())
        size = max(1e-3, w.pow(2).mean().sqrt().item()) * min(0.5, step**-0.5)
        w = w * (1 - 0.5 * 0.3) - size * update
        path.append(w.clone())
    close(trained(adafactor, AdafactorConfig(lr=0.5, weight_decay=0.3))[0], path)


def test_adafactor_is_transformers():
    """transformers' Adafactor without decay, told the same relative step."""
    from transformers.optimization import Adafactor

    model, path = one_matrix(), []
    other = Adafactor([model.w], lr=1.0, relative_step=False, scale_parameter=True, warmup_init=False)
    for step in range(1, STEPS + 1):
        other.param_groups[0]["lr"] = min(0.5, step**-0.5)
        model.w.grad = gradient(model.w.detach(), step)
        other.step()
        path.append(model.w.detach().clone())
    close(trained(adafactor, AdafactorConfig(lr=0.5))[0], path, 1e-6)  # transformers keeps its sums in fp32


def blocks(dtype=torch.float32):
    """A matrix in a block, one outside, and a vector in a block."""
    model = nn.Module()
    generator = torch.Generator().manual_seed(0)
    model.embed = nn.Embedding(6, 4)
    model.blocks = nn.ModuleList([nn.Linear(4, 8)])
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=dtype)
    return model


def give_gradients(model, step):
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)


def test_muon_is_torchs_muon_and_adamw_side_by_side():
    """Bit for bit, with the group rules of each: the bias and nothing else does not decay."""
    ours, theirs = blocks(), blocks()
    config = MuonConfig(lr=0.02, weight_decay=0.3)
    optimizer = muon(config, ours)
    matrix = torch.optim.Muon([theirs.blocks[0].weight], lr=0.02, weight_decay=0.3, adjust_lr_fn="match_rms_adamw")
    rest = [{"params": [theirs.embed.weight], "weight_decay": 0.3}, {"params": [theirs.blocks[0].bias]}]
    other = torch.optim.AdamW(rest, lr=0.02, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    for step in range(STEPS):
        for model, steppers in ((ours, [optimizer]), (theirs, [matrix, other])):
            give_gradients(model, step)
            for each in steppers:
                each.step()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert [sorted(g["param_names"]) for g in optimizer.param_groups] == [
        *(["blocks.0.weight"], ["embed.weight"], ["blocks.0.bias"]),
    ]


def test_muon_steps_are_nearly_orthogonal():
    """One step of an 8 x 4 matrix is lr * 0.2 * sqrt(8) * O; by SVD O shares the singular vectors of the momentum and
    its singular values are in [0.68, 1.13], where five quintic iterations take all from 0.001 up (Jordan 2024)."""
    model = blocks()
    before = model.blocks[0].weight.detach().clone()
    optimizer = muon(MuonConfig(lr=0.02, weight_decay=0.0, nesterov=False), model)
    give_gradients(model, 1)
    optimizer.step()
    step = (before - model.blocks[0].weight.detach()) / (0.02 * 0.2 * math.sqrt(8))
    left, _, right = torch.linalg.svd(model.blocks[0].weight.grad, full_matrices=False)
    core = left.T @ step @ right.T
    values = core.diagonal()
    assert 0.65 < values.min() and values.max() < 1.2
    assert (core - values.diag()).abs().max() < 0.02, "bf16 iterations: 8 bits"


def test_8bit_small_parameters_step_as_adamw():
    """Moments of 32 bits below min_8bit_size; bitsandbytes computes in fp32: 1e-6."""
    close(
        trained(adamw8bit, AdamW8bitConfig(lr=0.1, weight_decay=0.3))[0],
        trained(adamw, AdamWConfig(lr=0.1, weight_decay=0.3))[0],
        1e-6,
    )


def test_8bit_moments_stay_near_adamw():
    """A 64 x 64 matrix, 20 steps: the weights stay within 5 % of the distance that AdamW goes, and are not the same."""
    ends = []
    for make, config in ((adamw, AdamWConfig(lr=0.01)), (adamw8bit, AdamW8bitConfig(lr=0.01))):
        model = nn.Linear(64, 64, bias=False)
        start = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
        model.weight.data = start.clone()
        optimizer = make(config, model)
        for step in range(20):
            noise = torch.randn(64, 64, generator=torch.Generator().manual_seed(step))
            model.weight.grad = model.weight.detach() + noise
            optimizer.step()
        ends.append(model.weight.detach().clone())
    assert optimizer.state[model.weight]["state1"].dtype is torch.uint8
    off = (ends[0] - ends[1]).norm() / (ends[0] - start).norm()
    assert 0 < off < 0.05


@pytest.mark.parametrize("make", [adamw, adafactor, lion, schedule_free, sgd], ids=lambda f: f.__name__)
def test_group_is_an_optimizer_with_its_own_settings(make):
    """One optimizer with two groups does what two optimizers do."""
    kinds = {adamw: AdamWConfig, adafactor: AdafactorConfig, lion: LionConfig, schedule_free: ScheduleFreeConfig}
    kind = kinds.get(make, SGDConfig)
    grouped, alone = blocks(torch.float64), blocks(torch.float64)
    apart = copy.deepcopy(alone)
    pattern = GroupConfig("embed*", lr=0.5, weight_decay=0.02)
    steppers = [
        (make(kind(lr=0.01, weight_decay=0.1, groups=[pattern]), grouped), grouped),
        (make(kind(lr=0.01, weight_decay=0.1), alone.blocks), alone),
        (make(kind(lr=0.005, weight_decay=0.02), apart.embed), apart),
    ]
    for step in range(STEPS):
        for optimizer, model in steppers:
            set_rates(optimizer, 1 / (1 + step))
            give_gradients(model, step)
            optimizer.step()
    assert torch.equal(grouped.embed.weight, apart.embed.weight)
    assert torch.equal(grouped.blocks[0].weight, alone.blocks[0].weight)
    assert torch.equal(grouped.blocks[0].bias, alone.blocks[0].bias)
