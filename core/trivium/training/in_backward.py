"""The optimizer's step in the backward pass: a parameter is stepped when its gradient comes, and the gradient let go.

No two gradients are held at once (Lv et al. 2023, https://arxiv.org/abs/2306.09782, section 3.1). What needs them
all together (clipping, accumulation, the guard, averaging over processes) cannot be had with it.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trivium.errors import ConfigError


class StepInBackward:
    """Hooks on every trained parameter. `norms` holds the gradient norms of the newest step, by parameter name."""

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        if not type(optimizer).__module__.startswith("torch.optim"):
            raise ConfigError(
                f"trainer.step_in_backward=true steps one parameter at a time, which {type(optimizer).__name__} cannot "
                "do; choose optim=adamw or optim=sgd"
            )
        self.norms: dict[str, Tensor] = {}
        self._optimizer = optimizer
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(partial(self._step, name))

    @torch.no_grad()
    def _step(self, name: str, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self.norms[name] = parameter.grad.norm(dtype=torch.promote_types(parameter.dtype, torch.float32))
        self._optimizer.step()  # every other gradient is None, and what has none is passed over
        parameter.grad = None
