"""Weights, gradients and optimizer state shared out among processes: FSDP2 (Zhao et al. 2023, 2304.11277).

Each block is a unit: its weights are gathered before it runs and let go after. What stands outside the blocks
(embedding, last norm, heads) is one unit more, gathered around the whole loss, not around the model's forward. So a
loss may use the head's weight as it likes, chunk by chunk, and a tied head needs no rule of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from trivium.errors import ConfigError
from trivium.models.protocol import CausalLM
from trivium.schema import RunConfig
from trivium.training.parallel import World

ELEMENTWISE = ("adamw", "sgd", "lion")
"""Optimizers that treat each weight by itself, so that a share of the weights is as good as all of them."""


class Gathered(nn.Module):
    """Calls a function while the weights outside the blocks are whole."""

    def __init__(self, model: CausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., Any], *args: Any) -> Any:
        """`function(*args)`; tensors that need a backward pass must be reachable through tuples and dicts."""
        return function(*args)


class Shards:
    """A model whose weights are shared out among the processes of `mesh`."""

    def __init__(self, model: CausalLM, mesh: Any) -> None:
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        self._whole: Any = fully_shard(Gathered(model), mesh=mesh)

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """`function(*args)` with the outer weights whole; with gradient they stay so until the backward pass."""
        output = self._whole(function, *args)
        if not torch.is_grad_enabled():
            self._whole.reshard()  # or the next weights would not be seen
        return output

    def sync(self, on: bool) -> None:
        """Whether the next backward pass sums gradients over processes. Until then each holds all of them, whole."""
        self._whole.set_requires_gradient_sync(on)


def sharding(config: RunConfig, world: World, device: torch.device) -> Callable[[CausalLM], Shards] | None:
    """How to share out a model, or None where each process holds the whole. Raises ConfigError for what cannot be."""
    if config.trainer.strategy != "fsdp":
        return None
    said = "trainer.strategy=fsdp"
    if world.size == 1:
        raise ConfigError(f"{said} shares weights among processes, and there is one; set trainer.devices")
    if config.phase == "rlhf":
        raise ConfigError(f"{said} is not for phase=rlhf, whose processes sample by themselves; set strategy=ddp")
    if config.trainer.compile:
        raise ConfigError(f"{said} is not proven together with trainer.compile=true; set one of them")
    if config.optim.name not in ELEMENTWISE:
        raise ConfigError(
            f"optim={config.optim.name} is not proven on a share of the weights ({said}); "
            f"choose one of {', '.join(ELEMENTWISE)}, or trainer.strategy=ddp"
        )
    return lambda model: Shards(model, mesh_of(world, device))


def mesh_of(world: World, device: torch.device) -> Any:
    """All processes in a row."""
    return torch.distributed.init_device_mesh(device.type, (world.size,))  # type: ignore[reportPrivateImportUsage]
