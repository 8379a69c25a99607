"""Preference pairs: every loss by hand, and packed pairs against each answer alone in a row."""

import math

import pytest
import torch
from helpers import dense_logprobs, tiny_llama

from trivium.data.chat import Chat, Encoded
from trivium.data.collate import collate
from trivium.data.config import BPEConfig
from trivium.data.packing import table_of, tokenise
from trivium.data.tokenizer import train_bpe
from trivium.models.config import LlamaConfig
from trivium.models.llama import Llama
from trivium.objectives.config import PreferenceConfig
from trivium.objectives.logprobs import sequence_logprobs
from trivium.objectives.preference import LOSSES, Preference, num_pairs, split_pairs
from trivium.types import PreferenceBatch, TokenBatch

VOCAB, PAD = 43, 0


# ---- formulas


@pytest.mark.parametrize(
    ("loss", "smoothing", "beta", "margin", "expected"),
    [
        ("sigmoid", 0.0, 0.5, 2.0, 0.313262),  # ln(1 + e^-1)
        ("sigmoid", 0.0, 0.5, -2.0, 1.313262),  # ln(1 + e)
        ("sigmoid", 0.1, 0.5, 2.0, 0.413262),  # cDPO: 0.9 * 0.313262 + 0.1 * 1.313262
        ("sigmoid", 0.1, 0.5, -2.0, 1.213262),
        ("robust", 0.0, 0.5, 2.0, 0.313262),
        ("robust", 0.1, 0.5, 2.0, 0.188262),  # (0.9 * 0.313262 - 0.1 * 1.313262) / 0.8
        ("robust", 0.1, 0.5, -2.0, 1.438262),
        ("robust", 0.1, 0.5, 6.0, -0.326413),  # (0.9 * 0.048587 - 0.1 * 3.048587) / 0.8: negative, rightly
        ("hinge", 0.0, 0.5, 1.0, 0.5),
        ("hinge", 0.0, 0.5, 3.0, 0.0),
        ("hinge", 0.0, 0.5, -2.0, 2.0),
        ("ipo", 0.0, 0.5, 2.0, 1.0),  # (2 - 1)^2
        ("ipo", 0.0, 0.5, -2.0, 9.0),
        ("ipo", 0.0, 0.1, 1.0, 16.0),  # (1 - 5)^2
    ],
)
def test_losses_by_hand(loss, smoothing, beta, margin, expected):
    assert LOSSES[loss](torch.tensor([margin]), beta, smoothing).item() == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize(
    ("loss", "smoothing", "expected"),
    [
        ("sigmoid", 0.0, 0.693147), ("sigmoid", 0.2, 0.693147), ("robust", 0.2, 0.693147),
        ("hinge", 0.0, 1.0), ("ipo", 0.0, 25.0),
    ],
)  # fmt: skip
def test_losses_where_policy_and_reference_agree(loss, smoothing, expected):
    assert LOSSES[loss](torch.zeros(3), 0.1, smoothing).tolist() == [pytest.approx(expected, abs=1e-6)] * 3


@pytest.mark.parametrize("flipped", [0.1, 0.3, 0.45])
def test_robust_loss_is_unbiased_under_flipped_labels(flipped):
    """(1 - e) robust(D) + e robust(-D) = sigmoid(D): what 2403.00409 is for."""
    margin = torch.linspace(-8, 8, 33, dtype=torch.float64)
    clean = LOSSES["sigmoid"](margin, 0.7, 0.0)
    seen = (1 - flipped) * LOSSES["robust"](margin, 0.7, flipped) + flipped * LOSSES["robust"](-margin, 0.7, flipped)
    torch.testing.assert_close(seen, clean, rtol=0, atol=1e-12)


def test_losses_are_finite_far_from_the_reference():
    """D = +-1e4 at b = 1: log(sigmoid(x)) written out would be -inf at -1e4; the loss is 1e4."""
    far = torch.tensor([1e4, -1e4])
    assert LOSSES["sigmoid"](far, 1.0, 0.0).tolist() == [0.0, 1e4]
    assert LOSSES["sigmoid"](far, 1.0, 0.25).tolist() == [2.5e3, 7.5e3]


