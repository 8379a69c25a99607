"""One division a step: how a step is cut into micro-batches never changes what is learned.

Run through the real module and Lightning's real loop. The class of bug: a mean of means, which Lightning's automatic
optimisation and many trainers make of ragged micro-batches.
"""

import copy
import math

import pytest
import torch
from helpers import run_through, tiny_llama
from torch import nn

from trivium.errors import TrainingError
from trivium.objectives.config import NextTokenConfig, SFTConfig
from trivium.objectives.next_token import SFT, NextToken
from trivium.training.config import AdamWConfig
from trivium.training.objective_module import ObjectiveModule, StepSettings
from trivium.training.optim import adamw
from trivium.types import TokenBatch

ROWS, LENGTH, VOCAB = 8, 12, 61
SPLITS = [8, 4, 2, 1]  # rows a micro-batch: 1x8, 2x4, 4x2, 8x1


def ragged_steps(num_steps):
    """Steps of 8 rows whose numbers of trained tokens run from 1 to 11, in another order each step."""
    generator = torch.Generator().manual_seed(0)
    steps = []
    for _ in range(num_steps):
        tokens = torch.randint(VOCAB, (ROWS, LENGTH), generator=generator)
        labels = tokens.clone()
        labels[:, 0] = -100
        kept = torch.tensor([1, 2, 11, 3, 1, 9, 11, 5])[torch.randperm(ROWS, generator=generator)]
        for row, n in enumerate(kept.tolist()):
            labels[row, 1 : LENGTH - n] = -100
        steps.append((tokens, labels))
    return steps


def cut(step, size):
    """A step as micro-batches of `size` rows."""
    tokens, labels = step
    positions = torch.arange(LENGTH).expand(ROWS, -1)
    return [
        TokenBatch(tokens[i : i + size], labels[i : i + size], positions[i : i + size]) for i in range(0, ROWS, size)
    ]


def small_llama(dtype):
    return tiny_llama(VOCAB, 3, dtype, layers=2, heads=4, kv_heads=2, context=LENGTH)


def fit(model, objective, steps, make_optimizer, clip=0.0):
    """Run `steps` through Lightning; returns the module."""
    settings = StepSettings(grad_clip=clip, seed=0)
    module = ObjectiveModule(model, objective, make_optimizer, lambda step: 1.0, settings)
    run_through(module, steps)
    assert len(list(module.rows())) == len(steps)
    return module


def gradients_of_one_step(size, dtype=torch.float32):
    """The gradients that the optimizer sees at the first step, and the loss that is shown."""
    found = {}
    model = small_llama(dtype)

    def make(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

        def note(*_):
            found.update({n: p.grad.clone() for n, p in model.named_parameters()})

        optimizer.register_step_pre_hook(note)
        return optimizer

    module = fit(model, NextToken(NextTokenConfig()), [cut(s, size) for s in ragged_steps(1)], make)
    return found, module.last["train/loss"]


def mean_of_means_gradients(size, dtype=torch.float32):
    """What a trainer that divides each micro-batch by its own count, then by their number, would get."""
    model, objective = small_llama(dtype), NextToken(NextTokenConfig())
    batches = cut(ragged_steps(1)[0], size)
    for batch in batches:
        (objective(model, batch).loss_sum / objective.count(batch) / len(batches)).backward()
    return {n: p.grad for n, p in model.named_parameters()}


def largest_difference(one, other):
    return max((one[n] - other[n]).abs().max().item() for n in one)


def test_gradients_agree_over_micro_batch_splits():
    """fp32, gradients of order 0.1: 1e-6 is the rounding of sums in another order."""
    whole, loss = gradients_of_one_step(ROWS)
    for size in SPLITS[1:]:
        split, split_loss = gradients_of_one_step(size)
        assert largest_difference(whole, split) < 1e-6
        assert split_loss == pytest.approx(loss, abs=1e-6)


def test_gradients_would_show_a_mean_of_means():
    """The data are ragged enough: the wrong answer is more than 1,000 times the tolerance above away."""
    whole, _ = gradients_of_one_step(ROWS)
    assert largest_difference(whole, mean_of_means_gradients(ROWS)) < 1e-6  # one micro-batch: no difference to see
    for size in SPLITS[1:]:
        assert largest_difference(whole, mean_of_means_gradients(size)) > 1e-3


def test_loss_of_ragged_steps_equals_one_dense_mean():
    """The loss shown is torch's own mean over all trained tokens of the step."""
    model = small_llama(torch.float64)
    tokens, labels = ragged_steps(1)[0]
    logits = model.head(model(tokens, torch.arange(LENGTH).expand(ROWS, -1)))
    expected = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).item()
    _, loss = gradients_of_one_step(2, torch.float64)
    # the running sum of the step is kept in fp32, whatever the weights are: 1e-6 relative
    assert loss == pytest.approx(expected, rel=1e-6)


