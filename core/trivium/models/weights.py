"""Weights in and out: safetensors only, every name, shape and value checked on the way in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from trivium.errors import CheckpointError


def weights_of(model: nn.Module, *, keep: bool = True) -> dict[str, Tensor]:
    """Every parameter by name, a tied one once (under its first name), contiguous and on the CPU.

    Of a model that is shared out among processes all must call this; those with keep=False get nothing for it.
    """
    whole = whole_tensors({name: p.detach() for name, p in model.named_parameters()}, keep=keep)
    return {name: tensor.cpu().contiguous() for name, tensor in whole.items()}


def whole_tensors(tensors: Mapping[str, Tensor], *, keep: bool = True) -> dict[str, Tensor]:
    """Tensors as they are; those that are shared out are gathered from all processes, to the CPU, one at a time."""
    found = {}
    for name, tensor in tensors.items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if keep:
            found[name] = whole.cpu() if isinstance(tensor, DTensor) else whole
    return found


def shared_like(whole: Tensor, like: Tensor) -> Tensor:
    """This process's share of a tensor that every process has whole, where `like` is shared out; else the tensor."""
    if not isinstance(like, DTensor):
        return whole
    whole = whole.to(like.device, like.dtype)
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises CheckpointError naming it when it cannot be read."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors ({error})") from error


def spread_layers(layers: int, kept: int) -> list[int]:
    """Which of `layers` to keep: `kept` of them, evenly spread from the first to the last.

    >>> spread_layers(5, 2), spread_layers(6, 3), spread_layers(12, 1)
    ([0, 4], [0, 2, 5], [0])
    """
    return [round(i * (layers - 1) / max(1, kept - 1)) for i in range(kept)]


def keep_layers(tensors: Mapping[str, Tensor], kept: Sequence[int]) -> dict[str, Tensor]:
    """The tensors of some blocks, renumbered in order, with everything outside blocks: a shallower model's start
    (DistilBERT: Sanh et al. 2019, https://arxiv.org/abs/1910.01108, section 3)."""
    new = {f"blocks.{old}.": f"blocks.{i}." for i, old in enumerate(kept)}
    found = {}
    for name, tensor in tensors.items():
        head = ".".join(name.split(".")[:2]) + "."
        if not name.startswith("blocks."):
            found[name] = tensor
        elif head in new:
            found[new[head] + name.removeprefix(head)] = tensor
    return found


@torch.no_grad()
def load_weights(model: nn.Module, tensors: Mapping[str, Tensor], origin: str) -> None:
    """Copy `tensors` into `model`; missing, unknown, wrongly shaped and non-finite ones are refused before any copy."""
    parameters = dict(model.named_parameters())
    missing, unknown = sorted(parameters.keys() - tensors.keys()), sorted(tensors.keys() - parameters.keys())
    if missing or unknown:
        parts = [f"lacks {_few(missing)}"] * bool(missing) + [f"has unknown {_few(unknown)}"] * bool(unknown)
        raise CheckpointError(f"{origin} is of another architecture: it {' and '.join(parts)}")
    for name, parameter in parameters.items():
        if tensors[name].shape != parameter.shape:
            raise CheckpointError(
                f"{origin} is of another size: {name} is {tuple(tensors[name].shape)} there, "
                f"{tuple(parameter.shape)} in the model"
            )
        if not torch.isfinite(tensors[name]).all():
            raise CheckpointError(f"{origin}: {name} holds values that are not finite")
    for name, parameter in parameters.items():
        parameter.copy_(shared_like(tensors[name], parameter))


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