# ---- pairs in rows


def small_llama(seed, dtype=torch.float64):
    return tiny_llama(VOCAB, seed, dtype, layers=2)


def documents():
    """Three pairs; a prompt of 3, 2 and 1 tokens is shared, answers have 1 to 6 tokens."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for prompt, answers in ((3, (2, 5)), (2, (6, 1)), (1, (3, 3))):
        shared = torch.randint(1, VOCAB, (prompt,), generator=generator).tolist()
        for n in answers:
            ids = shared + torch.randint(1, VOCAB, (n,), generator=generator).tolist()
            found.append(Encoded(ids, [i >= prompt for i in range(len(ids))]))
    return found


def batch_of(pairs_by_row, length=32, chosen_first=True):
    order = (0, 1) if chosen_first else (1, 0)
    rows = [[2 * p + side for p in pairs for side in order] for pairs in pairs_by_row]
    return collate(table_of(documents(), [""] * 6, group=2), rows, length, PAD, PreferenceBatch)


def dense_margins(policy, reference, mean):
    """D of each pair, on sums or on means over the answer."""
    reduce = torch.mean if mean else torch.sum
    ratios = [reduce(dense_logprobs(policy, d)) - reduce(dense_logprobs(reference, d)).detach() for d in documents()]
    return torch.stack([ratios[2 * p] - ratios[2 * p + 1] for p in range(3)])


def loss_of(policy, reference, batch, config):
    objective = Preference(config)
    with torch.no_grad():
        objective.consult(batch, {"reference": reference})
    return objective(policy, batch)


CONFIGS = [
    PreferenceConfig(beta=0.3),
    PreferenceConfig(beta=0.3, label_smoothing=0.2),
    PreferenceConfig(loss="robust", beta=0.3, label_smoothing=0.2),
    PreferenceConfig(loss="hinge", beta=0.3),
    PreferenceConfig(loss="ipo", beta=0.3),
    PreferenceConfig(beta=0.3, sft_weight=0.4),
]
LAYOUTS = [[[0, 1, 2]], [[2, 0], [1]], [[0], [1], [2]]]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.loss}-{c.label_smoothing}-{c.sft_weight}")
def test_packed_loss_and_gradients_equal_answers_alone(config):
    """fp64, 1e-10: above rounding, below any other mask, neighbour or normalisation. The formulas are written anew."""
    policy, reference = small_llama(1), small_llama(2)
    d = dense_margins(policy, reference, mean=config.loss == "ipo")
    b, e = config.beta, config.label_smoothing
    plus, minus = (1 + (-b * d).exp()).log(), (1 + (b * d).exp()).log()  # -log sigmoid(bD) and of -bD
    each = {
        "sigmoid": (1 - e) * plus + e * minus,
        "robust": ((1 - e) * plus - e * minus) / (1 - 2 * e),
        "hinge": torch.where(b * d < 1, 1 - b * d, torch.zeros_like(d)),
        "ipo": d**2 - d / b + 1 / (4 * b**2),
    }[config.loss]
    written = torch.stack([-dense_logprobs(policy, documents()[2 * p]).mean() for p in range(3)])
    expected = (each + config.sft_weight * written).sum()
    expected.backward()
    wanted = [p.grad for p in policy.parameters()]
    for layout in LAYOUTS:
        policy.zero_grad()
        batch = batch_of(layout)
        output = loss_of(policy, reference, batch, config)
        output.loss_sum.backward()
        assert Preference(config).count(batch).item() == 3
        torch.testing.assert_close(output.loss_sum, expected, rtol=0, atol=1e-10)
        for parameter, gradient in zip(policy.parameters(), wanted, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=1e-10)
        assert output.metrics["nll"].total.item() == pytest.approx(written.sum().item(), abs=1e-9)
    assert all(p.grad is None for p in reference.parameters())


def test_figures_are_those_of_the_pairs():
    """reward/chosen = beta * (log pi_c - log ref_c), and so on; accuracy counts D > 0. Sums over 3 pairs, count 3."""
    policy, reference = small_llama(1), small_llama(2)
    d = dense_margins(policy, reference, mean=False)
    chosen = sum((dense_logprobs(policy, x) - dense_logprobs(reference, x)).sum().item() for x in documents()[0::2])
    figures = loss_of(policy, reference, batch_of([[2, 0], [1]]), PreferenceConfig(beta=0.3)).metrics
    assert {m.count.item() for m in figures.values()} == {3}
    assert figures["reward/margin"].total.item() == pytest.approx(0.3 * d.sum().item(), abs=1e-9)
    assert figures["reward/chosen"].total.item() == pytest.approx(0.3 * chosen, abs=1e-9)
    assert figures["reward/rejected"].total.item() == pytest.approx(0.3 * (chosen - d.sum().item()), abs=1e-9)
    assert figures["accuracy"].total.item() == (d > 0).sum().item()
    assert not any(m.total.requires_grad for m in figures.values())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("left", [0, 1, 7])
def test_place_neighbours_and_padding_never_change_an_answer(dtype, tolerance, left):
    """The same six answers alone, and in rows that begin with `left` tokens of padding and hold others beside them."""
    model = small_llama(1, dtype)
    alone = torch.stack([dense_logprobs(model, d).sum() for d in documents()]).detach()
    for layout in ([[0, 1, 2]], [[2, 1, 0]], [[1], [0, 2]]):
        batch = batch_of(layout)
        for name in ("tokens", "labels", "positions", "segments"):
            fill = -100 if name == "labels" else 0
            moved = torch.nn.functional.pad(getattr(batch, name), (left, 0), value=fill)
            setattr(batch, name, moved)
        with torch.no_grad():
            chosen, rejected = split_pairs(sequence_logprobs(model, batch), batch)
        numbers = [p for row in layout for p in row]
        torch.testing.assert_close(chosen.double(), alone[0::2][numbers].double(), rtol=0, atol=tolerance)
        torch.testing.assert_close(rejected.double(), alone[1::2][numbers].double(), rtol=0, atol=tolerance)


def test_attention_across_the_pair_would_show():
    """Without `segments` in the model's hands the rejected answer sees the chosen one: off by far more than 1e-5."""
    model, batch = small_llama(1), batch_of([[0, 1, 2]])

    class Leaking:
        head = model.head

        def __call__(self, tokens, positions, segments):
            return model(tokens, positions, None)

    with torch.no_grad():
        apart = (sequence_logprobs(model, batch) - sequence_logprobs(Leaking(), batch)).abs()
    assert apart[0, 0] < 1e-10  # nothing is before the first
    assert apart[0, 1:].min() > 1e-2


