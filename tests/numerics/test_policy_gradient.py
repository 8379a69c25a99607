"""GRPO: clipping by hand, aggregates by hand, and the whole loss against a loop over samples in fp64."""

import itertools

import numpy as np
import pytest
import torch
from helpers import dense_logprobs, tiny_llama
from torch import nn

from trivium.data.chat import Encoded
from trivium.data.collate import collate
from trivium.data.packing import table_of
from trivium.objectives.config import GRPOConfig
from trivium.objectives.logprobs import spread, target_logprobs
from trivium.objectives.policy_gradient import GRPO, clipped_loss
from trivium.types import IGNORE, RolloutBatch

VOCAB, PAD = 43, 0
AGGREGATES = ["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "constant"]
ADVANTAGES = [0.75, -1.125, 0.0, 1.5, -0.375]  # exact in fp32
COMPLETIONS = [3, 1, 5, 2, 4]
TEMPERATURE, MAX_TOKENS = 0.8, 5


# ---- clipping


@pytest.mark.parametrize(
    ("ratio", "advantage", "dual", "loss", "slope"),
    [
        # low 0.2, high 0.3; slope is d loss / d log ratio: -ratio * A where not clipped
        (0.5, 1.0, 0.0, -0.5, -0.5),  # a good sample made rarer: always pulled back
        (1.5, 1.0, 0.0, -1.3, 0.0),  # a good one made likelier: enough
        (0.5, -1.0, 0.0, 0.8, 0.0),  # a bad one made rarer: enough
        (1.5, -1.0, 0.0, 1.5, 1.5),  # a bad one made likelier: always pushed back
        (1.1, 2.0, 0.0, -2.2, -2.2),
        (0.9, -2.0, 0.0, 1.8, 1.8),
        (5.0, -2.0, 3.0, 6.0, 0.0),  # dual clip: at most 3 |A|
        (2.0, -2.0, 3.0, 4.0, 4.0),  # below it: as before
        (5.0, 2.0, 3.0, -2.6, 0.0),  # for bad samples only
        (0.5, 2.0, 3.0, -1.0, -1.0),
        (5.0, -2.0, 0.0, 10.0, 10.0),
        (1.0, 0.0, 3.0, 0.0, 0.0),
    ],
)
def test_clipping_by_sign_of_the_advantage(ratio, advantage, dual, loss, slope):
    log_ratio = torch.tensor([ratio], dtype=torch.float64).log().requires_grad_()
    found = clipped_loss(log_ratio, torch.tensor([advantage], dtype=torch.float64), 0.2, 0.3, dual)
    found.sum().backward()
    assert found.item() == pytest.approx(loss, abs=1e-12)
    assert log_ratio.grad.item() == pytest.approx(slope, abs=1e-12)


# ---- aggregates


class Coin(nn.Module):
    """Whatever came before, token 1 and token 2 have probability 1/2 each."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding.from_pretrained(torch.zeros(3, 1), freeze=False)
        self.head = nn.Linear(1, 3)
        with torch.no_grad():
            self.head.bias.copy_(torch.tensor([-1e9, 0.0, 0.0]))

    def forward(self, tokens, positions=None, segments=None):
        return self.embed(tokens)


def packed(documents, rows, length, **columns):
    """[(prompt tokens, completion ids)] -> a RolloutBatch."""
    encoded = [Encoded([1] * p + ids, [False] * p + [True] * len(ids)) for p, ids in documents]
    table = table_of(encoded, [""] * len(encoded), columns={k: np.array(v, np.float32) for k, v in columns.items()})
    return collate(table, rows, length, PAD, RolloutBatch, max_tokens=4)


@pytest.mark.parametrize(
    ("aggregate", "count", "loss"),
    [
        ("token_mean", 4, 0.5),  # (-1 + 3 * 1) / 4 tokens
        ("seq_mean_token_mean", 2, 0.0),  # (-1 + 1) / 2 samples
        ("seq_mean_token_sum", 2, 1.0),  # (-1 + 3) / 2 samples
        ("constant", 8, 0.25),  # (-1 + 3) / (2 samples * 4 tokens at most)
    ],
)
def test_aggregates_of_a_short_good_and_a_long_bad_answer(aggregate, count, loss):
    """One token with A = 1 and three with A = -1, at ratio 1: -A each."""
    batch = packed([(2, [1]), (1, [2, 1, 2])], [[0, 1]], 9, advantage=[1.0, -1.0])
    objective = GRPO(GRPOConfig(aggregate=aggregate, kl_weight=0.0))
    objective.consult(batch, {"policy": Coin()})
    assert objective.count(batch).item() == count
    assert objective(Coin(), batch).loss_sum.item() / count == pytest.approx(loss, abs=1e-6)


def test_token_mean_is_over_the_step_and_not_over_samples_or_micro_batches():
    """The same two answers in micro-batches of their own: (-1 + 3) / (1 + 3) = 0.5.

    A mean for each micro-batch and then over them would be (-1 + 1) / 2 = 0.
    """
    objective = GRPO(GRPOConfig(kl_weight=0.0))
    total = count = 0
    for document, advantage in (((2, [1]), 1.0), ((1, [2, 1, 2]), -1.0)):
        batch = packed([document], [[0]], 4, advantage=[advantage])
        objective.consult(batch, {"policy": Coin()})
        total += objective(Coin(), batch).loss_sum.item()
        count += objective.count(batch).item()
    assert (total, count) == (pytest.approx(2.0, abs=1e-6), 4)


def test_kl_penalty_by_hand():
    """ln(1/2) for the policy, ln(1/4) for the reference: k1 = ln 2 for each of two tokens, k2 = 0.240227.

    At A = 0 the loss is the penalty alone: 2 * 0.5 * 0.240227; the figure is k3 = 1/2 - 1 + ln 2 = 0.193147 a token.
    """
    batch = packed([(1, [1, 2])], [[0]], 3, advantage=[0.0])
    objective = GRPO(GRPOConfig(kl_weight=0.5))
    objective.consult(batch, {"policy": Coin()})
    batch.reference = torch.where(batch.labels != IGNORE, torch.tensor(0.25).log(), 0.0)
    output = objective(Coin(), batch)
    assert output.loss_sum.item() == pytest.approx(0.240227, abs=1e-6)
    assert (output.metrics["kl"].total / output.metrics["kl"].count).item() == pytest.approx(0.193147, abs=1e-6)


# ---- the whole loss


def small_llama(seed):
    return tiny_llama(VOCAB, seed, torch.float64, init_std=0.4)


def samples():
    """Five answers of 1 to 5 tokens to prompts of 2 to 4."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for p, c in zip([2, 4, 3, 2, 4], COMPLETIONS, strict=True):
        ids = torch.randint(1, VOCAB, (p + c,), generator=generator).tolist()
        found.append(Encoded(ids, [i >= p for i in range(p + c)]))
    return found


ROWS = [[2, 1], [0, 3], [4]]


def batch_of(rows=ROWS, length=18):
    columns = {"advantage": np.array(ADVANTAGES, np.float32)}
    return collate(
        table_of(samples(), [""] * 5, columns=columns), rows, length, PAD, RolloutBatch,
        temperature=TEMPERATURE, max_tokens=MAX_TOKENS,
    )  # fmt: skip


def dense_logps(model, document):
    return dense_logprobs(model, document, TEMPERATURE)


def dense_loss(policy, older, reference, c):
    """The loss of GRPO as it is written in the papers, one sample after another."""
    terms, lengths = [], []
    for document, a in zip(samples(), torch.tensor(ADVANTAGES).double(), strict=True):
        logp = dense_logps(policy, document)
        with torch.no_grad():
            old, ref = dense_logps(older, document), dense_logps(reference, document)
        ratio = (logp - old).exp()
        if c.ratio == "sequence":
            ratio = (logp - old).mean().exp().expand(len(logp))
        loss = torch.maximum(-a * ratio, -a * torch.clip(ratio, 1 - c.clip_low, 1 + c.clip_high))
        if c.dual_clip and a < 0:
            loss = torch.minimum(loss, c.dual_clip * a.abs())
        gap = logp - ref
        penalty = gap**2 / 2 if c.kl in ("k2", "k3+") else (-gap).exp() - 1 + gap
        terms.append(loss + c.kl_weight * penalty)
        lengths.append(len(logp))
    sums = torch.stack([t.sum() for t in terms])
    return {
        "token_mean": sums.sum() / sum(lengths),
        "seq_mean_token_mean": (sums / torch.tensor(lengths)).mean(),
        "seq_mean_token_sum": sums.mean(),
        "constant": sums.sum() / (5 * MAX_TOKENS),
    }[c.aggregate]


CASES = [
    *(GRPOConfig(aggregate=a, ratio=r, clip_high=0.3) for a, r in itertools.product(AGGREGATES, ("token", "sequence"))),
    GRPOConfig(kl="k3", kl_weight=0.4),
    GRPOConfig(kl_weight=0.0),
    GRPOConfig(dual_clip=1.5, clip_low=0.1, clip_high=0.15),
    GRPOConfig(dual_clip=1.05, ratio="sequence", aggregate="seq_mean_token_mean"),
]


def gradients(model):
    found = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    return found


@pytest.mark.parametrize("config", CASES, ids=lambda c: f"{c.aggregate}-{c.ratio}-{c.kl}-{c.kl_weight}-{c.dual_clip}")
def test_packed_loss_and_gradients_equal_a_loop_over_samples(config):
    """fp64: 1e-10 is far above rounding and far below any other formula. Packed with padding; one document a row too.

    The policy is far enough from its older self that some ratios are clipped on both sides.
    """
    policy, older, reference = small_llama(1), small_llama(1), small_llama(2)
    with torch.no_grad():
        for p in older.parameters():
            p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()), dtype=p.dtype)
    expected = dense_loss(policy, older, reference, config)
    expected.backward()
    wanted = gradients(policy)
    objective = GRPO(config)
    for batch in (batch_of(), batch_of([[d] for d in range(5)], 8)):
        with torch.no_grad():
            objective.consult(batch, {"policy": older, "reference": reference})
        output = objective(policy, batch)
        loss = output.loss_sum / objective.count(batch)
        loss.backward()
        torch.testing.assert_close(loss, expected, rtol=0, atol=1e-10)
        torch.testing.assert_close(gradients(policy), wanted, rtol=0, atol=1e-10)
        if config.ratio == "token" and config.clip_low == 0.2:
            clipped = (output.metrics["clipped"].total / output.metrics["clipped"].count).item()
            assert 0.1 < clipped < 0.9


