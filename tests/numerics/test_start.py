"""Every objective with companions or samples through the real module: its first step, and its steps cut anew.

Where policy and reference are one model, each loss has a value that is known exactly, whatever the data. And how a step
is cut into micro-batches, or packed into rows, never changes what is learned.
"""

import copy
import math

import numpy as np
import pytest
import torch
from helpers import run_through, tiny_llama

from trivium.data.chat import Encoded
from trivium.data.collate import collate
from trivium.data.packing import table_of
from trivium.errors import TrainingError
from trivium.objectives.config import DistillConfig, GRPOConfig, PreferenceConfig, RewardConfig, UnpairedConfig
from trivium.objectives.distill import Distill
from trivium.objectives.policy_gradient import GRPO
from trivium.objectives.preference import Preference
from trivium.objectives.reward import Reward
from trivium.objectives.unpaired import KTO
from trivium.training.config import AdamWConfig
from trivium.training.objective_module import ObjectiveModule, StepSettings
from trivium.training.optim import adamw
from trivium.training.precision import PRECISIONS
from trivium.types import RolloutBatch

VOCAB, PAD, UNITS = 61, 0, 12
PACKED = [[0, 1], [2], [3, 4], [5], [6, 7], [8], [9, 10], [11]]
"""8 rows of one or two units; a unit is two documents that share a row."""
SPLITS = [8, 4, 2, 1]  # rows a micro-batch: 1x8, 2x4, 4x2, 8x1
COLUMN = "reference"


def small_llama(seed=3, dtype=torch.float64, dropout=0.0, scores=False):
    model = tiny_llama(VOCAB, seed, dim=8, ffn_dim=12, context=32, init_std=0.4, dropout=dropout, tied=False)
    if scores:
        model.add_score_head()
    return model.to(dtype)


def documents(seed, longest=7):
    """12 units of two documents: a prompt of 1 to 4 tokens that both share, answers of 1 to `longest`."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    found = []
    for _ in range(UNITS):
        prompt = torch.randint(1, VOCAB, (draw(1, 4),), generator=generator).tolist()
        for _ in range(2):
            ids = prompt + torch.randint(1, VOCAB, (draw(1, longest),), generator=generator).tolist()
            found.append(Encoded(ids, [i >= len(prompt) for i in range(len(ids))]))
    return found


def rows_of(units):
    return [[2 * u + side for u in row for side in (0, 1)] for row in units]


def cut(objective, docs, rows, size, **columns):
    """Rows of documents as micro-batches of `size` rows, with the columns that the objective's batches have."""
    generator = np.random.default_rng(len(docs[0].ids))
    known = {
        "desirable": np.repeat(generator.integers(0, 2, UNITS), 2).astype(np.float32),
        "advantage": generator.normal(size=2 * UNITS).astype(np.float32),
        **columns,
    }
    held = {k: v for k, v in known.items() if k in objective.batch.__dataclass_fields__}
    table = table_of(docs, [""] * len(docs), columns=held)
    longest = max(sum(len(docs[d].ids) for d in row) for row in rows)
    facts = {"max_tokens": 8, "temperature": 0.9} if objective.batch is RolloutBatch else {}
    return [
        collate(table, rows[i : i + size], longest + 1, PAD, objective.batch, **facts)
        for i in range(0, len(rows), size)
    ]


def fit(model, objective, steps, make_optimizer=None, companion=None, precision="fp32", equal=False, clip=0.0):
    """Run `steps` through Lightning; returns the module."""
    companions = {name: companion for name in objective.companions} if companion is not None else {}
    settings = StepSettings(grad_clip=clip, seed=0, precision=PRECISIONS[precision], starts_equal=equal)
    make = make_optimizer or (lambda m: torch.optim.SGD(m.parameters(), lr=0.0))
    module = ObjectiveModule(model, objective, make, lambda step: 1.0, settings, companions)
    run_through(module, steps)
    assert len(list(module.rows())) == len(steps)
    return module


