"""KTO: the loss and its baseline by hand, and packed verdicts against each document alone in a row."""

import numpy as np
import pytest
import torch
from helpers import dense_logprobs, tiny_llama

from trivium.data.chat import Encoded
from trivium.data.collate import collate
from trivium.data.config import BPEConfig
from trivium.data.packing import table_of, tokenise
from trivium.data.tokenizer import train_bpe
from trivium.errors import DataError
from trivium.objectives.config import UnpairedConfig
from trivium.objectives.unpaired import KTO, kto
from trivium.types import UnpairedBatch

VOCAB, PAD = 43, 0


@pytest.mark.parametrize(
    ("ratio", "desirable", "expected"),
    [
        (2.0, 1.0, 2 * 0.182426),  # 1 - sigmoid(1 * (2 - 0.5)), weight 2
        (1.0, 0.0, 3 * 0.622459),  # 1 - sigmoid(1 * (0.5 - 1)), weight 3
        (0.5, 1.0, 2 * 0.5),
        (0.5, 0.0, 3 * 0.5),
    ],
)
def test_loss_by_hand(ratio, desirable, expected):
    """z0 = 0.5, beta 1."""
    found = kto(torch.tensor([ratio]), torch.tensor([desirable]), torch.tensor(0.5), 1.0, (2.0, 3.0))
    assert found.item() == pytest.approx(expected, abs=5e-6)


def test_beta_is_inside_the_sigmoid():
    """1 - sigmoid(0.1 * 10) = 0.268941."""
    found = kto(torch.tensor([10.0]), torch.tensor([1.0]), torch.tensor(0.0), 0.1)
    assert found.item() == pytest.approx(0.268941, abs=1e-6)


# ---- verdicts in rows


def small_llama(seed):
    return tiny_llama(VOCAB, seed, torch.float64)


def documents():
    """Four verdicts: a prompt with its answer, then with the answer of the verdict before it."""
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(1, VOCAB, (n,), generator=generator).tolist() for n in (3, 2, 1, 4)]
    answers = [torch.randint(1, VOCAB, (n,), generator=generator).tolist() for n in (2, 5, 1, 3)]
    found = []
    for i in range(4):
        for answer in (answers[i], answers[i - 1]):
            ids = prompts[i] + answer
            found.append(Encoded(ids, [t >= len(prompts[i]) for t in range(len(ids))]))
    return found


MIXED = [1.0, 0.0, 0.0, 1.0]


def batch_of(verdicts_by_row, verdicts=MIXED, length=48):
    columns = {"desirable": np.repeat(np.array(verdicts, np.float32), 2)}
    rows = [[2 * v + side for v in row for side in (0, 1)] for row in verdicts_by_row]
    return collate(table_of(documents(), [""] * 8, group=2, columns=columns), rows, length, PAD, UnpairedBatch)


def dense_ratios(policy, reference):
    """log pi - log ref of each document's answer, alone in a row: judged ones, mismatched ones."""
    found = [dense_logprobs(policy, d).sum() - dense_logprobs(reference, d).sum().detach() for d in documents()]
    return torch.stack(found[0::2]), torch.stack(found[1::2])


def prepared(policy, reference, batches, config=UnpairedConfig()):  # noqa: B008
    objective = KTO(config)
    with torch.no_grad():
        for batch in batches:
            objective.consult(batch, {"reference": reference})
        objective.prepare(policy, batches, lambda x: x)
    return objective


LAYOUTS = [[[[0, 1, 2, 3]]], [[[3, 1], [0], [2]]], [[[1]], [[0], [3, 2]]], [[[0]], [[1]], [[2]], [[3]]]]
"""Steps of micro-batches of rows of verdicts."""


