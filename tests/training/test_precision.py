"""Number formats: what is kept in which, that fp16's scale loses nothing, and that casts are made once a step."""

import copy
import math

import pytest
import torch
from helpers import curve, run_through, tiny_job, tiny_llama
from torch.utils._python_dispatch import TorchDispatchMode

from trivium.data.config import BPEConfig
from trivium.data.datamodule import Steps
from trivium.data.tokenizer import train_bpe
from trivium.errors import TrainingError
from trivium.objectives.config import DistillConfig, NextTokenConfig, PreferenceConfig, RewardConfig
from trivium.objectives.distill import Distill
from trivium.objectives.logprobs import sequence_logprobs
from trivium.objectives.next_token import NextToken
from trivium.objectives.preference import Preference
from trivium.objectives.reward import Reward, segment_scores
from trivium.schema import GuardConfig
from trivium.training.config import AdamWConfig
from trivium.training.objective_module import ObjectiveModule, StepSettings
from trivium.training.optim import adamw, optimizer_tensors
from trivium.training.precision import PRECISIONS, LossScale
from trivium.training.trainer import fit
from trivium.types import DistillBatch, LossOutput, PreferenceBatch, TokenBatch

VOCAB, LENGTH, ROWS = 61, 12, 8


def item(number, size=4, batch=TokenBatch):
    """Item `number` of the data: 8 rows, `size` a micro-batch, two documents of 6 tokens in each row."""
    tokens = torch.randint(VOCAB, (ROWS, LENGTH), generator=torch.Generator().manual_seed(number))
    positions, segments = torch.arange(LENGTH).expand(ROWS, -1) % 6, 1 + torch.arange(LENGTH).expand(ROWS, -1) // 6
    labels = torch.where(positions == 0, -100, tokens)
    parts = zip(*(t.split(size) for t in (tokens, labels, positions, segments)), strict=True)
    return [batch(*part) for part in parts]


class Spy(NextToken):
    """Notes the item, loss and hidden states' format of each micro-batch; `change(step)` multiplies its loss."""

    def __init__(self, change=lambda number: 1.0):
        super().__init__(NextTokenConfig())
        self.change, self.sums = change, []

    def __call__(self, forward, batch):
        output = super().__call__(forward, batch)
        self.sums.append(output.loss_sum.item())
        return LossOutput(output.loss_sum * self.change(len(self.sums)), output.metrics)


def module_of(precision, objective=None, *, lr=1e-2, clip=1.0, dropout=0.0, companions=None, seen=None, **guard):
    settings = StepSettings(grad_clip=clip, seed=0, precision=PRECISIONS[precision], guard=GuardConfig(**guard))

    def make(model):
        optimizer = adamw(AdamWConfig(lr=lr), model)
        named = dict(model.named_parameters())
        if seen is not None:
            optimizer.register_step_pre_hook(
                lambda *_: seen.append({n: p.grad.clone() for n, p in named.items() if p.grad is not None})
            )
        return optimizer

    objective = objective or Spy()
    model = tiny_llama(VOCAB, layers=2, dropout=dropout, tied=False)
    if objective.scores:
        model.add_score_head()
        torch.nn.init.normal_(model.score.weight, generator=torch.Generator().manual_seed(0))
        model.head.requires_grad_(False)
    return ObjectiveModule(model, objective, make, lambda step: 1.0, settings, companions)


def rows_of(module, items):
    run_through(module, items)
    return list(module.rows())


def formats(module):
    states = {t.dtype for n, t in optimizer_tensors(module.optimizer).items() if not n.endswith(".step")}
    return {p.dtype for p in module.model.parameters()}, states


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "bf16_true"])
def test_what_is_kept_in_which_format(precision):
    """Weights, gradients and optimizer state in 32 bits; in 16 only for bf16_true, and there the loss is fp32 still."""
    seen, kept = [], torch.bfloat16 if precision == "bf16_true" else torch.float32
    objective = Spy()
    module = module_of(precision, objective, seen=seen)
    losses, products = [], set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
                products.add(out.dtype)
            return out

    plain = Spy.__call__
    objective.__class__ = type("Noting", (Spy,), {
        "__call__": lambda self, f, b: losses.append((out := plain(self, f, b)).loss_sum.dtype) or out
    })  # fmt: skip
    with Watch():
        rows_of(module, [item(0), item(1)])
    assert formats(module) == ({kept}, {kept})
    assert {g.dtype for step in seen for g in step.values()} == {kept}
    assert set(losses) == {torch.float32}
    compute = {"fp32": torch.float32, "fp16": torch.float16}.get(precision, torch.bfloat16)
    assert products == {compute}


