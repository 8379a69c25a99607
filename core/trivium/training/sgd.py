"""Stochastic gradient descent with momentum, as torch's SGD without dampening (Sutskever et al. 2013).

Not torch's own: its fused one, the only one that knows the guard's flag, has known faults. On a CPU it skips weights of
bf16 and fp16 (https://github.com/pytorch/pytorch/issues/191763, torch up to 2.13), and if the first step must not be
taken it leaves the momentum as memory that nobody wrote.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import Optimizer

from trivium.training.config import SGDConfig
from trivium.training.groups import parameter_groups
from trivium.training.optim import keep_where


class SGD(Optimizer):
    """The decay is part of the gradient g; m becomes momentum m + g, and weights move by lr against it.

    Nesterov's moves against g + momentum m instead.
    """

    _step_supports_amp_scaling = True  # a flag `found_inf` of 1.0 is a step not taken, read on the device

    def __init__(self, groups: list[dict], lr: float, momentum: float, nesterov: bool) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        bad = getattr(self, "found_inf", None)
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                direction = weight.grad.add(weight, alpha=group["weight_decay"])
                if group["momentum"]:
                    state = self.state[weight]
                    if not state:
                        state["momentum_buffer"] = torch.zeros_like(weight)
                    moved = direction.add(state["momentum_buffer"], alpha=group["momentum"])
                    keep_where(bad, (state["momentum_buffer"],), (moved,))
                    direction = direction.add(moved, alpha=group["momentum"]) if group["nesterov"] else moved
                keep_where(bad, (weight,), (weight.add(direction, alpha=-group["lr"]),))


def sgd(config: SGDConfig, model: nn.Module) -> Optimizer:
    """SGD with momentum; its weight decay is L2, as is usual for it."""
    return SGD(parameter_groups(config, model), config.lr, config.momentum, config.nesterov)
