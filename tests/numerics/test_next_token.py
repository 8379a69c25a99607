"""Next-token and SFT losses against numbers worked by hand on a four-word vocabulary."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from trivium.objectives.config import NextTokenConfig, SFTConfig
from trivium.objectives.next_token import SFT, NextToken
from trivium.types import TokenBatch

LN2 = math.log(2)
# Row i: p(next token | token i). Powers of two, so every loss is a whole number of ln 2.
BIGRAM = torch.tensor(
    [[1 / 2, 1 / 4, 1 / 8, 1 / 8], [1 / 8, 1 / 2, 1 / 4, 1 / 8], [1 / 4] * 4, [1 / 8, 1 / 8, 1 / 4, 1 / 2]],
    dtype=torch.float64,
)


class Bigram(nn.Module):
    """A model whose logits after token i are log BIGRAM[i]: the embedding holds them, the head is the identity."""

    def __init__(self, table=BIGRAM):
        super().__init__()
        self.embed = nn.Embedding.from_pretrained(table.log(), freeze=False)
        self.head = nn.Linear(len(table), len(table), bias=False, dtype=table.dtype)
        with torch.no_grad():
            self.head.weight.copy_(torch.eye(len(table)))

    def forward(self, tokens, positions, segments=None):
        return self.embed(tokens)


def batch_of(tokens, labels, segments=None):
    tokens, labels = torch.tensor(tokens), torch.tensor(labels)
    segments = None if segments is None else torch.tensor(segments)
    return TokenBatch(tokens, labels, torch.zeros_like(tokens), segments)


# Two documents in one row, "0 1 3" and "2 0", then padding.
PACKED = batch_of([[0, 1, 3, 2, 0, 0]], [[-100, 1, 3, -100, 0, -100]], [[1, 1, 1, 2, 2, 0]])


def test_next_token_sums_shifts_and_skips_document_starts():
    """0->1 is 1/4: 2 ln 2; 1->3 is 1/8: 3 ln 2; 3->2 is a border; 2->0 is 1/4: 2 ln 2. Sum 7 ln 2 over 3."""
    objective, model = NextToken(NextTokenConfig()), Bigram()
    output = objective(model, PACKED)
    assert objective.count(PACKED).item() == 3
    # fp64 throughout: 1e-12 is rounding
    assert output.loss_sum.item() == pytest.approx(7 * LN2, abs=1e-12)
    assert output.metrics["nll"].total.item() == pytest.approx(7 * LN2, abs=1e-12)
    assert output.metrics["nll"].count.item() == 3


def test_next_token_label_of_the_first_column_has_no_state_before_it():
    """Labels [0, 0]: only 0->0 (1/2) is a pair, ln 2; the label in column 0 is not a target, even if it is set."""
    batch = batch_of([[0, 0]], [[0, 0]])
    objective = NextToken(NextTokenConfig())
    assert objective.count(batch).item() == 1
    assert objective(Bigram(), batch).loss_sum.item() == pytest.approx(LN2, abs=1e-12)


def test_next_token_ignored_label_adds_no_loss_and_no_gradient():
    """Only 1->3 is trained: 3 ln 2, and only row 1 of the embedding gets a gradient, softmax - onehot(3)."""
    batch = batch_of([[0, 1, 3, 2]], [[-100, -100, 3, -100]])
    model = Bigram()
    output = NextToken(NextTokenConfig())(model, batch)
    output.loss_sum.backward()
    expected = torch.zeros(4, 4, dtype=torch.float64)
    expected[1] = torch.tensor([1 / 8, 1 / 2, 1 / 4, 1 / 8 - 1])
    assert output.loss_sum.item() == pytest.approx(3 * LN2, abs=1e-12)
    torch.testing.assert_close(model.embed.weight.grad, expected, rtol=0, atol=1e-12)


def test_label_smoothing_by_hand():
    """p = (1/2, 1/4, 1/8, 1/8), target 0, e = 0.1: 0.9 * 1 + 0.1 * mean(1, 2, 3, 3) = 1.125, in ln 2."""
    objective = NextToken(NextTokenConfig(label_smoothing=0.1))
    loss, nll = objective.token_loss(BIGRAM[:1].log(), torch.tensor([0]))
    assert loss.item() == pytest.approx(1.125 * LN2, abs=1e-12)
    assert nll.item() == pytest.approx(LN2, abs=1e-12)  # the figure stays the plain log-likelihood


def test_label_smoothing_equals_torch():
    torch.manual_seed(0)
    logits, targets = torch.randn(7, 11, dtype=torch.float64), torch.randint(11, (7,))
    loss, _ = NextToken(NextTokenConfig(label_smoothing=0.3)).token_loss(logits, targets)
    expected = F.cross_entropy(logits, targets, label_smoothing=0.3, reduction="none")
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)


def test_z_loss_by_hand():
    """Four logits of 2: nll = ln 4, log Z = 2 + ln 4; with weight 0.5 the loss is ln 4 + (2 + ln 4)^2 / 2."""
    objective = NextToken(NextTokenConfig(z_loss=0.5))
    loss, nll = objective.token_loss(torch.full((1, 4), 2.0, dtype=torch.float64), torch.tensor([1]))
    assert loss.item() == pytest.approx(math.log(4) + 0.5 * (2 + math.log(4)) ** 2, abs=1e-12)
    assert nll.item() == pytest.approx(math.log(4), abs=1e-12)


def test_z_loss_with_label_smoothing_smooths_the_cross_entropy_only():
    """Four equal logits of 2: smoothing leaves ln 4 as it is (the target is uniform anyway), z adds (2 + ln 4)^2."""
    objective = NextToken(NextTokenConfig(z_loss=1.0, label_smoothing=0.5))
    loss, _ = objective.token_loss(torch.full((1, 4), 2.0, dtype=torch.float64), torch.tensor([1]))
    assert loss.item() == pytest.approx(math.log(4) + (2 + math.log(4)) ** 2, abs=1e-12)


def test_dft_weighs_each_token_by_its_own_probability():
    """Target of probability 1/4: 1/4 * 2 ln 2 = ln 2 / 2; of probability 1/2: 1/2 * ln 2. The figure is unweighted."""
    loss, nll = SFT(SFTConfig(dft=True)).token_loss(BIGRAM[:1].log().expand(2, 4), torch.tensor([1, 0]))
    torch.testing.assert_close(loss, torch.tensor([LN2 / 2, LN2 / 2], dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(nll, torch.tensor([2 * LN2, LN2], dtype=torch.float64), rtol=0, atol=1e-12)


def test_dft_weight_carries_no_gradient():
    """d/dz = p * (softmax - onehot) with p a constant: for p = (1/2, 1/4, 1/8, 1/8) and target 1, a quarter of
    (1/2, -3/4, 1/8, 1/8). A weight in the graph would make it (1 - 2 ln 2) times that."""
    logits = BIGRAM[:1].log().requires_grad_()
    SFT(SFTConfig(dft=True)).token_loss(logits, torch.tensor([1]))[0].sum().backward()
    expected = torch.tensor([[1 / 8, -3 / 16, 1 / 32, 1 / 32]], dtype=torch.float64)
    torch.testing.assert_close(logits.grad, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"z_loss": 0.1, "label_smoothing": 0.2}])
def test_sft_equals_next_token_when_everything_is_trained(options):
    """Same labels, same options: loss and gradients are the same numbers, bit for bit."""
    batch = batch_of([[0, 1, 3, 2, 0]], [[-100, 1, 3, 2, 0]])
    results = []
    for objective in (NextToken(NextTokenConfig(**options)), SFT(SFTConfig(**options))):
        model = Bigram()
        output = objective(model, batch)
        output.loss_sum.backward()
        results.append((output.loss_sum, model.embed.weight.grad, model.head.weight.grad, objective.count(batch)))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


# ---- NEFTune: U(-1, 1) * alpha / sqrt(L C)


def noise_of(segments, *, alpha, width=64, training=True):
    """The noise that NEFTune adds: hidden states (here the embeddings themselves) less the embeddings."""
    model = nn.Module()
    model.embed = nn.Embedding(5, width)
    model.train(training)
    tokens = torch.randint(5, segments.shape)

    class Probe:
        embed, head, training = model.embed, None, model.training

        def __call__(self, tokens, positions, segments=None):
            return model.embed(tokens)

    batch = TokenBatch(tokens, tokens, torch.zeros_like(tokens), None if (segments == 1).all() else segments)
    with torch.no_grad():
        return SFT(SFTConfig(neftune_alpha=alpha)).hidden(Probe(), batch) - model.embed(tokens)


@pytest.mark.parametrize(("alpha", "training"), [(0.0, True), (5.0, False)])
def test_neftune_adds_nothing_when_off_or_not_training(alpha, training):
    torch.manual_seed(0)
    assert torch.equal(
        noise_of(torch.ones(2, 8, dtype=torch.long), alpha=alpha, training=training), torch.zeros(2, 8, 64)
    )


def test_neftune_noise_fills_its_bound_and_never_passes_it():
    """L = 16, C = 64, alpha = 8: the bound is 8 / sqrt(1024) = 0.25; the deviation of a uniform is 0.25 / sqrt(3)."""
    torch.manual_seed(0)
    noise = noise_of(torch.ones(8, 16, dtype=torch.long), alpha=8.0)
    # 8192 draws: the largest is within 1 % of the bound (missed with probability 0.99^8192); 1e-6 is rounding
    assert 0.2475 < noise.abs().max() <= 0.25 + 1e-6
    assert noise.std().item() == pytest.approx(0.25 / 3**0.5, rel=0.03)
    assert abs(noise.mean().item()) < 0.01


def test_neftune_length_is_each_documents_own_under_packing():
    """Documents of 4 and 12 tokens in one row, C = 64, alpha = 8: bounds 8 / 16 = 0.5 and 8 / sqrt(768) = 0.2887."""
    torch.manual_seed(0)
    segments = torch.tensor([[1] * 4 + [2] * 12 + [0] * 4] * 16)
    noise = noise_of(segments, alpha=8.0)
    assert 0.49 < noise[:, :4].abs().max() <= 0.5 + 1e-6
    assert 0.28 < noise[:, 4:16].abs().max() <= 8 / 768**0.5 + 1e-6


def test_neftune_leaves_no_hook_behind():
    """Evaluation after a training step is without noise."""
    torch.manual_seed(0)
    model = Bigram(torch.full((4, 4), 0.25))
    objective = SFT(SFTConfig(neftune_alpha=5.0))
    batch = batch_of([[0, 1]], [[-100, 1]])
    assert not torch.equal(objective.hidden(model.train(), batch), model.embed(batch.tokens))
    assert torch.equal(objective.hidden(model.eval(), batch), model.embed(batch.tokens))