def test_parameters_agree_over_splits_after_30_steps_in_fp64():
    """AdamW with clipping, 30 steps: whatever differed would grow. 1e-11 is fp64's rounding after that."""
    steps = ragged_steps(30)
    start = small_llama(torch.float64)
    ended = {}
    for size in SPLITS:
        module = fit(
            copy.deepcopy(start),
            NextToken(NextTokenConfig()),
            [cut(s, size) for s in steps],
            lambda m: adamw(AdamWConfig(lr=1e-2), m),
            clip=0.5,
        )
        assert module.step == 30 and module.tokens_seen == 30 * ROWS * LENGTH
        ended[size] = {n: p.detach() for n, p in module.model.named_parameters()}
    assert largest_difference(ended[ROWS], {n: p.detach() for n, p in start.named_parameters()}) > 0.1  # it did move
    for size in SPLITS[1:]:
        assert largest_difference(ended[ROWS], ended[size]) < 1e-11


class Cost(nn.Module):
    """After token 0 the next is 1 with probability e^-1; after token 2 it is 1 with probability e^-3."""

    def __init__(self):
        super().__init__()
        p1, p3 = math.exp(-1), math.exp(-3)
        table = torch.tensor([[1 - p1, p1, 1e-30], [1 / 3, 1 / 3, 1 / 3], [1 - p3, p3, 1e-30]])
        self.embed = nn.Embedding.from_pretrained(table.log(), freeze=False)
        self.head = nn.Linear(3, 3, bias=False)
        with torch.no_grad():
            self.head.weight.copy_(torch.eye(3))

    def forward(self, tokens, positions, segments=None):
        return self.embed(tokens)


def pairs_of(first, count):
    tokens = torch.tensor([[first, 1]] * count)
    labels = torch.tensor([[-100, 1]] * count)
    return TokenBatch(tokens, labels, torch.arange(2).expand(count, -1))


def test_six_tokens_of_loss_one_and_two_of_loss_three_give_one_and_a_half():
    """(6 * 1.0 + 2 * 3.0) / 8 = 1.5; a mean of means would be 2.0. In training, in validation, and in the figures."""
    step = [pairs_of(0, 6), pairs_of(2, 2)]
    module = fit(Cost(), NextToken(NextTokenConfig()), [step], lambda m: torch.optim.SGD(m.parameters(), lr=0.0))
    assert module.last["train/loss"] == pytest.approx(1.5, abs=1e-6)
    assert module.last["train/nll"] == pytest.approx(1.5, abs=1e-6)
    assert module.validation_loss(step) == pytest.approx(1.5, abs=1e-6)


def test_micro_batch_without_trained_tokens_changes_nothing():
    """Six tokens of loss 1.0 beside a micro-batch of prompts only: 1.0, not 0.5 and not NaN."""
    empty = pairs_of(2, 2)
    empty.labels[:] = -100
    step = [pairs_of(0, 6), empty]
    module = fit(Cost(), SFT(SFTConfig()), [step], lambda m: torch.optim.SGD(m.parameters(), lr=0.0))
    assert module.last["train/loss"] == pytest.approx(1.0, abs=1e-6)


def test_step_without_any_trained_token_is_refused():
    empty = pairs_of(0, 2)
    empty.labels[:] = -100
    with pytest.raises(TrainingError, match="step 1: no token of the batch would be trained on"):
        fit(Cost(), NextToken(NextTokenConfig()), [[empty]], lambda m: torch.optim.SGD(m.parameters(), lr=0.0))


def test_step_with_a_loss_that_is_not_finite_never_reaches_the_weights():
    model = Cost()
    with torch.no_grad():
        model.head.weight[0, 0] = torch.nan
    before = model.embed.weight.detach().clone()
    with pytest.raises(TrainingError, match="step 1: loss nan"):
        fit(model, NextToken(NextTokenConfig()), [[pairs_of(0, 2)]], lambda m: torch.optim.SGD(m.parameters(), lr=1.0))
    assert torch.equal(model.embed.weight, before)
