"""The sampler against distributions that are enumerated by hand."""

import math

import pytest
import torch

from trivium.inference.sampling import Place, adjusted, filtered_probabilities, sample, sample_places, uniforms
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


@pytest.mark.parametrize("top_p", [5e-324, 1e-46, 1e-30])
def test_top_p_that_rounds_to_nothing_keeps_the_likeliest(top_p):
    """The first two are 0 in fp32: all was cut, and the token drawn was one beyond the vocabulary."""
    drawn = sample(
        torch.tensor([[0.0, 2.0, 1.0]]), [Request("a", (1,), SamplingParams(temperature=1.0, top_p=top_p))], [0]
    )
    assert drawn.tolist() == [1]


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


# ---- every parameter, in the order that SamplingParams states


PENALTIES = {"repetition_penalty": 2.0, "presence_penalty": 0.25, "frequency_penalty": 0.5}


def place_of(params, prompt=(), answer=(), name="r0", constraint=None):
    return Place(Request(name, tuple(prompt), params), [*prompt, *answer], len(prompt), constraint)


def adjusted_row(logits, params, prompt=(), answer=()):
    return adjusted(torch.tensor([logits]), [place_of(params, prompt, answer)])[0].tolist()


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits():
    """At 2: 3 -> 1.5, -1 -> -2, of tokens in the prompt (0) or the answer (1), once however often; others stay."""
    params = SamplingParams(repetition_penalty=2.0)
    assert adjusted_row([3.0, -1.0, 3.0, -1.0], params, [0, 0, 0], [1, 1]) == [1.5, -2.0, 3.0, -1.0]
    assert adjusted_row([3.0, -1.0], SamplingParams(repetition_penalty=0.5), [0], [1]) == [6.0, -0.5]


def test_presence_and_frequency_count_the_answer_alone():
    """Token 1 twice in the answer: - 0.25 - 2 * 0.5; token 2 once: - 0.25 - 0.5; token 0, in the prompt only, stays."""
    params = SamplingParams(presence_penalty=0.25, frequency_penalty=0.5)
    assert adjusted_row([1.0, 1.0, 1.0, 1.0], params, [0, 0], [1, 2, 1]) == [1.0, -0.25, 0.25, 1.0]
    assert adjusted_row([1.0, 1.0], SamplingParams(presence_penalty=-1.0), [0], [1]) == [1.0, 2.0]


def test_bias_comes_before_the_penalties():
    """Token 0: (1 + 2 + 1) / 2 - 0.25 - 0.5 = 1.25 (after the penalties it would be 2.75); token 1: (1 - 3) * 2 -
    0.75 = -4.75; token 2 is named with 5 and not seen: 1 + 5."""
    params = SamplingParams(**PENALTIES, logit_bias=((0, 2.0), (1, -3.0), (0, 1.0), (2, 5.0)))
    assert adjusted_row([1.0, 1.0, 1.0, 1.0], params, [], [0, 1]) == [1.25, -4.75, 6.0, 1.0]
    assert adjusted_row([1.0, 2.0], SamplingParams(logit_bias=((1, -math.inf),))) == [1.0, -math.inf]


def test_what_is_forbidden_comes_after_bias_and_penalties():
    """A stop id before min_tokens is not drawn whatever its bias, nor what a constraint forbids."""

    class Only:
        def forbid(self, logits):
            logits[[0, 1]] = -torch.inf

    params = SamplingParams(min_tokens=2, stop_ids=(2,), logit_bias=((2, 100.0), (0, 100.0)))
    row = [1.0, 2.0, 3.0, 0.5]
    assert adjusted_row(row, params, [3], [3]) == [101.0, 2.0, -math.inf, 0.5]
    assert adjusted_row(row, params, [3], [3, 3]) == [101.0, 2.0, 103.0, 0.5]
    bound = place_of(params, [3], [3], constraint=Only())
    assert adjusted(torch.tensor([row]), [bound])[0].tolist() == [-math.inf, -math.inf, -math.inf, 0.5]
    (drawn,) = sample_places(torch.tensor([row]), [bound])
    assert drawn.token == 3


