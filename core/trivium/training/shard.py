"""Weights, gradients and optimizer state shared out among processes: FSDP2 (Zhao et al. 2023, 2304.11277).

Each block is a unit: its weights are gathered before it runs and let go after. What stands outside the blocks
(embedding, last norm, heads) is one unit more, gathered around the whole loss, not around the model's forward. So a
loss may use the head's weight as it likes, chunk by chunk, and a tied head needs no rule of its own.

With tensor parallelism (Shoeybi et al. 2019, 1909.08053) neighbours also share out the linear layers within a block and
compute them together, on the same rows; each share is then shared out again among the groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from trivium.errors import ConfigError
from trivium.models.protocol import CausalLM
from trivium.models.weights import local
from trivium.schema import RunConfig
from trivium.training.parallel import World

STYLES: dict[str, Callable[[], Any]] = {"columns": ColwiseParallel, "rows": RowwiseParallel}
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
    """A model whose weights are shared out among the processes of `world`.

    shares, share: of how many groups of processes, each with rows of its own, this process's is which. tensor: how many
    neighbours compute each block together.
    """

    def __init__(self, model: CausalLM, world: World, device: torch.device) -> None:
        self.share, self.shares, self.tensor = world.share, world.shares, world.tensor
        sizes, names = (world.shares, world.tensor), ("data", "tensor")
        mesh = init_device_mesh(device.type, sizes, mesh_dim_names=names)
        self._model, self._size, self._neighbours = model, world.size, mesh["tensor"].get_group()
        for block in model.blocks:
            if world.tensor > 1:
                styles = {name: STYLES[how]() for name, how in model.tensor_plan.items()}
                parallelize_module(block, mesh["tensor"], styles)
            fully_shard(block, mesh=mesh["data"])
        self._whole: Any = fully_shard(Gathered(model), mesh=mesh["data"])

    def copies(self, parameter: Tensor) -> int:
        """How many processes hold this process's share of it."""
        assert isinstance(parameter, DTensor)
        mesh, placements = parameter.device_mesh, parameter.placements
        cut = [mesh.size(d) for d, placement in enumerate(placements) if not placement.is_replicate()]
        return self._size // math.prod(cut)

    def settle(self) -> None:
        """Give neighbours the same gradients of what each of them holds whole (embedding, norms, head).

        They computed the same, but not every kernel of a GPU sums in the same order twice.
        """
        if self.tensor == 1:
            return
        for parameter in self._model.parameters():
            if parameter.grad is not None and self.copies(parameter) > 1:
                gradient = local(parameter.grad)
                torch.distributed.all_reduce(gradient, group=self._neighbours)
                gradient /= self.tensor

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
    return lambda model: _shared_out(model, world, device)


def _shared_out(model: CausalLM, world: World, device: torch.device) -> Shards:
    said = f"trainer.tensor_parallel={world.tensor}"
    if world.tensor > 1 and not model.tensor_plan:
        raise ConfigError(f"{said}: {type(model).__name__} has no tensor_plan, so its blocks cannot be shared out")
    for name, how in model.tensor_plan.items() if world.tensor > 1 else ():
        layer: Any = model.blocks.get_submodule(f"0.{name}")
        unit = getattr(model.blocks.get_submodule(f"0.{name}".rpartition(".")[0]), "width", 1)  # a head is not cut
        cut = layer.weight.shape[how == "rows"] // unit
        if cut % world.tensor:
            raise ConfigError(f"{said} does not divide the {cut} {'heads' if unit > 1 else 'columns'} of {name}")
    return Shards(model, world, device)