def test_k3_plus_has_the_value_of_k3_and_the_gradient_of_k2():
    policy, reference = small_llama(1), small_llama(2)
    found = {}
    for kind in ("k2", "k3", "k3+"):
        objective, batch = GRPO(GRPOConfig(kl=kind, kl_weight=1.0)), batch_of()
        with torch.no_grad():
            objective.consult(batch, {"policy": policy, "reference": reference})
        loss = objective(policy, batch).loss_sum
        loss.backward()
        found[kind] = (loss.detach(), gradients(policy))
    torch.testing.assert_close(found["k3+"][0], found["k3"][0], rtol=0, atol=1e-10)
    torch.testing.assert_close(found["k3+"][1], found["k2"][1], rtol=0, atol=1e-10)
    assert (found["k2"][1] - found["k3"][1]).abs().max() > 1e-2
    assert (found["k2"][0] - found["k3"][0]).abs() > 1e-2


def test_figures_are_those_of_the_loop():
    """ratio and k3 averaged over the 15 tokens; entropy is the mean of -log pi."""
    policy, older, reference = small_llama(1), small_llama(3), small_llama(2)
    objective, batch = GRPO(GRPOConfig()), batch_of()
    with torch.no_grad():
        objective.consult(batch, {"policy": older, "reference": reference})
        logp, old, ref = (torch.cat([dense_logps(m, d) for d in samples()]) for m in (policy, older, reference))
        found = {k: (m.total / m.count).item() for k, m in objective(policy, batch).metrics.items()}
    ratio = (logp - old).exp()
    expected = {
        "ratio": ratio.mean().item(),
        "clipped": ((ratio < 0.8) | (ratio > 1.2)).double().mean().item(),
        "entropy": -logp.mean().item(),
        "kl": ((ref - logp).exp() - 1 - (ref - logp)).mean().item(),
    }
    assert found == {k: pytest.approx(v, rel=1e-6) for k, v in expected.items()}