def test_nothing_asked_changes_nothing():
    """The very tensor: no copy of (B, V) for a batch that wants none, and the caller's logits are never written to."""
    logits = torch.tensor([LOGITS, LOGITS])
    places = [place_of(SamplingParams(temperature=1.0, top_k=3)), place_of(SamplingParams(min_tokens=3))]
    assert adjusted(logits, places) is logits
    before = logits.clone()
    changed = adjusted(logits, [place_of(SamplingParams(**PENALTIES, logit_bias=((0, 1.0),)), [1], [2]), places[1]])
    assert torch.equal(logits, before)
    assert torch.equal(changed[1], before[1]) and not torch.equal(changed[0], before[0])


def fully_enumerated(p, prompt, answer):
    """SamplingParams' docstring in plain Python over LOGITS: token -> probability, and the mass that the cuts left."""
    x = list(LOGITS)
    for token, value in p.logit_bias:
        x[token] += value
    for t in range(len(x)):
        if t in (*prompt, *answer):
            x[t] = x[t] / p.repetition_penalty if x[t] > 0 else x[t] * p.repetition_penalty
        x[t] -= p.presence_penalty * (t in answer) + p.frequency_penalty * answer.count(t)
    allowed = {t: v for t, v in enumerate(x) if not (t in p.stop_ids and len(answer) < p.min_tokens)}
    weights = {t: math.exp(v / p.temperature) for t, v in allowed.items()}
    whole = sum(weights.values())
    ranked = sorted(weights, key=lambda t: -weights[t])[: p.top_k or None]
    total, mass, kept = sum(weights[t] for t in ranked), 0.0, []
    for t in ranked:
        kept.append(t)
        mass += weights[t] / total
        if mass >= p.top_p:
            break
    kept = [t for t in kept if weights[t] >= p.min_p * weights[kept[0]]]
    left = sum(weights[t] for t in kept)
    return {t: weights[t] / left for t in kept}, left / whole


FULL = [
    {"temperature": 1.0, "min_p": 0.2},
    {"temperature": 2.0, "min_p": 0.45, "top_p": 0.95},
    {"temperature": 1.3, "min_p": 0.1, "top_k": 6, "top_p": 0.9},
    {"temperature": 0.8, **PENALTIES},
    {
        "temperature": 1.5,
        **PENALTIES,
        "logit_bias": ((2, 2.5), (5, -1.0), (1, -0.5)),
        "min_tokens": 4,
        "stop_ids": (7,),
    },
    {
        **{"temperature": 1.5, **PENALTIES, "logit_bias": ((2, 2.5), (5, -1.0)), "min_tokens": 4, "stop_ids": (7,)},
        **{"top_k": 6, "top_p": 0.93, "min_p": 0.15},
    },
]


@pytest.mark.parametrize("options", FULL, ids=str)
def test_all_steps_together_follow_the_enumerated_distribution(options):
    """4,000 draws by chi-square; of every one its own log-probability, and the kept mass, to 1e-5 (fp32 logits)."""
    prompt, answer = (1, 4), [5, 0, 5]
    params = SamplingParams(**options)
    expected, mass = fully_enumerated(params, prompt, answer)
    assert 2 < len(expected) < 9
    places = [place_of(params, prompt, answer, name=f"r{i}") for i in range(DRAWS)]
    drawn = sample_places(torch.tensor([LOGITS]).expand(DRAWS, -1), places)
    tokens = [d.token for d in drawn]
    chi2 = sum((tokens.count(t) - DRAWS * p) ** 2 / (DRAWS * p) for t, p in expected.items())
    assert set(tokens) <= set(expected) and chi2 < CHI2[len(expected) - 1]
    raw = torch.tensor(LOGITS).double().log_softmax(-1).tolist()
    for one in drawn[:200]:
        assert one.drawn_logprob == pytest.approx(math.log(expected[one.token]), abs=1e-5)
        assert one.kept == pytest.approx(mass, abs=1e-5)
        assert one.logprob == pytest.approx(raw[one.token], abs=1e-5)


