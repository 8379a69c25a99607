"""Divergence from a teacher: by hand, in plain probabilities, and through autograd of the dense formula in fp64."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import tiny_llama

from trivium.data.chat import Encoded
from trivium.data.collate import collate
from trivium.data.packing import table_of
from trivium.objectives.config import DistillConfig
from trivium.objectives.distill import Distill, divergence
from trivium.types import DistillBatch

VOCAB, PAD = 29, 0
EXACT = {"rtol": 0, "atol": 1e-12}
TEACHER = torch.tensor([[0.5, 0.5]], dtype=torch.float64).log()
STUDENT = torch.tensor([[0.75, 0.25]], dtype=torch.float64).log()


@pytest.mark.parametrize(
    ("beta", "expected"),
    [
        (0.0, 0.143841),  # KL(T || S) = 1/2 ln(2/3) + 1/2 ln 2
        (1.0, 0.130812),  # KL(S || T) = 3/4 ln(3/2) + 1/4 ln(1/2)
        # M = (0.675, 0.325): 0.3 [1/2 ln(.5/.675) + 1/2 ln(.5/.325)] + 0.7 [3/4 ln(.75/.675) + 1/4 ln(.25/.325)]
        (0.3, 0.3 * 0.065339 + 0.7 * 0.013429),
        (0.7, 0.7 * 0.011379 + 0.3 * 0.066620),  # M = (0.575, 0.425)
    ],
)
def test_divergence_by_hand(beta, expected):
    """Teacher (1/2, 1/2), student (3/4, 1/4). At 0.3, M with its weights swapped would give 0.050048, student and
    teacher swapped 0.027951; the right value is 0.029002."""
    assert divergence(STUDENT, TEACHER, beta).item() == pytest.approx(expected, abs=1e-6)


def written_out(student, teacher, beta, temperature=1.0):
    """numbers.md, section 9, in plain probabilities."""
    s, t = (student / temperature).softmax(-1), (teacher / temperature).softmax(-1)
    if beta == 0:
        return (t * (t / s).log()).sum(-1)
    if beta == 1:
        return (s * (s / t).log()).sum(-1)
    m = beta * t + (1 - beta) * s
    return beta * (t * (t / m).log()).sum(-1) + (1 - beta) * (s * (s / m).log()).sum(-1)


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_divergence_and_its_gradient_equal_plain_probabilities(beta):
    torch.manual_seed(0)
    student, teacher = torch.randn(7, 11, dtype=torch.float64), 2 * torch.randn(7, 11, dtype=torch.float64)
    one, other = student.clone().requires_grad_(), student.clone().requires_grad_()
    weights = torch.rand(7, dtype=torch.float64)
    found, expected = divergence(one, teacher, beta), written_out(other, teacher, beta)
    torch.testing.assert_close(found, expected, **EXACT)
    (weights * found).sum().backward()
    (weights * expected).sum().backward()
    torch.testing.assert_close(one.grad, other.grad, **EXACT)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_equal_logits_diverge_by_nothing(beta):
    """A KL, not a cross-entropy, which would be the entropy (about 2 nats here); logits may differ by a constant."""
    torch.manual_seed(0)
    logits = torch.randn(5, 11, dtype=torch.float64)
    same = (logits + 3.0).requires_grad_()
    found = divergence(same, logits, beta)
    torch.testing.assert_close(found, torch.zeros(5, dtype=torch.float64), **EXACT)
    found.sum().backward()
    torch.testing.assert_close(same.grad, torch.zeros(5, 11, dtype=torch.float64), **EXACT)


@pytest.mark.parametrize("beta", [0.01, 0.3, 0.5, 0.99])
def test_jensen_shannon_is_bounded(beta):
    """By the entropy of (b, 1-b), at most ln 2: reached where student and teacher never agree. Finite at logits of 60.

    M is then bT on the teacher's token: b ln(1/b) + (1-b) ln(1/(1-b)).
    """
    student, teacher = torch.tensor([[60.0, 0.0, -60.0]]).double(), torch.tensor([[-60.0, 0.0, 60.0]]).double()
    bound = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
    assert bound <= math.log(2) + 1e-15
    assert divergence(student, teacher, beta).item() == pytest.approx(bound, abs=1e-12)
    torch.manual_seed(0)
    some = divergence(5 * torch.randn(500, 11).double(), 5 * torch.randn(500, 11).double(), beta)
    assert (some > 0).all() and (some < bound).all()


# ---- the objective


def small_llama(seed, dim=16, tied=True):
    return tiny_llama(VOCAB, seed, torch.float64, dim=dim, init_std=0.4, tied=tied)


def documents():
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(1, VOCAB, (n,), generator=generator).tolist() for n in (7, 4, 9)]
    return [Encoded(d, [i >= 2 for i in range(len(d))]) for d in ids]


def batch_of(rows=((2, 1), (0,)), length=14):
    return collate(table_of(documents(), ["a", "b", "c"]), rows, length, PAD, DistillBatch)


def dense_logits(model, document):
    """Logits before each trained token, the document alone in a row."""
    tokens = torch.tensor([document.ids])
    logits = model.head(model(tokens, torch.arange(len(document.ids))[None]))[0, :-1]
    return logits[torch.tensor(document.trained[1:])]


@pytest.mark.parametrize(
    "config",
    [
        DistillConfig(),
        DistillConfig(beta=1.0),
        DistillConfig(beta=0.3, temperature=2.0),
        DistillConfig(beta=0.3, temperature=2.0, temperature_squared=True, ce_weight=0.25),
        DistillConfig(temperature=0.5, temperature_squared=True),
        DistillConfig(ce_weight=0.9),
    ],
    ids=str,
)
def test_packed_loss_and_gradients_equal_the_dense_formula(config):
    """(1 - w) T^2 D(student / T, teacher / T) + w * nll (at temperature 1), over 5 + 2 + 7 tokens; fp64, to 1e-11.

    The teacher is wider than the student and has a head of its own; it gets no gradient.
    """
    student, teacher = small_llama(1), small_llama(2, dim=24, tied=False)
    expected = apart = 0
    for document in documents():
        s, t = dense_logits(student, document), dense_logits(teacher, document).detach()
        d = written_out(s, t, config.beta, config.temperature)
        scale = config.temperature**2 if config.temperature_squared else 1.0
        nll = F.cross_entropy(s, torch.tensor(document.ids[2:]), reduction="none")
        expected = expected + ((1 - config.ce_weight) * scale * d + config.ce_weight * nll).sum()
        apart += d.sum().item()
    expected.backward()
    wanted = [p.grad for p in student.parameters()]
    student.zero_grad()
    objective, batch = Distill(config), batch_of()
    with torch.no_grad():
        objective.consult(batch, {"teacher": teacher})
    output = objective(student, batch)
    output.loss_sum.backward()
    assert objective.count(batch).item() == 14
    torch.testing.assert_close(output.loss_sum, expected, rtol=0, atol=1e-11)
    for parameter, gradient in zip(student.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=1e-11)
    assert all(p.grad is None for p in teacher.parameters())
    # the figure is the divergence itself, whatever the loss makes of it
    assert output.metrics["divergence"].total.item() == pytest.approx(apart, rel=1e-9)
    assert output.metrics["divergence"].count.item() == 14


def test_teacher_sees_what_the_student_sees():
    """Packed, padded and alone, the teacher's states are the same: neighbours in the row never reach them."""
    teacher, found = small_llama(2), []
    for batch in (batch_of(), batch_of([[0, 1, 2]], 20), batch_of([[0], [1], [2]], 11)):
        with torch.no_grad():
            Distill(DistillConfig()).consult(batch, {"teacher": teacher})
            states = batch.teacher
        found.append(states)
    # the first lies in the order of documents 2, 1, 0, which have 7, 2 and 5 trained tokens
    in_order = found[0][[*range(9, 14), *range(7, 9), *range(7)]]
    for other in found[1:]:
        torch.testing.assert_close(in_order, other, rtol=0, atol=1e-10)
