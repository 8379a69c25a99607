"""Next-token cross-entropy, for pretraining on every token and for tuning on the assistant's.

loss_sum = sum_t m_t * (-log p(y_t | y_<t)), with options; divided by sum_t m_t of the whole global batch elsewhere.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from trivium.objectives.config import NextTokenConfig, SFTConfig
from trivium.objectives.logprobs import count_targets, logprobs, shift, token_origins, token_sums
from trivium.objectives.protocol import Forward, Objective
from trivium.types import LossOutput, Metric, TokenBatch


class NextToken(Objective):
    """Cross-entropy with optional z-loss (2204.02311, section 5) and label smoothing (1512.00567, section 7)."""

    phases: ClassVar[frozenset[str]] = frozenset({"pretrain"})
    config: NextTokenConfig

    def count(self, batch: TokenBatch) -> Tensor:
        return count_targets(batch.labels)

    def __call__(self, forward: Forward, batch: TokenBatch) -> LossOutput:
        states, targets = shift(self.hidden(forward, batch), batch.labels)
        origin, names = token_origins(batch), batch.origins
        parts = None if origin is None else (origin, len(names) + 1)
        loss_sum, nll, *apart = token_sums(forward.head, states, targets, self.token_loss, parts=parts)
        metrics = {"nll": Metric(nll.detach(), torch.as_tensor(targets.numel(), device=nll.device))}
        if origin is not None:
            counts = origin.new_zeros(len(names) + 1).index_add(0, origin, torch.ones_like(origin))
            for name, total, count in zip(names, apart, counts, strict=False):  # the last is of those without a name
                metrics[f"loss/{name}"] = Metric(total.detach(), count)
        return LossOutput(loss_sum, metrics)

    def hidden(self, forward: Forward, batch: TokenBatch) -> Tensor:
        """(B, T, C) states of the batch."""
        return forward(batch.tokens, batch.positions, batch.segments)

    def token_loss(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """(N, V), (N,) -> loss and negative log-likelihood of each token, (N,) each."""
        nll = -logprobs(logits, targets)
        loss = nll
        if self.config.label_smoothing:
            uniform = -torch.log_softmax(logits, dim=-1).mean(-1)
            loss = (1 - self.config.label_smoothing) * loss + self.config.label_smoothing * uniform
        if self.config.z_loss:
            loss = loss + self.config.z_loss * torch.logsumexp(logits, dim=-1) ** 2
        return loss, nll


class SFT(NextToken):
    """Cross-entropy on what the assistant wrote; which tokens those are is in the labels."""

    reads: ClassVar[str] = "chat"
    phases: ClassVar[frozenset[str]] = frozenset({"sft"})
    config: SFTConfig

    def hidden(self, forward: Forward, batch: TokenBatch) -> Tensor:
        """As next token, with NEFTune's noise on the embeddings while training (2310.05914, algorithm 1)."""
        if not self.config.neftune_alpha or not forward.training:
            return super().hidden(forward, batch)
        # L is the length of each token's own document, so packing does not change the noise's size
        real = batch.segments if batch.segments is not None else torch.ones_like(batch.tokens)
        lengths = (real[:, :, None] == real[:, None, :]).sum(-1, keepdim=True)

        def noisy(_module: object, _inputs: object, embedded: Tensor) -> Tensor:
            size = self.config.neftune_alpha / (lengths * embedded.shape[-1]) ** 0.5
            return embedded + torch.empty_like(embedded).uniform_(-1, 1) * size

        handle = forward.embed.register_forward_hook(noisy)
        try:
            return super().hidden(forward, batch)
        finally:
            handle.remove()

    def token_loss(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        loss, nll = super().token_loss(logits, targets)
        return (loss * (-nll).detach().exp() if self.config.dft else loss), nll
