"""Bradley-Terry by hand, and scores read at each document's own last token."""

import pytest
import torch
from helpers import tiny_llama
from torch import nn

from trivium.data.chat import Encoded
from trivium.data.collate import collate
from trivium.data.packing import table_of
from trivium.objectives.config import RewardConfig
from trivium.objectives.preference import split_pairs
from trivium.objectives.reward import Reward, bradley_terry, segment_scores
from trivium.types import PreferenceBatch, TokenBatch

VOCAB, PAD = 43, 0


@pytest.mark.parametrize(
    ("chosen", "rejected", "margin", "centering", "expected"),
    [
        (1.0, 0.0, 0.0, 0.0, 0.313262),  # ln(1 + e^-1)
        (0.0, 1.0, 0.0, 0.0, 1.313262),
        (3.0, 1.0, 1.0, 0.0, 0.313262),  # a margin of 1 makes 2 ahead count as 1
        (3.0, 1.0, 0.0, 0.1, 0.126928 + 1.6),  # 0.1 * (3 + 1)^2
        (2.0, -2.0, 0.0, 5.0, 0.018150),  # centred already
        (0.0, 0.0, 0.0, 1.0, 0.693147),
    ],
)
def test_loss_by_hand(chosen, rejected, margin, centering, expected):
    found = bradley_terry(torch.tensor([chosen]), torch.tensor([rejected]), margin, centering)
    assert found.item() == pytest.approx(expected, abs=1e-6)