# ---- step 0


STARTS = {
    "sigmoid": (Preference(PreferenceConfig()), {"loss": 0.693147, "reward/margin": 0.0, "reward/chosen": 0.0}),
    "cdpo": (Preference(PreferenceConfig(label_smoothing=0.2)), {"loss": 0.693147}),
    "robust": (Preference(PreferenceConfig(loss="robust", label_smoothing=0.2)), {"loss": 0.693147}),
    "hinge": (Preference(PreferenceConfig(loss="hinge")), {"loss": 1.0}),
    "ipo": (Preference(PreferenceConfig(loss="ipo")), {"loss": 25.0}),
    "with sft": (Preference(PreferenceConfig(sft_weight=0.5)), {"reward/margin": 0.0}),
    "kto": (KTO(UnpairedConfig()), {"loss": 0.5, "kl": 0.0, "reward/mean": 0.0}),
    "kto weighted": (KTO(UnpairedConfig(desirable_weight=2.0)), {"kl": 0.0}),
    "reward": (Reward(RewardConfig()), {"loss": 0.693147, "reward/chosen": 0.0}),
    "reward margin": (Reward(RewardConfig(margin=1.0, centering=0.1)), {"loss": 1.313262}),  # ln(1 + e)
    "grpo": (GRPO(GRPOConfig()), {"ratio": 1.0, "kl": 0.0, "clipped": 0.0}),
    "gspo": (GRPO(GRPOConfig(ratio="sequence", kl="k3")), {"ratio": 1.0, "kl": 0.0}),
    "distill": (Distill(DistillConfig()), {"loss": 0.0, "divergence": 0.0}),
    "reverse": (Distill(DistillConfig(beta=1.0, temperature=2.0)), {"loss": 0.0}),
    "jsd": (Distill(DistillConfig(beta=0.3, ce_weight=0.5)), {"divergence": 0.0}),
}


def precomputed(objective, docs, model, autocast):
    """The reference's values as a cache would have them: asked one unit a row, kept in fp32."""
    if COLUMN not in objective.companions or objective.batch is RolloutBatch:
        return {}
    batches = cut(objective, docs, rows_of([[u] for u in range(UNITS)]), 5)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast is not None):
        for batch in batches:
            objective.consult(batch, {COLUMN: model.eval()})
    return {COLUMN: torch.cat([b.reference for b in batches]).flatten().float().numpy()}


