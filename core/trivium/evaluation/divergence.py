"""How far a student is from its teacher: KL(teacher || student), nats a token, on what an assistant says or on text."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trivium.data.source import Example
from trivium.data.tokenizer import Tokenizer
from trivium.evaluation.intervals import Estimate, ratio_interval
from trivium.evaluation.pairs import packed
from trivium.models.protocol import CausalLM
from trivium.objectives.distill import divergence
from trivium.objectives.logprobs import chunk_logits, segment_sums, shift, token_values
from trivium.types import TokenBatch


@torch.no_grad()
def kl_to_teacher(
    student: CausalLM, teacher: CausalLM, tokenizer: Tokenizer, chats: Sequence[Example], *, resamples: int,
    confidence: float,
) -> Estimate:  # fmt: skip
    """Mean over all trained tokens of KL(teacher || student), with an interval over documents."""
    student.eval()
    teacher.eval()
    steps = packed(chats, tokenizer, min(student.context, teacher.context), "any", TokenBatch)
    device = next(student.parameters()).device
    teacher.to(device)

    def apart(batch: TokenBatch) -> Tensor:
        inputs = (batch.tokens, batch.positions, batch.segments)
        states, labels = shift(student(*inputs), batch.labels)
        theirs, _ = shift(teacher(*inputs), batch.labels)

        def value(logits: Tensor, here: Tensor) -> Tensor:
            return divergence(logits, chunk_logits(teacher.head, theirs[here]), 0.0)

        index = torch.arange(len(labels), device=device)
        return segment_sums(token_values(student.head, states, index, value), batch)

    def lengths(batch: TokenBatch) -> Tensor:
        _, labels = shift(batch.tokens[..., None], batch.labels)
        return segment_sums(torch.ones(len(labels), device=device), batch)

    sums, counts = steps.per_document(apart, device), steps.per_document(lengths, device)
    return ratio_interval(sums.tolist(), counts.tolist(), resamples=resamples, confidence=confidence)
