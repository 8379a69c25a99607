"""The sampler against distributions that are enumerated by hand."""

import math

import pytest
import torch

from trivium.inference.sampling import filtered_probabilities, sample, uniforms
from trivium.types import Request, SamplingParams

LOGITS = [0.3, 2.0, -1.0, 1.2, 0.0, 1.9, -0.5, 0.9]
DRAWS = 4000
# chi-square quantiles at 0.999 by degrees of freedom (any statistics table). Draws are a function of fixed ids, so a
# run either always passes or never does.
CHI2 = {1: 10.83, 2: 13.82, 3: 16.27, 4: 18.47, 5: 20.52, 6: 22.46, 7: 24.32}


def enumerated(temperature=1.0, top_k=0, top_p=1.0):
    """The definition in plain Python: temperature, then top-k, then the shortest prefix that reaches top-p."""
    weights = {i: math.exp(x / temperature) for i, x in enumerate(LOGITS)}
    ranked = sorted(weights, key=lambda i: -weights[i])[: top_k or None]
    total = sum(weights[i] for i in ranked)
    kept, mass = [], 0.0
    for i in ranked:
        kept.append(i)
        mass += weights[i] / total
        if mass >= top_p:
            break
    total = sum(weights[i] for i in kept)
    return {i: weights[i] / total for i in kept}


def requests_of(num, **params):
    return [Request(f"r{i}", (1,), SamplingParams(**params)) for i in range(num)]


def draw(num, position=0, **params):
    logits = torch.tensor([LOGITS]).expand(num, -1)
    return sample(logits, requests_of(num, **params), [position] * num).tolist()


OPTIONS = [
    {"temperature": 1.0},
    {"temperature": 0.7},
    {"temperature": 2.5},
    {"temperature": 1.0, "top_k": 3},
    {"temperature": 1.0, "top_p": 0.8},
    {"temperature": 1.5, "top_k": 5, "top_p": 0.7},
    {"temperature": 0.5, "top_k": 100, "top_p": 0.95},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_draws_follow_the_enumerated_distribution(options):
    """Pearson's chi-square over 4,000 draws; what is not kept is never drawn."""
    expected = enumerated(**options)
    drawn = draw(DRAWS, **options)
    assert set(drawn) <= set(expected)
    chi2 = sum((drawn.count(i) - DRAWS * p) ** 2 / (DRAWS * p) for i, p in expected.items())
    assert chi2 < CHI2[len(expected) - 1]


def test_chi_square_would_show_a_wrong_temperature():
    """Draws at temperature 0.85 against the distribution at 1.0 are refused by far: the test above can fail.

    By calculation: the statistic is about noncentral chi-square, 7 degrees and n sum (p - q)^2 / q = 0.01455 n. With
    4,000 draws its mean is 65 and its deviation 16: one set of draws in seven would not reach twice the bound, 48.6.
    With 12,000 they are 182 and 27, five deviations above it.
    """
    expected, num = enumerated(), 3 * DRAWS
    other = enumerated(temperature=0.85)
    far = num * sum((other[i] - p) ** 2 / p for i, p in expected.items())
    assert 7 + far - 4 * (14 + 4 * far) ** 0.5 > 2 * CHI2[7]
    drawn = draw(num, temperature=0.85)
    assert sum((drawn.count(i) - num * p) ** 2 / (num * p) for i, p in expected.items()) > 2 * CHI2[7]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_filtered_probabilities_equal_the_enumerated_ones(options):
    full = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} | options
    found, ids = filtered_probabilities(torch.tensor([LOGITS]), *(torch.tensor([v]) for v in full.values()))
    expected = enumerated(**options)
    by_token = {i: p for i, p in zip(ids[0].tolist(), found[0].tolist(), strict=True) if p > 0}
    # the settings are fp32 tensors: 1e-6 relative
    assert by_token == pytest.approx(expected, rel=1e-6)