@pytest.mark.parametrize("name", STARTS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_figures_at_the_start_are_exact(name, precision):
    """Packed rows, dropout in the config, more than one chunk of 256 tokens, a reference asked in other rows.

    fp32: 1e-5, rounding of sums of up to 24 log-probabilities times beta (IPO: times 10, on means). bf16: 2e-2 as in
    START_TOLERANCE; products are rounded to 8 bits, a log-probability of 5 by about 1e-2, and they are summed.
    """
    objective, expected = STARTS[name]
    autocast = PRECISIONS[precision].autocast
    tolerance = 2e-2 if autocast else 1e-5
    docs = documents(0, longest=24)
    model = small_llama(dtype=torch.float32, dropout=0.3, scores=objective.scores)
    column = precomputed(objective, docs, model, autocast)
    step = cut(objective, docs, rows_of(PACKED), 8, **column)
    assert (step[0].labels != -100).sum() > 256
    module = fit(model, objective, [step], companion=copy.deepcopy(model), precision=precision, equal=True)
    assert module.step == 1  # check_start agreed
    step = cut(objective, docs, rows_of(PACKED), 8, **column)
    found = {"loss": module.validation_loss(step)}
    module.consult(step)
    with module.asking():
        found |= {k: (m.total / m.count).item() for k, m in objective(model, step[0]).metrics.items()}
    for figure, value in expected.items():
        assert found[figure] == pytest.approx(value, abs=tolerance * max(1.0, value)), figure


def test_policy_gradient_pulls_from_the_start_and_distillation_does_not():
    """Ratio 1 and KL 0 are no standstill: the gradient of the ratio is that of log pi. Equal distributions are."""
    norms = {}
    for name in ("grpo", "gspo", "distill", "reverse"):
        objective, model = STARTS[name][0], small_llama()
        step = cut(objective, documents(0), rows_of(PACKED), 8)
        norms[name] = fit(model, objective, [step], companion=copy.deepcopy(model), equal=True).last["grad_norm"]
    assert norms["grpo"] > 0.01 and norms["gspo"] > 0.01
    assert norms["distill"] < 1e-12 and norms["reverse"] < 1e-12


def refused(objective, step, model, companion, precision="fp32"):
    with pytest.raises(TrainingError, match="step 0: .* must be .* while the model equals its") as error:
        fit(model, objective, [step], companion=companion, precision=precision, equal=True)
    return str(error.value)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", [n for n in STARTS if "reward" not in n])
def test_another_reference_is_refused(name, precision):
    objective = STARTS[name][0]
    step = cut(objective, documents(0), rows_of(PACKED), 4)
    refused(objective, step, small_llama(dtype=torch.float32), small_llama(seed=4, dtype=torch.float32), precision)


def test_a_reference_that_is_nearly_right_is_refused_too():
    """The reference one step of training behind (weights changed by 1 %), fp32."""
    model = small_llama(dtype=torch.float32)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p += 0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    for name in ("sigmoid", "ipo", "kto", "grpo", "distill"):
        objective = STARTS[name][0]
        refused(objective, cut(objective, documents(0), rows_of(PACKED), 4), copy.deepcopy(model), other)


@pytest.mark.parametrize("name", ["sigmoid", "cdpo", "robust", "hinge", "ipo", "kto"])
@pytest.mark.parametrize("shift", [1, 2])
def test_a_reference_attached_to_the_wrong_rows_is_refused(name, shift):
    """Values moved on by one document, or by one unit."""
    objective, docs, model = STARTS[name][0], documents(0), small_llama(dtype=torch.float32)
    right = precomputed(objective, docs, model, None)
    fit(copy.deepcopy(model), objective, [cut(objective, docs, rows_of(PACKED), 4, **right)], equal=True)
    wrong = {COLUMN: np.roll(right[COLUMN], shift)}
    refused(objective, cut(objective, docs, rows_of(PACKED), 4, **wrong), model, None)


@pytest.mark.parametrize(
    "name", ["sigmoid", "cdpo", "robust", "hinge", "ipo", "with sft", "kto", "kto weighted", "grpo", "gspo"]
)
def test_a_mask_with_prompt_tokens_that_the_reference_left_out_is_refused(name):
    """Both answers of a pair have one prompt, so its share cancels in D; it does not in the chosen answer's reward."""
    objective, docs, model = STARTS[name][0], documents(0), small_llama(dtype=torch.float32)
    step = cut(objective, docs, rows_of(PACKED), 4, **precomputed(objective, docs, model, None))
    for batch in step:
        if objective.batch is RolloutBatch:
            with torch.no_grad():
                objective.consult(batch, {"policy": model.eval(), COLUMN: model})
        first = batch.positions == 0
        batch.labels = torch.where((batch.segments > 0) & ~first, batch.tokens, -100)
    refused(objective, step, model, copy.deepcopy(model))


def test_a_score_head_that_is_not_new_is_refused():
    model = small_llama(scores=True)
    torch.nn.init.ones_(model.score.weight)
    objective = STARTS["reward"][0]
    step = cut(objective, documents(0), rows_of(PACKED), 4)
    assert "equals its start" in refused(objective, step, model, None)


def test_later_starts_are_not_checked():
    """A resumed run, and one whose reference is another model by choice: any value is right there."""
    objective = STARTS["sigmoid"][0]
    step = cut(objective, documents(0), rows_of(PACKED), 4)
    assert fit(small_llama(), objective, [step], companion=small_llama(seed=4)).step == 1


def test_tolerances_are_set_for_every_precision():
    assert {name: p.tolerance for name, p in PRECISIONS.items()} == {
        "fp32": 1e-4, "bf16": 2e-2, "bf16_true": 2e-2, "fp16": 4e-3,
    }  # fmt: skip


# ---- one division a step


OBJECTIVES = {
    "sigmoid": Preference(PreferenceConfig(beta=0.5, label_smoothing=0.1, sft_weight=0.3)),
    "ipo": Preference(PreferenceConfig(loss="ipo", beta=0.5)),
    "kto": KTO(UnpairedConfig(beta=0.5, desirable_weight=1.5)),
    "reward": Reward(RewardConfig(margin=0.5, centering=0.1)),
    "grpo": GRPO(GRPOConfig()),
    "gspo": GRPO(GRPOConfig(ratio="sequence", aggregate="seq_mean_token_mean", kl="k3")),
    "dr grpo": GRPO(GRPOConfig(aggregate="constant", kl_weight=0.0)),
    "token sums": GRPO(GRPOConfig(aggregate="seq_mean_token_sum", kl="k3+")),
    "distill": Distill(DistillConfig(beta=0.3, temperature=2.0, ce_weight=0.25)),
}


def known(objective, step, dtype=torch.float64):
    """Old log-probabilities of samples are of an older policy, so that ratios are not 1 (here 0.75 to 2, 9 % clipped).

    Not much older: log-probabilities of -4 to -8 are rounded to 2.4e-7 in fp32, so a ratio, the exponential of their
    difference, is known to about 1e-6 of itself and no better. Where one token of a ratio above 5 made up nearly the
    whole gradient, another layout of the rows moved it by 1.2e-6 of itself, with nothing wrong.
    """
    if objective.batch is RolloutBatch:
        older, reference = small_llama(seed=5, dtype=dtype), small_llama(seed=4, dtype=dtype)
        with torch.no_grad():
            for p, q in zip(older.parameters(), small_llama(dtype=dtype).parameters(), strict=True):
                p.lerp_(q, 0.97)
            for batch in step:
                objective.consult(batch, {"policy": older, "reference": reference})
    return step


def gradients_of_one_step(objective, rows, size, dtype=torch.float32):
    """The gradients that the optimizer sees, and the figures that are shown."""
    found = {}

    def make(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        named = [(n, p) for n, p in model.named_parameters()]
        optimizer.register_step_pre_hook(
            lambda *_: found.update({n: p.grad.clone() for n, p in named if p.grad is not None})
        )
        return optimizer

    step = known(objective, cut(objective, documents(0), rows, size), dtype)
    model = small_llama(dtype=dtype, scores=objective.scores)
    if model.score is not None:
        torch.nn.init.ones_(model.score.weight)
    module = fit(model, objective, [step], make, companion=small_llama(seed=4, dtype=dtype))
    shown = {k: v for k, v in module.last.items() if k.startswith("train/")}
    return found, shown


def largest_difference(one, other):
    assert one.keys() == other.keys()
    return max((one[n] - other[n]).abs().max().item() for n in one)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-13)], ids=["fp32", "fp64"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradients_agree_over_micro_batch_splits_and_layouts(name, dtype, tolerance):
    """fp32, gradients of order 0.1: 1e-6 is the rounding of sums in another order. The figures agree as well. In fp64
    1e-13: what is left in fp32 is rounding and nothing else.

    Layouts: packed rows of one or two units; one unit a row; for samples and distillation one document a row.
    """
    objective = OBJECTIVES[name]
    whole, shown = gradients_of_one_step(objective, rows_of(PACKED), 8, dtype)
    scale = max(g.abs().max().item() for g in whole.values())
    assert scale > 0.01
    others = [(rows_of(PACKED), size) for size in SPLITS[1:]] + [(rows_of([[u] for u in range(UNITS)]), 5)]
    if objective.batch is RolloutBatch or isinstance(objective, Distill):
        others.append(([[d] for d in range(2 * UNITS)], 7))
    for rows, size in others:
        split, split_shown = gradients_of_one_step(objective, rows, size, dtype)
        assert largest_difference(whole, split) < tolerance * max(1.0, scale)
        assert split_shown == {k: pytest.approx(v, rel=1e-5, abs=1e-6) for k, v in shown.items()}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_mean_of_means_would_show(name):
    """Divided for each micro-batch by its own count: more than 1,000 times the tolerance away from the right one."""
    objective = OBJECTIVES[name]
    whole, _ = gradients_of_one_step(objective, rows_of(PACKED), 8)
    model = small_llama(dtype=torch.float32, scores=objective.scores)
    if model.score is not None:
        torch.nn.init.ones_(model.score.weight)
    reference = small_llama(seed=4, dtype=torch.float32)
    step = known(objective, cut(objective, documents(0), rows_of(PACKED), 1), torch.float32)
    for batch in step:
        with torch.no_grad():
            objective.consult(batch, {n: reference for n in objective.companions})
            objective.prepare(model, [batch], lambda x: x)
        (objective(model, batch).loss_sum / objective.count(batch) / len(step)).backward()
    wrong = {n: p.grad for n, p in model.named_parameters() if n in whole}
    assert largest_difference(whole, wrong) > 1e-3


CUTS = {"kto": [8, 4, 1], "sigmoid": [8, 2], "reward": [8, 1], "grpo": [8, 4], "gspo": [8, 1], "distill": [8, 2]}
"""Rows a micro-batch: every split is in it for some objective; the gradients above are of every split for each."""


@pytest.mark.parametrize("name", CUTS)
def test_parameters_agree_over_splits_after_30_steps_in_fp64(name):
    """AdamW with clipping, ten rounds over three steps: whatever differed would grow. 1e-11 is fp64's rounding."""
    objective = OBJECTIVES[name]
    docs = [documents(seed) for seed in range(3)]
    start = small_llama(scores=objective.scores)
    ended = {}
    for size in CUTS[name]:
        steps = [known(objective, cut(objective, d, rows_of(PACKED), size)) for d in docs]
        module = fit(
            copy.deepcopy(start), objective, steps * 10, lambda m: adamw(AdamWConfig(lr=1e-2), m),
            companion=small_llama(seed=4), clip=0.5,
        )  # fmt: skip
        assert module.step == 30
        ended[size] = {n: p.detach() for n, p in module.model.named_parameters()}
    assert largest_difference(ended[8], {n: p.detach() for n, p in start.named_parameters()}) > 0.05  # it did move
    for size in CUTS[name][1:]:
        assert largest_difference(ended[8], ended[size]) < 1e-11


def test_baseline_of_kto_is_that_of_the_whole_step():
    """Every micro-batch is told one z0; those of its own rows alone differ by more than a nat."""
    objective, seen = OBJECTIVES["kto"], []

    class Watched(KTO):
        def __call__(self, forward, batch):
            seen.append(batch.baseline.item())
            return super().__call__(forward, batch)

    step = cut(objective, documents(0), rows_of(PACKED), 1)
    fit(small_llama(), Watched(objective.config), [step], companion=small_llama(seed=4))
    assert len(seen) == 8 and len(set(seen)) == 1
    own = []
    for batch in cut(objective, documents(0), rows_of(PACKED), 1):
        with torch.no_grad():
            objective.consult(batch, {COLUMN: small_llama(seed=4)})
            objective.prepare(small_llama(), [batch], lambda x: x)
        own.append(batch.baseline.item())
    assert max(own) - min(own) > 1
    assert math.isfinite(seen[0])