def test_prompt_tokens_have_no_part_in_the_loss():
    """The prompt's own probability is not in the sums: with a table of pairs of tokens for a model, where a token
    depends on the one before alone, another prompt with the same last token changes nothing at all."""

    class Table(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embed = torch.nn.Embedding(VOCAB, VOCAB)
            self.head = torch.nn.Linear(VOCAB, VOCAB, bias=False)

        def forward(self, tokens, positions=None, segments=None):
            return self.embed(tokens)

    model, batch = Table(), batch_of([[0, 1, 2]])
    before = sequence_logprobs(model, batch)
    changed = TokenBatch(batch.tokens.clone(), batch.labels, batch.positions, batch.segments)
    inside = (batch.labels == -100) & (batch.segments > 0)
    inside[:, :-1] &= inside[:, 1:] & (batch.segments[:, 1:] == batch.segments[:, :-1])  # all but a prompt's last token
    assert inside.sum() == 2 * (2 + 1)
    changed.tokens[inside] = VOCAB - changed.tokens[inside]
    assert torch.equal(sequence_logprobs(model, changed), before)


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_swapping_chosen_and_rejected_flips_the_margin_exactly(loss):
    """Only the segments' numbers change places, so not even rounding may differ: D becomes -D."""
    policy, reference, config = small_llama(1), small_llama(2), PreferenceConfig(loss=loss)
    batch = batch_of([[0, 1, 2]])
    one = loss_of(policy, reference, batch, config).metrics
    segments = torch.where(batch.segments > 0, (batch.segments - 1 ^ 1) + 1, 0)  # 1 2 3 4 -> 2 1 4 3
    swapped = PreferenceBatch(batch.tokens, batch.labels, batch.positions, segments)
    other = loss_of(policy, reference, swapped, config).metrics
    assert other["reward/margin"].total.item() == -one["reward/margin"].total.item() != 0
    assert other["reward/chosen"].total.item() == one["reward/rejected"].total.item()
    assert other["accuracy"].total.item() == 3 - one["accuracy"].total.item()


def test_swapped_documents_flip_the_margin():
    """Rejected first in the row: other columns, so rounding may differ; 1e-12 of sums of order 10."""
    policy, reference = small_llama(1), small_llama(2)
    totals = [
        loss_of(policy, reference, batch_of([[0, 1, 2]], chosen_first=first), PreferenceConfig())
        .metrics["reward/margin"].total.item()
        for first in (True, False)
    ]  # fmt: skip
    assert totals[0] == pytest.approx(-totals[1], abs=1e-12)
    assert abs(totals[0]) > 0.01


def test_pairs_of_ragged_rows_are_counted_and_split():
    """Rows of 2, 0 and 1 pairs: 3 pairs; the absent ones of a row are no zeros among the margins."""
    segments = torch.tensor([[1, 2, 3, 4], [0, 0, 0, 0], [1, 2, 2, 0]])
    batch = TokenBatch(segments, segments, segments, segments)
    values = torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.0] * 4, [5.0, 6.0, 0.0, 0.0]])
    assert num_pairs(batch).tolist() == [2, 0, 1]
    assert [side.tolist() for side in split_pairs(values, batch)] == [[1.0, 3.0, 5.0], [2.0, 4.0, 6.0]]


