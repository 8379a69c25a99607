"""Distillation: a student learns the teacher's whole distribution over the next token, not only the text's own token.

Hinton et al. 2015, https://arxiv.org/abs/1503.02531; generalised Jensen-Shannon divergence: Agarwal et al. 2023 (GKD),
https://arxiv.org/abs/2306.13649, equation 1. A divergence, not a cross-entropy: equal logits give 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from trivium.objectives.config import DistillConfig
from trivium.objectives.logprobs import chunk_logits, count_targets, logprobs, shift, token_sums
from trivium.objectives.protocol import Forward, Objective
from trivium.types import DistillBatch, LossOutput, Metric, TokenBatch


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of (N, V) log-probabilities, (N,)."""
    return (p.exp() * (p - q)).sum(-1)


def divergence(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """(N, V) logits each -> (N,) b KL(T || M) + (1-b) KL(S || M) with M = b T + (1-b) S, in nats.

    The ends are special. b = 0 is KL(T || S), forward: the student covers what the teacher can say. b = 1 is
    KL(S || T), reverse: the student says only what the teacher would. In between it is at most ln 2.

    >>> t, s = torch.tensor([[0.0, 0.0]]), torch.tensor([[math.log(3), 0.0]])  # 1/2, 1/2 and 3/4, 1/4
    >>> [round(divergence(s, t, b).item(), 4) for b in (0.0, 1.0)]  # ln(2/3)/2 + ln(2)/2; 3/4 ln(3/2) + 1/4 ln(1/2)
    [0.1438, 0.1308]
    """
    s, t = torch.log_softmax(student, -1), torch.log_softmax(teacher, -1)
    if beta == 0:
        return _kl(t, s)
    if beta == 1:
        return _kl(s, t)
    m = torch.logaddexp(t + math.log(beta), s + math.log1p(-beta))
    return beta * _kl(t, m) + (1 - beta) * _kl(s, m)


class Distill(Objective):
    """Divergence from the teacher on the trained tokens; `ce_weight` mixes in the text's own cross-entropy."""

    reads: ClassVar[str] = "any"
    batch: ClassVar[type[TokenBatch]] = DistillBatch
    phases: ClassVar[frozenset[str]] = frozenset({"distill"})
    config: DistillConfig

    @property
    def companions(self) -> tuple[str, ...]:
        return ("teacher",)

    @property
    def at_start(self) -> Mapping[str, float]:
        return {"divergence": 0.0}

    def count(self, batch: DistillBatch) -> Tensor:
        return count_targets(batch.labels)

    def consult(self, batch: DistillBatch, models: Mapping[str, Forward]) -> None:
        if batch.teacher is None:
            teacher = models["teacher"]
            batch.teacher, _ = shift(teacher(batch.tokens, batch.positions, batch.segments), batch.labels)
            batch.teacher_head = teacher.head

    def __call__(self, forward: Forward, batch: DistillBatch) -> LossOutput:
        c, states, head = self.config, batch.teacher, batch.teacher_head
        assert states is not None and head is not None, "consult() comes first"
        hidden, labels = shift(forward(batch.tokens, batch.positions, batch.segments), batch.labels)

        def token_loss(logits: Tensor, here: Tensor) -> tuple[Tensor, ...]:
            with torch.no_grad():
                wanted = chunk_logits(head, states[here])
            apart = divergence(logits / c.temperature, wanted / c.temperature, c.beta)
            nll = -logprobs(logits, labels[here])
            scaled = apart * c.temperature**2 if c.temperature_squared else apart
            return (1 - c.ce_weight) * scaled + c.ce_weight * nll, apart, nll

        index = torch.arange(len(labels), device=labels.device)
        loss_sum, apart, nll = token_sums(forward.head, hidden, index, token_loss)
        tokens = torch.as_tensor(len(labels), device=labels.device)
        figures = {"divergence": Metric(apart.detach(), tokens), "nll": Metric(nll.detach(), tokens)}
        return LossOutput(loss_sum, figures)
