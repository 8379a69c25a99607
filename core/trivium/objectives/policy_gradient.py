"""Policy gradients on the policy's own samples: clipped ratios, a penalty for leaving the reference.

PPO: Schulman et al. 2017, https://arxiv.org/abs/1707.06347, equation 7. GRPO: Shao et al. 2024,
https://arxiv.org/abs/2402.03300. DAPO (two clip bounds, token mean): Yu et al. 2025, https://arxiv.org/abs/2503.14476.
GSPO (sequence ratio): Zheng et al. 2025, https://arxiv.org/abs/2507.18071. KL estimators: Schulman 2020,
http://joschu.net/blog/kl-approx.html.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from trivium.objectives.config import GRPOConfig
from trivium.objectives.logprobs import (
    count_targets,
    segment_index,
    segment_sums,
    spread,
    target_logprobs,
)
from trivium.objectives.protocol import Forward, Objective
from trivium.types import IGNORE, LossOutput, Metric, RolloutBatch, TokenBatch


def kl_estimates(logp: Tensor, reference: Tensor, kind: str) -> Tensor:
    """Per-token estimates of KL(policy || reference) from samples of the policy; named by value, and by gradient.

    k1 = log pi - log ref: unbiased; as a loss its expected gradient is 0. k2 = k1^2 / 2: as a loss it has the gradient
    of KL(pi || ref). k3 = exp(-k1) - 1 + k1: unbiased, never negative; as a loss it has the gradient of KL(ref || pi).
    k3+: the value of k3 with the gradient of k2.

    >>> [round(kl_estimates(torch.tensor(-1.0), torch.tensor(-2.0), k).item(), 4) for k in ("k1", "k2", "k3")]
    [1.0, 0.5, 0.3679]
    """
    k1 = logp - reference
    if kind == "k1":
        return k1
    k2 = k1**2 / 2
    if kind == "k2":
        return k2
    k3 = torch.expm1(-k1) + k1
    if kind == "k3":
        return k3
    assert kind == "k3+", kind
    return k3.detach() + k2 - k2.detach()


def clipped_loss(log_ratio: Tensor, advantage: Tensor, low: float, high: float, dual: float = 0.0) -> Tensor:
    """-min(r A, clip(r, 1 - low, 1 + high) A) with r = exp(log_ratio).

    dual: if above 1, the loss of a bad sample (A < 0) is at most dual * |A| (1912.09729, equation 5).

    >>> one = torch.tensor([0.5]).log(), torch.tensor([-1.0])
    >>> clipped_loss(*one, 0.2, 0.2)  # min(-0.5, -0.8): the clipped one
    tensor([0.8000])
    """
    ratio = log_ratio.exp()
    loss = -torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)
    return torch.where(advantage < 0, loss.clamp(max=-dual * advantage), loss) if dual else loss


class GRPO(Objective):
    """Clipped policy gradient with group advantages. What each unit is follows from `aggregate`."""

    unit: ClassVar[str] = "sampled token"
    reads: ClassVar[str] = "answers"
    batch: ClassVar[type[TokenBatch]] = RolloutBatch
    phases: ClassVar[frozenset[str]] = frozenset({"rlhf"})
    config: GRPOConfig

    @property
    def companions(self) -> tuple[str, ...]:
        return ("reference",) if self.config.kl_weight else ()

    @property
    def at_start(self) -> Mapping[str, float]:
        return {"ratio": 1.0} | ({"kl": 0.0} if self.companions else {})

    def count(self, batch: RolloutBatch) -> Tensor:
        if self.config.aggregate == "token_mean":
            return count_targets(batch.labels)
        samples = (segment_sums(_ones(batch), batch) > 0).sum()
        return samples * batch.max_tokens if self.config.aggregate == "constant" else samples

    def consult(self, batch: RolloutBatch, models: Mapping[str, Forward]) -> None:
        if batch.old is None:
            batch.old = spread(target_logprobs(models["policy"], batch, batch.temperature), batch.labels)
        if batch.reference is None and "reference" in models:
            batch.reference = spread(target_logprobs(models["reference"], batch, batch.temperature), batch.labels)

    def __call__(self, forward: Forward, batch: RolloutBatch) -> LossOutput:
        c = self.config
        assert batch.old is not None and batch.advantage is not None, "consult() comes first"
        trained = batch.labels[:, 1:] != IGNORE
        logp = target_logprobs(forward, batch, batch.temperature)
        index = segment_index(batch)
        lengths = segment_sums(_ones(batch), batch).flatten()
        log_ratio = logp - batch.old[:, 1:][trained]
        if c.ratio == "sequence":  # exp of the mean, with the gradient spread over the sequence's tokens (GSPO)
            log_ratio = (segment_sums(log_ratio, batch).flatten() / lengths.clamp(min=1))[index]
        advantage = batch.advantage.flatten()[index]
        loss = clipped_loss(log_ratio, advantage, c.clip_low, c.clip_high, c.dual_clip)
        ratio = log_ratio.detach().exp()
        tokens = torch.as_tensor(len(logp), device=logp.device)
        outside = (ratio < 1 - c.clip_low) | (ratio > 1 + c.clip_high)
        figures = {"ratio": ratio, "clipped": outside.float(), "entropy": -logp.detach()}
        if self.companions:
            assert batch.reference is not None
            reference = batch.reference[:, 1:][trained]
            loss = loss + c.kl_weight * kl_estimates(logp, reference, c.kl)
            figures["kl"] = kl_estimates(logp.detach(), reference, "k3")
        if c.aggregate == "seq_mean_token_mean":
            loss = loss / lengths[index]
        return LossOutput(loss.sum(), {k: Metric(v.sum(), tokens) for k, v in figures.items()})


def _ones(batch: TokenBatch) -> Tensor:
    return torch.ones(int(count_targets(batch.labels)), device=batch.tokens.device)
