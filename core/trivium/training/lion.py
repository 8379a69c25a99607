"""Lion: the sign of a momentum (Chen et al. 2023, https://arxiv.org/abs/2302.06675, algorithm 2)."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import Optimizer

from trivium.training.config import LionConfig
from trivium.training.groups import parameter_groups
from trivium.training.optim import keep_where


class Lion(Optimizer):
    """Weights move by lr against sign(beta1 m + (1 - beta1) g); then m becomes beta2 m + (1 - beta2) g."""

    _step_supports_amp_scaling = True  # a flag `found_inf` of 1.0 is a step not taken, read on the device

    def __init__(self, groups: list[dict], lr: float, beta1: float, beta2: float) -> None:
        super().__init__(groups, {"lr": lr, "betas": (beta1, beta2), "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        bad = getattr(self, "found_inf", None)
        for group in self.param_groups:
            rate, (beta1, beta2) = group["lr"], group["betas"]
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["exp_avg"] = torch.zeros_like(weight)
                momentum = state["exp_avg"]
                direction = momentum.lerp(weight.grad, 1 - beta1).sign_()
                moved = (weight * (1 - rate * group["weight_decay"])).add_(direction, alpha=-rate)
                keep_where(bad, (weight, momentum), (moved, momentum.lerp(weight.grad, 1 - beta2)))


def lion(config: LionConfig, model: nn.Module) -> Optimizer:
    """Lion with decoupled weight decay."""
    return Lion(parameter_groups(config, model), config.lr, config.beta1, config.beta2)