@pytest.mark.parametrize("precision", ["bf16", "fp16", "bf16_true"])
def test_logprobs_and_scores_are_fp32(precision):
    module = module_of(precision, Reward(RewardConfig()))
    batch = item(0, ROWS)[0]
    with module.asking():
        assert sequence_logprobs(module.model, batch).dtype == torch.float32
        assert segment_scores(module.model, batch).dtype == torch.float32


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 2e-2), ("fp16", 4e-3), ("bf16_true", 4e-2)])
def test_losses_stay_near_those_of_fp32(precision, tolerance):
    """20 steps of AdamW at 1e-2 from a loss of 6: Precision.tolerance at every step; bf16_true loses small updates and
    has twice as much. And it is not fp32 in disguise."""
    exact = rows_of(module_of("fp32"), [item(i) for i in range(20)])
    rough = rows_of(module_of(precision), [item(i) for i in range(20)])
    off = [abs(a["train/loss"] - b["train/loss"]) for a, b in zip(exact, rough, strict=True)]
    assert 1e-6 < max(off) < tolerance * exact[0]["train/loss"]
    assert exact[0]["train/loss"] - exact[-1]["train/loss"] > 0.2  # it did learn


def test_bf16_true_says_that_small_updates_are_lost(main, pretraining, tmp_path):
    """Adam's first update is the learning rate: 1e-4 is lost on every weight of 0.1 and more, 1e-2 is not."""
    moved = {}
    for lr in (1e-4, 1e-2):
        module = module_of("bf16_true", lr=lr)
        start = copy.deepcopy(dict(module.model.named_parameters()))
        rows_of(module, [item(0)])
        large = [(p != start[n])[start[n].abs() > 0.1] for n, p in module.model.named_parameters()]
        moved[lr] = torch.cat(large).float().mean().item()
    assert moved[1e-4] == 0 and moved[1e-2] > 0.9
    run = main(*pretraining(tmp_path, "true", "precision=bf16_true", "trainer.max_steps=2"))
    assert run.code == 0, run.err
    assert "updates below about 1/256 of a weight are lost" in " ".join(run.out.split())


# ---- one cast a step


def casts_of(module, items):
    """How often each weight was cast to 16 bits, over all steps, by name."""
    by_storage = {p.data_ptr(): n for n, p in module.model.named_parameters()}
    found = {}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten._to_copy.default and args[0].data_ptr() in by_storage:
                name = by_storage[args[0].data_ptr()]
                if args[0].dtype == torch.float32 and (kwargs or {}).get("dtype") == torch.bfloat16:
                    found[name] = found.get(name, 0) + 1
            return function(*args, **(kwargs or {}))

    with Watch():
        rows_of(module, items)
    return found


def test_a_weight_is_cast_once_a_step_whatever_the_micro_batches():
    """3 steps of 4 micro-batches: 3 casts of every matrix of the blocks, 12 of the head (once for each micro-batch: it
    goes through a function of its own), none of what is in no matrix product."""
    casts = casts_of(module_of("bf16"), [item(i, 2) for i in range(3)])
    matrices = {n for n, p in module_of("bf16").model.named_parameters() if p.dim() == 2 and n.startswith("blocks")}
    assert casts == dict.fromkeys(matrices, 3) | {"head.weight": 12}


def gradients(precision, size, objective=None, cache=True, companions=None, batch=TokenBatch):
    seen = []
    module = module_of(precision, objective, clip=0.0, seen=seen, companions=companions)
    if not cache:
        module.autocast = lambda: torch.autocast("cpu", torch.bfloat16, cache_enabled=False)
    rows_of(module, [item(0, size, batch)])
    return seen[0]


def largest_difference(one, other):
    return max((one[n] - other[n]).abs().max().item() / max(one[n].abs().max().item(), 1e-3) for n in one)


