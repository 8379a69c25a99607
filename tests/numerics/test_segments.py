"""Values of single tokens, and their sums over documents: against dense matrices and plain loops."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from trivium.objectives.logprobs import (
    logprobs,
    num_segments,
    segment_index,
    segment_sums,
    sequence_logprobs,
    spread,
    target_logprobs,
    token_values,
)
from trivium.types import TokenBatch

N, C, V = 37, 8, 23
EXACT = {"rtol": 0, "atol": 1e-12}  # fp64, terms of order 1


class Tied(nn.Module):
    """A head that shares the embedding's weight; the states are rows of that embedding."""

    def __init__(self, tied, bias):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(V, C, dtype=torch.float64)
        self.head = nn.Linear(C, V, bias=bias, dtype=torch.float64)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens, positions=None, segments=None):
        return self.embed(tokens)


@pytest.mark.parametrize("chunk", [1, 5, N - 1, N, N + 1])
@pytest.mark.parametrize(("tied", "bias"), [(False, False), (False, True), (True, False), (True, True)])
def test_token_values_equal_dense_logprobs_in_value_and_gradient(chunk, tied, bias):
    """The loss takes each value with another weight and a square, so that a gradient of the sum alone would not do."""
    torch.manual_seed(1)
    tokens, targets = torch.randint(V, (N,)), torch.randint(V, (N,))
    weights = torch.randn(N, dtype=torch.float64)
    results = []
    for dense in (True, False):
        model = Tied(tied, bias)
        states = model(tokens)
        if dense:
            values = model.head(states).log_softmax(-1)[torch.arange(N), targets]
        else:
            values = token_values(model.head, states, targets, logprobs, chunk)
        (weights * values + values**2).sum().backward()
        results.append([values.detach(), *(p.grad for p in model.parameters())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(other, one, **EXACT)


def test_token_values_of_no_tokens_have_zero_gradients():
    model = Tied(False, True)
    none = torch.zeros(0, dtype=torch.long)
    values = token_values(model.head, model(none), none, logprobs)
    assert values.shape == (0,)
    values.sum().backward()
    assert torch.equal(model.head.weight.grad, torch.zeros(V, C, dtype=torch.float64))


def test_token_values_under_autocast_are_made_again_in_the_same_precision():
    """The backward pass recomputes a chunk's logits; were it in fp32, the gradient would be another one's.

    bf16 products of order 1 against the same computation without chunks, also in bf16: 2^-7 relative.
    """
    torch.manual_seed(2)
    tokens, targets = torch.randint(V, (N,)), torch.randint(V, (N,))
    found = []
    for dense in (True, False):
        model = Tied(True, True).float()
        with torch.autocast("cpu", torch.bfloat16):
            states = model(tokens)
            if dense:
                values = logprobs(model.head(states).float(), targets)
            else:
                values = token_values(model.head, states, targets, logprobs, 5)
        assert values.dtype == torch.float32
        values.sum().backward()
        found.append((values.detach(), model.embed.weight.grad))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=0, atol=1e-6)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=0, atol=2**-7 * found[0][1].abs().max().item())


# three rows of 9: documents of 4, 2 and 2 tokens and a pad; one of 9; padding on both sides of one of 3
SEGMENTS = torch.tensor([[1, 1, 1, 1, 2, 2, 3, 3, 0], [1] * 9, [0, 0, 1, 1, 1, 0, 0, 0, 0]])
TRAINED = torch.tensor([[0, 0, 1, 1, 0, 1, 0, 0, 0], [0, 1, 0, 1, 0, 1, 0, 1, 1], [0, 0, 0, 1, 1, 0, 0, 0, 0]]).bool()


def batch_of(segments=SEGMENTS, trained=TRAINED):
    tokens = torch.arange(trained.numel()).view(trained.shape) % V
    labels = torch.where(trained, tokens, -100)
    return TokenBatch(tokens, labels, torch.zeros_like(tokens), segments)


def test_segment_sums_equal_loops():
    """Values 1, 2, 4, ... of the 10 trained tokens, so that every sum names its terms; document 3 has none: 0."""
    batch = batch_of()
    values = 2.0 ** torch.arange(10)
    expected = torch.zeros(3, 3)
    number = 0
    for row in range(3):
        for column in range(9):
            if TRAINED[row, column]:
                expected[row, SEGMENTS[row, column] - 1] += values[number]
                number += 1
    assert number == 10 and num_segments(batch) == 3
    assert expected.tolist() == [[3, 4, 0], [248, 0, 0], [768, 0, 0]]
    assert torch.equal(segment_sums(values, batch), expected)
    assert segment_index(batch).tolist() == [0, 0, 1, 3, 3, 3, 3, 3, 6, 6]


def test_segment_sums_without_segments_are_sums_of_rows():
    """Rows of one document each: 1 + 2, then 4 + ... + 64, then 128 + 256; the label in column 0 follows nothing."""
    trained = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 0, 0]]).bool()
    batch = batch_of(None, trained)
    values = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    assert segment_sums(values, batch).tolist() == [[3.0], [28.0], [32.0]]
    assert segment_index(batch).tolist() == [0, 0, 1, 1, 1, 2]


def test_segment_sums_carry_each_token_its_own_gradient():
    """d(2 s_1 + 3 s_2 + 5 s_4 + 7 s_7)/d value is the factor of the document that the token is in."""
    batch = batch_of()
    values = torch.ones(10, requires_grad=True)
    factors = torch.tensor([[2.0, 3.0, 99.0], [5.0, 99.0, 99.0], [7.0, 99.0, 99.0]])
    (segment_sums(values, batch) * factors).sum().backward()
    assert values.grad.tolist() == [2, 2, 3, 5, 5, 5, 5, 5, 7, 7]


def test_spread_puts_values_at_their_tokens():
    batch = batch_of()
    values = 1 + torch.arange(10.0)
    out = spread(values, batch.labels)
    assert out.shape == TRAINED.shape
    assert torch.equal(out[TRAINED], values)
    assert torch.equal(out[~TRAINED], torch.zeros(17))
    assert torch.equal(out[:, 1:][batch.labels[:, 1:] != -100], values)  # as they are read again


def test_sequence_logprobs_equal_loops_over_documents():
    """Each trained token given the one before it, with a head of its own and a temperature."""
    model, batch = Tied(False, True), batch_of()
    table = model.head(model.embed.weight)
    for temperature in (1.0, 0.7):
        expected = torch.zeros(3, 3, dtype=torch.float64)
        for row in range(3):
            for column in range(1, 9):
                if TRAINED[row, column]:
                    before, here = batch.tokens[row, column - 1], batch.tokens[row, column]
                    logp = F.log_softmax(table[before] / temperature, -1)[here]
                    expected[row, SEGMENTS[row, column] - 1] += logp
        found = segment_sums(target_logprobs(model, batch, temperature), batch)
        torch.testing.assert_close(found, expected, **EXACT)
        if temperature == 1.0:
            torch.testing.assert_close(sequence_logprobs(model, batch), expected, **EXACT)