def test_old_logprobs_are_aligned_with_the_tokens_and_hold_no_gradient():
    policy, batch = small_llama(1), batch_of()
    with torch.no_grad():
        GRPO(GRPOConfig(kl_weight=0.0)).consult(batch, {"policy": policy})
    assert not batch.old.requires_grad and batch.reference is None
    for row, documents in enumerate(ROWS):
        start = 0
        for document in (samples()[d] for d in documents):
            here = slice(start, start + len(document.ids))
            logps = dense_logps(policy, document).detach()
            assert not batch.old[row, here][: -len(logps)].any()
            torch.testing.assert_close(batch.old[row, here][-len(logps) :], logps, rtol=0, atol=1e-10)
            start += len(document.ids)
        assert not batch.old[row, start:].any()


def test_what_is_known_is_not_asked_again():
    """The second update of a rollout must not measure its ratio from the weights of the first."""
    batch, objective = batch_of(), GRPO(GRPOConfig())
    first = {"policy": small_llama(1), "reference": small_llama(2)}
    with torch.no_grad():
        objective.consult(batch, first)
        old, reference = batch.old.clone(), batch.reference.clone()
        objective.consult(batch, {"policy": small_llama(5), "reference": small_llama(6)})
    assert torch.equal(batch.old, old) and torch.equal(batch.reference, reference)
    spread_now = spread(target_logprobs(small_llama(5), batch, TEMPERATURE), batch.labels)
    assert (spread_now - old).abs().max() > 0.1