# ---- from messages to sums


def test_answers_end_of_turn_is_in_the_sum_and_the_prompt_is_not():
    """Through the real tokenizer, template and packing: each side's sum is that of its answer's ids and <|end|> given
    the prompt as it is asked. An earlier assistant turn is part of the prompt."""
    tokenizer = train_bpe(BPEConfig(vocab_size=300), ["the river and the stone"] * 3)
    asked = [
        [{"role": "user", "content": "the river?"}],
        [
            {"role": "user", "content": "and"},
            {"role": "assistant", "content": "the stone"},
            {"role": "user", "content": "so"},
        ],
    ]
    answers = [("stone", "the river"), ("river and", "the")]
    pairs = [
        {"id": str(i), **{side: [*turns, {"role": "assistant", "content": text}]
         for side, text in zip(("chosen", "rejected"), said, strict=True)}}
        for i, (turns, said) in enumerate(zip(asked, answers, strict=True))
    ]  # fmt: skip
    table = tokenise(pairs, tokenizer, 128, form="pairs")
    assert table.group == 2 and table.truncated == 0
    batch = collate(table, [[2, 3, 0, 1]], 128, tokenizer.pad_id, PreferenceBatch)
    model = Llama(
        LlamaConfig(dim=16, layers=1, heads=2, kv_heads=1, ffn_dim=24, context=64, init_std=0.3), 300
    ).double()
    model.init_weights(seed=0)
    expected = []
    for turns, said in ((asked[1], answers[1]), (asked[0], answers[0])):
        prompt = Chat(tokenizer).prompt_ids(turns)
        for text in said:
            written = [*tokenizer.encode(text), tokenizer.eot_id]
            ids = torch.tensor([prompt + written])
            logps = model.head(model(ids, torch.arange(ids.shape[1])[None]))[0].log_softmax(-1)
            expected.append(sum(logps[len(prompt) - 1 + i, t].item() for i, t in enumerate(written)))
    found = sequence_logprobs(model, batch)[0].tolist()
    assert found == [pytest.approx(x, abs=1e-9) for x in expected]
    assert math.isfinite(sum(found))