class Scorer(nn.Module):
    """The score of a document is the value of its last token: token t has (t - 5) / 2."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding.from_pretrained((torch.arange(10.0)[:, None] - 5) / 2, freeze=False)
        self.score = nn.Linear(1, 1, bias=False)
        nn.init.ones_(self.score.weight)

    def forward(self, tokens, positions=None, segments=None):
        return self.embed(tokens)


def packed(documents, rows, length, table=None):
    encoded = [Encoded(list(d), [i > 0 for i in range(len(d))]) for d in documents]
    return collate(table_of(encoded, [""] * len(encoded), group=2), rows, length, PAD, PreferenceBatch)


def test_zero_is_a_reward():
    """Scores (0, -1) and (2, 0): losses ln(1 + e^-1) and ln(1 + e^-2); means 1 of the chosen, -0.5 of the rejected.

    Were 0.0 read as missing, the chosen's mean would be 2, the rejected's -1, and one pair would be left.
    """
    batch = packed([(9, 5), (1, 3), (1, 9), (2, 5)], [[0, 1, 2, 3]], 9)
    output = Reward(RewardConfig())(Scorer(), batch)
    assert output.loss_sum.item() == pytest.approx(0.313262 + 0.126928, abs=1e-6)
    figures = {k: (m.total / m.count).item() for k, m in output.metrics.items()}
    assert figures == {"accuracy": 1.0, "reward/chosen": 1.0, "reward/rejected": -0.5, "reward/margin": 1.5}


def test_a_tie_is_not_a_win():
    """Accuracy of a new head, whose scores are all 0, is 0 and not 1."""
    batch = packed([(9, 5), (1, 5)], [[0, 1]], 4)
    assert Reward(RewardConfig())(Scorer(), batch).metrics["accuracy"].total.item() == 0


@pytest.mark.parametrize("left", [0, 2])
@pytest.mark.parametrize("right", [0, 3])
def test_score_is_read_at_the_last_token_of_each_document(left, right):
    """Documents ending in 9, 6, 7 (scores 2, 0.5, 1): the last ends at the row's end, or padding follows; the pad id
    has a score of its own (-2.5) that must not appear. A second row holds one document: its other places are 0."""
    segments = torch.tensor([[1, 1, 2, 2, 2, 3], [1, 1, 1, 1, 1, 1]])
    tokens = torch.tensor([[1, 9, 2, 2, 6, 7], [3, 3, 3, 3, 3, 8]])
    segments, tokens = (nn.functional.pad(x, (left, right)) for x in (segments, tokens))
    found = segment_scores(Scorer(), TokenBatch(tokens, tokens, tokens, segments))
    assert found.tolist() == [[2.0, 0.5, 1.0], [1.5, 0.0, 0.0]]


def test_score_of_rows_without_segments_is_at_their_end():
    tokens = torch.tensor([[1, 9], [2, 6]])
    assert segment_scores(Scorer(), TokenBatch(tokens, tokens, tokens)).tolist() == [[2.0], [0.5]]


# ---- a real model


def small_llama(seed=1, dtype=torch.float64):
    model = tiny_llama(VOCAB, seed, layers=2)
    model.add_score_head()
    with torch.no_grad():
        model.score.weight.copy_(torch.randn(1, 16, generator=torch.Generator().manual_seed(seed)))
    return model.to(dtype)


DOCUMENTS = [
    tuple(torch.randint(1, VOCAB, (n,), generator=torch.Generator().manual_seed(n)).tolist())
    for n in (4, 7, 2, 9, 5, 3)
]


def alone(model, document):
    """The score of a document that is alone in a row."""
    return model.score(model(torch.tensor([document]), torch.arange(len(document))[None]))[0, -1, 0]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("left", [0, 3])
def test_place_neighbours_and_padding_never_change_a_score(dtype, tolerance, left):
    model = small_llama(dtype=dtype)
    expected = torch.stack([alone(model, d) for d in DOCUMENTS]).detach()
    for rows, length in (([[0, 1, 2, 3, 4, 5]], 30), ([[4, 5, 0, 1], [2, 3]], 24), ([[0, 1], [2, 3], [4, 5]], 11)):
        batch = packed(DOCUMENTS, rows, length)
        for name in ("tokens", "labels", "positions", "segments"):
            setattr(batch, name, nn.functional.pad(getattr(batch, name), (left, 0)))
        with torch.no_grad():
            chosen, rejected = split_pairs(segment_scores(model, batch), batch)
        numbers = [d // 2 for row in rows for d in row[::2]]
        torch.testing.assert_close(chosen, expected[0::2][numbers], rtol=0, atol=tolerance)
        torch.testing.assert_close(rejected, expected[1::2][numbers], rtol=0, atol=tolerance)


@pytest.mark.parametrize("config", [RewardConfig(), RewardConfig(margin=0.5, centering=0.1)], ids=str)
def test_packed_loss_and_gradients_equal_documents_alone(config):
    """fp64, 1e-10; the head for words has no part in it and gets no gradient of its own."""
    model = small_llama()
    scores = torch.stack([alone(model, d) for d in DOCUMENTS])
    chosen, rejected = scores[0::2], scores[1::2]
    gap = chosen - rejected - config.margin
    expected = ((1 + (-gap).exp()).log() + config.centering * (chosen + rejected) ** 2).sum()
    expected.backward()
    wanted = {n: p.grad for n, p in model.named_parameters()}
    for rows, length in (([[0, 1, 2, 3, 4, 5]], 30), ([[4, 5, 0, 1], [2, 3]], 24)):
        model.zero_grad()
        output = Reward(config)(model, packed(DOCUMENTS, rows, length))
        output.loss_sum.backward()
        torch.testing.assert_close(output.loss_sum, expected, rtol=0, atol=1e-10)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, wanted[name], rtol=0, atol=1e-10, msg=name)
        assert Reward(config).count(packed(DOCUMENTS, rows, length)).item() == 3


def test_swapping_chosen_and_rejected_flips_the_margin_exactly():
    model, batch = small_llama(), packed(DOCUMENTS, [[0, 1, 2, 3, 4, 5]], 30)
    segments = torch.where(batch.segments > 0, (batch.segments - 1 ^ 1) + 1, 0)
    swapped = PreferenceBatch(batch.tokens, batch.labels, batch.positions, segments)
    one, other = (Reward(RewardConfig())(model, b).metrics for b in (batch, swapped))
    assert one["reward/margin"].total.item() == -other["reward/margin"].total.item() != 0
    assert one["reward/chosen"].total.item() == other["reward/rejected"].total.item()