OBJECTIVES = {
    "next token": (Spy(), TokenBatch),
    "preference": (Preference(PreferenceConfig()), PreferenceBatch),  # its log-probabilities are made twice
    "reward": (Reward(RewardConfig()), PreferenceBatch),
    "distill": (Distill(DistillConfig()), DistillBatch),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_several_backward_passes_through_one_cast_are_right(name):
    """The cast is shared over 1, 2, 4 and 8 micro-batches: bit for bit the gradients of a cast for every use, and over
    the splits they agree to bf16's rounding (each micro-batch's is rounded to 8 bits before it is added: 2 %)."""
    objective, batch = OBJECTIVES[name]
    companions = {n: tiny_llama(VOCAB, seed=2, layers=2, tied=False) for n in objective.companions}
    whole = gradients("bf16", ROWS, objective, companions=companions, batch=batch)
    for size in (8, 4, 2, 1):
        shared = gradients("bf16", size, objective, companions=companions, batch=batch)
        apart = gradients("bf16", size, objective, cache=False, companions=companions, batch=batch)
        assert all(torch.equal(shared[n], apart[n]) for n in whole), size
        assert largest_difference(whole, shared) < 2e-2
    exact = gradients("fp32", ROWS, objective, companions=companions, batch=batch)
    # a student's gradient is p - q, two rounded probabilities that nearly cancel
    assert 1e-5 < largest_difference(exact, whole) < (0.1 if name == "distill" else 0.05)


# ---- fp16


def test_gradients_with_and_without_scale_agree():
    """What the optimizer sees under fp16 at scales 1, 2^8 and 2^16 is what it sees in fp32: 1 % (11 bits, summed)."""
    exact = gradients("fp32", 2)
    for scale in (1.0, 2.0**8, 2.0**16):
        seen = []
        module = module_of("fp16", clip=0.0, seen=seen)
        module.loss_scale.scale = scale
        rows = rows_of(module, [item(0, 2)])
        assert rows[0]["loss_scale"] == scale and largest_difference(exact, seen[0]) < 1e-2
        norm = math.sqrt(sum((g.double() ** 2).sum().item() for g in exact.values()))
        assert rows[0]["grad_norm"] == pytest.approx(norm, rel=1e-2)


def test_clipping_knows_the_scale():
    """clip 0.01, far below the norm: the optimizer sees gradients of norm 0.01, at any scale."""
    for scale in (1.0, 2.0**12):
        seen = []
        module = module_of("fp16", clip=0.01, seen=seen)
        module.loss_scale.scale = scale
        assert rows_of(module, [item(0)])[0]["grad_norm"] > 0.1
        norm = math.sqrt(sum((g.double() ** 2).sum().item() for g in seen[0].values()))
        assert norm == pytest.approx(0.01, rel=1e-3)


def test_an_overflow_makes_the_same_step_again():
    """Scale 2^40 overflows; halved until it fits, with the same data and the same dropout: losses of every try are
    equal bit for bit, no step is lost or counted twice, and the rest equals a run that began with the fitting scale.
    """
    objective = Spy()
    module = module_of("fp16", objective, dropout=0.3)
    module.loss_scale.scale = 2.0**40
    rows = rows_of(module, [item(i) for i in range(3)])
    fitting = rows[0]["loss_scale"]
    tries = 40 - int(math.log2(fitting)) + 1
    losses = [tuple(objective.sums[i : i + 2]) for i in range(0, len(objective.sums), 2)]  # two micro-batches a step
    assert tries > 5 and len(set(losses[:tries])) == 1 and losses[tries] != losses[0]
    assert [r["step"] for r in rows] == [1, 2, 3] and not any("skipped" in r for r in rows)
    assert rows[-1]["tokens"] == 3 * ROWS * LENGTH
    other = module_of("fp16", Spy(), dropout=0.3)
    other.loss_scale.scale = fitting
    assert [r["train/loss"] for r in rows_of(other, [item(i) for i in range(3)])] == [r["train/loss"] for r in rows]
    assert all(torch.equal(p, q) for p, q in zip(module.model.parameters(), other.model.parameters(), strict=True))


def test_one_large_gradient_halves_the_scale_and_is_taken():
    """The second of three steps has a loss 2^10 times too large: it overflows at 2^16, is made again, and is taken."""
    module = module_of("fp16", Spy(lambda number: 2.0**10 if module.step == 1 else 1.0))
    rows = rows_of(module, [item(i) for i in range(3)])
    scales = [r["loss_scale"] for r in rows]
    assert scales[0] == 2.0**16 and scales[1] < 2.0**16 and scales[2] == scales[1]
    assert [r["step"] for r in rows] == [1, 2, 3] and not any("skipped" in r for r in rows)
    steps = [t.item() for name, t in optimizer_tensors(module.optimizer).items() if name.endswith(".step")]
    assert steps == [3] * len(list(module.model.parameters()))


def test_the_scale_grows_between_steps(monkeypatch):
    """Growth after 2 good steps: 1, 1, 2, 2, 4. A step is divided by the scale it was multiplied with.

    The story: the scale doubled between the backward pass and the division, and every 2,000th gradient was halved.
    """
    monkeypatch.setattr(LossScale, "GROWTH_STEPS", 2)
    seen, plain = [], []
    module, still = module_of("fp16", clip=0.0, lr=1e-3, seen=seen), module_of("fp16", clip=0.0, lr=1e-3, seen=plain)
    module.loss_scale.scale = still.loss_scale.scale = 1.0
    still.loss_scale.begin = lambda: None
    items = [item(i) for i in range(5)]
    assert [r["loss_scale"] for r in rows_of(module, items)] == [1, 1, 2, 2, 4]
    assert [r["loss_scale"] for r in rows_of(still, items)] == [1] * 5
    for one, other in zip(seen, plain, strict=True):
        assert largest_difference(one, other) < 1e-2


def test_the_default_growth_is_every_2000_steps():
    scale = LossScale()
    for _ in range(2000):
        scale.begin()
        assert not scale.overflowed(torch.tensor(1.0), torch.tensor(1.0))
    assert scale.scale == 2.0**16
    scale.begin()
    assert scale.scale == 2.0**17


@pytest.mark.parametrize("place", ["loss", "gradient"])
def test_a_true_nan_under_fp16_is_the_guards(place):
    """In the loss, or in a gradient only, where it looks like an overflow until the scale is 1. The step is skipped as
    in any other format; the scale is what it was, and the next step is taken with it."""

    class Bad(Spy):
        def __call__(self, forward, batch):
            output = super().__call__(forward, batch)
            if module.step != 1:
                return output
            if place == "loss":
                return LossOutput(output.loss_sum * math.nan, output.metrics)
            zero = output.loss_sum * 0
            zero.register_hook(lambda gradient: gradient * math.nan)
            return LossOutput(output.loss_sum + zero, output.metrics)

    module = module_of("fp16", Bad(), policy="skip")
    rows = rows_of(module, [item(i) for i in range(3)])
    assert ["skipped" in r for r in rows] == [False, True, False]
    assert [r["loss_scale"] for r in rows] == [2.0**16] * 3
    module = module_of("fp16", Bad(), policy="stop")
    with pytest.raises(TrainingError, match="step 2: loss .*The step was not taken.*set precision=fp32"):
        rows_of(module, [item(i) for i in range(3)])


class Items(Steps):
    def __getitem__(self, step):
        return item(step)

    def sample_id(self, step):
        return f"item {step}"


def test_the_scale_is_saved_and_restored(monkeypatch, tmp_path):
    """8 steps, growth every 3; stopped after 4 (one good step into the second count) and continued: the same curve."""
    monkeypatch.setattr(LossScale, "GROWTH_STEPS", 3)
    tokenizer = train_bpe(BPEConfig(vocab_size=300), ["the river"])

    def job(name, steps):
        module = module_of("fp16", dropout=0.2)
        module.loss_scale.scale = min(module.loss_scale.scale, 4.0)
        return tiny_job(tmp_path / name, tokenizer, module, Items(), max_steps=steps, every_steps=4)

    whole = job("whole", 8)
    fit(whole)
    fit(job("parts", 4))
    rest = job("parts", 8)
    assert fit(rest).resumed_from == 4
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")
    assert rest.module.loss_scale.state() == whole.module.loss_scale.state() == {"scale": 16.0, "good_steps": 2}