def test_rows_have_their_own_parameters():
    """One batch: greedy, top-k 1 (the same), top-p 1e-6 (the same), and two free rows at another temperature each."""
    settings = [
        {},
        {"temperature": 1.0, "top_k": 1},
        {"temperature": 1.0, "top_p": 1e-6},
        {"temperature": 1.0},
        {"temperature": 9.0},
    ]
    requests = [Request(f"r{i}", (1,), SamplingParams(**s)) for i, s in enumerate(settings)]
    together = sample(torch.tensor([LOGITS] * 5), requests, [3] * 5).tolist()
    assert together[:3] == [1, 1, 1]
    for request, token in zip(requests, together, strict=True):
        assert sample(torch.tensor([LOGITS]), [request], [3]).tolist() == [token]


def test_temperature_zero_is_argmax_even_beside_an_equal_logit():
    """Exact: 1e-7 apart is apart; of equals the first is taken, as torch's argmax does."""
    logits = torch.tensor([[1.0, 1.0 + 2e-7, 0.5], [2.0, 3.0, 3.0], [-torch.inf, -5.0, -torch.inf]])
    assert sample(logits, requests_of(3), [0] * 3).tolist() == [1, 1, 1]


def test_top_p_takes_the_token_that_reaches_it():
    """Probabilities 1/2, 1/4, 1/8, 1/8. p = 0.5 is reached by the first alone; anything more takes the second too."""
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    one, zero = torch.tensor([1.0]), torch.tensor([0])
    for top_p, kept in [(0.01, [1.0]), (0.49, [1.0]), (0.51, [2 / 3, 1 / 3]), (0.76, [4 / 7, 2 / 7, 1 / 7])]:
        found, _ = filtered_probabilities(logits, one, zero, torch.tensor([top_p]))
        assert found[0, : len(kept)].tolist() == pytest.approx(kept, rel=1e-6)
        assert found[0, len(kept) :].sum() == 0


def test_top_k_of_equal_logits_keeps_exactly_k():
    found, _ = filtered_probabilities(torch.zeros(1, 6), torch.tensor([1.0]), torch.tensor([2]), torch.tensor([1.0]))
    assert found[0].tolist() == [0.5, 0.5, 0, 0, 0, 0]


def test_logits_of_minus_infinity_are_never_drawn():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0]]).expand(500, -1)
    drawn = sample(logits, requests_of(500, temperature=1.0), [0] * 500).tolist()
    assert set(drawn) == {1, 3}


def test_tiny_temperature_is_the_argmax():
    """1e-6: exponents of a million; no overflow, no NaN."""
    assert set(draw(50, temperature=1e-6)) == {1}


def test_uniforms_are_uniform_and_independent():
    """4,000 ids at one position, one id at 4,000 positions: ten bins of 400 each (chi-square, 9 degrees: 27.88), and
    no correlation of neighbours (standard error 0.016)."""
    by_id = uniforms(requests_of(4000), [0] * 4000)
    by_position = uniforms(requests_of(1) * 4000, range(4000))
    for u in (by_id, by_position):
        assert 0 <= u.min() and u.max() < 1
        counts = torch.histc(u.float(), 10, 0, 1)
        assert ((counts - 400) ** 2 / 400).sum() < 27.88
        assert abs(torch.corrcoef(torch.stack([u[:-1], u[1:]]))[0, 1]) < 0.06
    assert len({*by_id.tolist(), *by_position.tolist()}) == 7999  # r0 at position 0 is in both


def test_uniforms_depend_on_seed_id_and_position():
    def one(seed, name, position):
        return uniforms([Request(name, (1,), SamplingParams(seed=seed))], [position]).item()

    assert one(1, "a", 2) == one(1, "a", 2)
    assert len({one(1, "a", 2), one(2, "a", 2), one(1, "b", 2), one(1, "a", 3), one(12, "a", 2)}) == 5