def test_kept_mass_and_logprobs_by_hand():
    """Probabilities 1/2, 1/4, 1/8, 1/8 with top_k=2: 3/4 is kept, of which token 0 is 2/3. Greedy keeps all, and draws
    with probability 1. `logprob` and `top` are of the unmodified distribution, whatever the temperature and bias."""
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    seen = set()
    for i in range(20):
        params = SamplingParams(temperature=1.0, top_k=2, top_logprobs=2)
        (d,) = sample_places(logits, [place_of(params, name=f"n{i}")])
        seen.add(d.token)
        assert d.kept == pytest.approx(0.75)
        assert math.exp(d.drawn_logprob) == pytest.approx([2 / 3, 1 / 3][d.token])
        assert math.exp(d.logprob) == pytest.approx([1 / 2, 1 / 4][d.token])
        assert [(t, pytest.approx(math.exp(x))) for t, x in d.top] == [(0, 1 / 2), (1, 1 / 4)]
    assert seen == {0, 1}
    params = SamplingParams(temperature=0.0, top_k=2, logit_bias=((3, 9.0),), top_logprobs=9)
    (d,) = sample_places(logits, [place_of(params)])
    assert (d.token, d.drawn_logprob, d.kept) == (3, 0.0, 1.0) and math.exp(d.logprob) == pytest.approx(1 / 8)
    assert [t for t, _ in d.top][:2] == [0, 1] and len(d.top) == 4  # no more than there are


WIDE = 1500
"""Tokens, of which 512 are sorted first."""


@pytest.mark.parametrize(
    "options",
    [
        {"top_p": 0.5}, {"top_p": 0.97}, {"top_p": 0.9999}, {"top_k": 700}, {"top_k": 512}, {"top_k": 40, "top_p": 0.9},
        {"min_p": 0.3}, {"min_p": 0.02, "top_p": 0.999}, {"top_k": 600, "top_p": 0.9},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("spread", [0.1, 1.0, 4.0])
def test_few_sorted_first_equal_the_full_sort(options, spread, monkeypatch):
    """Peaked rows end within the 512 likeliest, flat ones do not, and both are drawn together: the same tokens and
    masses as when everything is sorted at once."""
    generator = torch.Generator().manual_seed(1)
    logits = spread * torch.randn(16, WIDE, generator=generator)
    logits[::2] *= 3
    places = [place_of(SamplingParams(temperature=1.0, **options), name=f"w{i}") for i in range(16)]
    few = sample_places(logits, places)
    alone = [sample_places(logits[i : i + 1], [places[i]])[0] for i in range(16)]
    monkeypatch.setattr("trivium.inference.sampling.FEW", WIDE)
    whole = sample_places(logits, places)
    assert [d.token for d in few] == [d.token for d in whole] == [d.token for d in alone]
    for one, other in zip(few, whole, strict=True):
        assert one.kept == pytest.approx(other.kept, abs=1e-9)
        assert one.drawn_logprob == pytest.approx(other.drawn_logprob, abs=1e-9)


def test_row_without_a_possible_token_fails_alone():
    """NaN, infinite, all forbidden: errors that say which; the neighbours draw what they draw without them."""
    good = [place_of(SamplingParams(temperature=1.0, top_p=0.9), name=f"g{i}") for i in range(3)]
    nothing = place_of(SamplingParams(logit_bias=tuple((t, -math.inf) for t in range(8))), name="none")
    plain = place_of(SamplingParams(temperature=1.0), name="bad")
    rows = torch.tensor([LOGITS] * 6)
    rows[1, 3], rows[4, 0] = torch.nan, torch.inf
    found = sample_places(rows, [good[0], plain, good[1], nothing, plain, good[2]])
    assert [str(found[i]) for i in (1, 3, 4)] == [
        "the model's logits are not finite",
        "no token is allowed to come next",
        "the model's logits are not finite",
    ]
    assert [found[i] for i in (0, 2, 5)] == sample_places(torch.tensor([LOGITS] * 3), good)


def test_logits_that_are_not_finite_are_no_token_even_when_forbidden():
    """A bias of minus infinity on the NaN does not make it well."""
    rows = torch.tensor([[1.0, torch.nan, 2.0]])
    (found,) = sample_places(rows, [place_of(SamplingParams(logit_bias=((1, -math.inf),)))])
    assert str(found) == "the model's logits are not finite"
