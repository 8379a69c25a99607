"""Experts that are evenly busy: the load-balance loss, exact however a step is cut and shared out.

Fedus et al. 2021 (https://arxiv.org/abs/2101.03961, equations 4 to 6), over all layers together as transformers has
it: E sum_e f_e P_e, where f_e is how many tokens a layer sends to expert e and P_e what its router gives it, both
means over layers and tokens. With k experts a token it is k for even loads. As a product of means it is no sum over
micro-batches unless one factor is known: f, which has no gradient, is counted over the whole step first. (With f of
all of a step, experts specialise better besides: Qiu et al. 2025, https://arxiv.org/abs/2501.11873.) Padding counts
nowhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trivium.errors import TrainingError
from trivium.models.experts import Routing, loads, routings
from trivium.models.protocol import CausalLM
from trivium.objectives.protocol import Objective
from trivium.types import LossOutput, Metric, TokenBatch


@dataclass(frozen=True)
class Balance:
    """One step's. count: what its loss is divided by. tokens: all of its, without padding. load: (L, E), how many each
    layer sends to each expert; None where the batch at hand is the whole step."""

    coefficient: float
    count: Tensor
    tokens: Tensor
    load: Tensor | None = None

    def __call__(self, objective: Objective, model: CausalLM, batch: TokenBatch) -> LossOutput:
        """What `objective` says of a batch, with the batch's part of the loss added."""
        with routings(model) as routed:
            output = objective(model, batch)
        if len(routed) != len(model.blocks):
            raise TrainingError(
                f"model.balance={self.coefficient} needs an objective that runs the model once a batch; "
                f"{type(objective).__name__} ran {len(routed)} layers of {len(model.blocks)}. Set model.balance=0"
            )
        real = real_tokens(batch)
        load = loads(routed, real) if self.load is None else self.load
        part, here = balance_sum(routed, real, load, self.tokens) / len(load), real.sum()
        busiest = (load.amax(1) / load.mean(1)).mean()
        metrics = {"balance": Metric(part.detach(), here), "expert_load": Metric(busiest * here, here)}
        price = self.coefficient * self.count.to(part.dtype) / self.tokens  # a mean over tokens, after the one division
        return LossOutput(output.loss_sum + price * part, {**output.metrics, **metrics})


def balance_sum(routed: Sequence[Routing], real: Tensor, load: Tensor, tokens: Tensor) -> Tensor:
    """The sum, over layers and a batch's real tokens, of E sum_e f_e p_e. real: (N,). load: (L, E), of all `tokens`."""
    experts = load.shape[1]
    fractions = load.sum(0) / (len(load) * tokens)
    weights = real.to(routed[0].probabilities.dtype)[:, None]
    given = torch.stack([(weights * r.probabilities).sum(0) for r in routed]).sum(
        0
    )  # no product: autocast rounds those
    return experts * (fractions.to(given.dtype) * given).sum()


def real_tokens(batch: TokenBatch) -> Tensor:
    """(B T,): 1 for a token, 0 for padding; fp64, or fp32 where there is none."""
    exact = torch.float32 if batch.tokens.device.type == "mps" else torch.float64
    real = torch.ones_like(batch.tokens) if batch.segments is None else batch.segments > 0
    return real.flatten().to(exact)


def load_of(model: CausalLM, batch: TokenBatch) -> Tensor:
    """(L, E): how many of a batch's tokens each layer sends to each expert."""
    with routings(model) as routed:
        model(batch.tokens, batch.positions, batch.segments)
    return loads(routed, real_tokens(batch))