@pytest.mark.parametrize("seeds", [(1, 4), (4, 1)], ids=["z0 above 0", "z0 clamped"])
@pytest.mark.parametrize("verdicts", [MIXED, [1.0] * 4, [0.0] * 4], ids=["mixed", "all good", "all bad"])
def test_step_equals_documents_alone(verdicts, seeds):
    """Loss, gradient and z0 of a whole step, however it is cut; fp64, 1e-10.

    z0 is the mean of the mismatched ratios of the step, not below 0, and has no gradient.
    """
    config = UnpairedConfig(beta=0.3, desirable_weight=1.5, undesirable_weight=0.7)
    policy, reference = small_llama(seeds[0]), small_llama(seeds[1])
    ratios, mismatched = dense_ratios(policy, reference)
    mean = mismatched.detach().mean().item()
    assert (mean > 0.1) if seeds == (1, 4) else (mean < -0.1)
    z0 = max(0.0, mean)
    good = torch.tensor(verdicts, dtype=torch.float64)
    value = 1 / (1 + (-config.beta * (ratios - z0)).exp())
    expected = (good * 1.5 * (1 - value) + (1 - good) * 0.7 * value).sum()  # 1 - sigmoid(-x) = sigmoid(x)
    expected.backward()
    wanted = [p.grad for p in policy.parameters()]
    for layout in LAYOUTS:
        policy.zero_grad()
        batches = [batch_of(rows, verdicts) for rows in layout]
        objective = prepared(policy, reference, batches, config)
        outputs = [objective(policy, batch) for batch in batches]
        loss = sum(o.loss_sum for o in outputs)
        loss.backward()
        assert sum(objective.count(b).item() for b in batches) == 4
        assert all(b.baseline.item() == pytest.approx(z0, abs=1e-10) for b in batches)
        torch.testing.assert_close(loss, expected, rtol=0, atol=1e-10)
        for parameter, gradient in zip(policy.parameters(), wanted, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=1e-10)
        figures = {k: [sum(x) for x in zip(*(o.metrics[k] for o in outputs), strict=True)] for k in outputs[0].metrics}
        assert figures["reward/chosen"][0].item() == pytest.approx(0.3 * (ratios * good).sum().item(), abs=1e-9)
        assert figures["reward/chosen"][1].item() == sum(verdicts)
        assert figures["reward/rejected"][1].item() == 4 - sum(verdicts)
        right = (ratios > z0) == (good > 0.5)
        assert figures["accuracy"][0].item() == right.sum().item()


def test_baseline_is_clamped_at_zero_after_the_mean_and_not_before():
    """Micro-batches with mismatched means of either sign: clamping each (or each verdict) would give more."""
    policy, reference = small_llama(1), small_llama(4)
    _, mismatched = dense_ratios(policy, reference)
    assert mismatched.min() < -0.01 and mismatched.mean() > 0.01
    batches = [batch_of([[v]]) for v in range(4)]
    prepared(policy, reference, batches)
    assert batches[0].baseline.item() == pytest.approx(mismatched.mean().item(), abs=1e-10)
    assert mismatched.clamp(min=0).mean() > mismatched.mean() + 1e-3


def test_baseline_is_a_mean_over_all_ranks():
    """Another rank with 1 verdict at distance 10: z0 = (sum + 10) / (4 + 1); `total` sums a tensor over the ranks."""
    policy, reference = small_llama(1), small_llama(4)
    _, mismatched = dense_ratios(policy, reference)
    batch, objective = batch_of([[0, 1, 2, 3]]), KTO(UnpairedConfig())
    other = iter([10.0, 1])
    with torch.no_grad():
        objective.consult(batch, {"reference": reference})
        objective.prepare(policy, [batch], lambda x: x + next(other))
    assert batch.baseline.item() == pytest.approx((mismatched.sum().item() + 10) / 5, abs=1e-6)


def test_mismatched_answers_are_those_of_the_example_before():
    """Through the real tokenizer: document 2k+1 is prompt k with answer k-1, the first with the last; verdicts of both
    are the example's own."""
    tokenizer = train_bpe(BPEConfig(vocab_size=300), ["the river and the stone"] * 3)
    examples = [
        {"id": str(i), "prompt": p, "completion": c, "label": good}
        for i, (p, c, good) in enumerate([("river", " a", True), ("stone", " bb", False), ("and", " ccc", True)])
    ]
    table = tokenise(examples, tokenizer, 64, form="labels")
    texts = [tokenizer.decode(table.document(d)[0].tolist()) for d in range(6)]
    assert texts == ["river a", "river ccc", "stone bb", "stone a", "and ccc", "and bb"]
    answers = [tokenizer.decode(table.document(d)[0][table.document(d)[1]].tolist()) for d in range(6)]
    assert answers == [" a", " ccc", " bb", " a", " ccc", " bb"]
    assert table.columns["desirable"].tolist() == [1, 1, 0, 0, 1, 1]


def test_one_verdict_has_nothing_to_be_mismatched_with():
    tokenizer = train_bpe(BPEConfig(vocab_size=300), ["the river"])
    with pytest.raises(DataError, match="all examples have one prompt, so none has a mismatched answer"):
        tokenise([{"id": "1", "prompt": "a", "completion": "b", "label": True}], tokenizer, 64, form="labels")
