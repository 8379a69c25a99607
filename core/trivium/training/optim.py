"""Optimizers: always one object for the whole model, so there is one step and one state to save."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trivium.errors import CheckpointError
from trivium.training.config import AdamWConfig


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two parameter groups: matrices decay; norms, biases and scalars (one dimension or none) do not."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return [g for g in groups if g["params"]]


def adamw(config: AdamWConfig, model: nn.Module) -> Optimizer:
    """AdamW, fused: one kernel for all parameters."""
    groups = decay_groups(model, config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


def set_rates(optimizer: Optimizer, factor: float) -> float:
    """Give every group its own peak rate times `factor`; returns the first group's rate."""
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("peak_lr", group["lr"]) * factor
    return optimizer.param_groups[0]["lr"]


def guarded_step(optimizer: Optimizer, bad: Tensor) -> None:
    """Take a step unless `bad` is 1.0: then weights, moments and step counts stay as they are.

    Optimizers that know such a flag (torch's fused ones, as for GradScaler, and ours) get it on the device; for others
    the host must wait for it.
    """
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.found_inf = bad  # type: ignore[attr-defined]
        optimizer.step()
    elif not bad:
        optimizer.step()


def optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as flat tensors named "parameter number.entry", where they are."""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{key}": torch.as_tensor(v) for i, entries in state.items() for key, v in entries.items()}


def load_optimizer(optimizer: Optimizer, tensors: dict[str, Tensor], origin: str) -> None:
    """Put flat tensors back. Raises CheckpointError if they are not this optimizer's."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        number, _, key = name.partition(".")
        state.setdefault(int(number), {})[key] = tensor
    numbers = [i for group in optimizer.state_dict()["param_groups"] for i in group["params"]]
    if sorted(state) != sorted(numbers):
        raise CheckpointError(f"{origin} holds the state of {len(state)} parameters, the optimizer has {len(numbers)}")
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
