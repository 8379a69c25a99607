"""Weights in and out: safetensors only, every name, shape and value checked on the way in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from trivium.errors import CheckpointError
from trivium.models.names import difference
from trivium.models.protocol import CausalLM
from trivium.registry import MODELS


@dataclass(frozen=True)
class Share:
    """What one process holds of a tensor that is shared out: a block of it. offset: where in the whole it begins."""

    block: Tensor
    shape: tuple[int, ...]
    offset: tuple[int, ...]


def local(tensor: Tensor) -> Tensor:
    """This process's share of a tensor, in place: all of one that is not shared out."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shares_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor | Share]:
    """Tensors as they are, and of those that are shared out this process's part."""
    return {name: _share(tensor) if isinstance(tensor, DTensor) else tensor for name, tensor in tensors.items()}


def _share(tensor: DTensor) -> Share:
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return Share(tensor.to_local(), tuple(tensor.shape), tuple(offset))


def weights_of(model: nn.Module, *, keep: bool = True) -> dict[str, Tensor]:
    """Every parameter by name, a tied one once (under its first name), contiguous and on the CPU.

    Of a model that is shared out among processes all must call this; those with keep=False get nothing for it.
    """
    found = {}
    for name, parameter in model.named_parameters():
        tensor = parameter.detach()
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor  # gathered one at a time
        if keep:
            found[name] = whole.cpu().contiguous()
    return found


def family_of(model: CausalLM) -> str:
    """The name that its architecture is registered by; "" where it is not."""
    target = f"{type(model).__module__}:{type(model).__qualname__}"
    return next((name for name, entry in MODELS.items() if entry.target == target), "")


def hf_tensors(model: CausalLM) -> dict[str, Tensor]:
    """Every parameter under Hugging Face's name, the way it lies there; no copies, so some are not contiguous."""
    names, turned = model.hf_names(), model.hf_transposed or ("\0",)
    return {names[name]: t.t() if name.endswith(turned) else t for name, t in weights_of(model).items()}


def read_tensors(path: Path, like: Callable[[str], Tensor | None] | None = None) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises CheckpointError naming it when it cannot be read.

    like: name -> a tensor; where that one is shared out among processes, only this process's part is read.
    """
    try:
        if like is None:
            return load_file(path)
        with safe_open(path, "pt") as file:
            return {name: _read(file, name, like(name)) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors ({error})") from error


def _read(file: Any, name: str, like: Tensor | None) -> Tensor:
    if not isinstance(like, DTensor) or (whole := file.get_slice(name)).get_shape() != list(like.shape):
        return file.get_tensor(name)
    share = _share(like)
    here = tuple(slice(o, o + n) for o, n in zip(share.offset, share.block.shape, strict=True))
    block = whole[here] if share.block.numel() else file.get_tensor(name)[here]
    place = {"device_mesh": like.device_mesh, "placements": like.placements, "run_check": False}
    return DTensor.from_local(block.to(share.block.device), shape=like.shape, stride=like.stride(), **place)


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
def resize_vocabulary(model: CausalLM, new_size: int, used: int | None = None) -> None:
    """Grow the embedding and the head of `model` to `new_size` tokens; tied ones stay tied.

    used: of the old rows so many belong to tokens (all by default); the others are spare, and count as new.

    The new rows are the mean of the old ones: a new token is then about as likely as all others are on average
    (Hewitt 2021, https://nlp.stanford.edu/~johnhew/vocab-expansion.html). Optimizers built before hold the old ones.
    Raises CheckpointError where it would shrink, and for a model that is shared out among processes.
    """
    if new_size < model.vocab_size:
        raise CheckpointError(
            f"a vocabulary of {model.vocab_size} tokens cannot shrink to {new_size}; ids would be lost"
        )
    tied = model.head.weight is model.embed.weight
    for layer in (model.embed,) if tied else (model.embed, model.head):
        old = layer.weight
        if isinstance(old, DTensor):
            raise CheckpointError("the vocabulary grows before weights are shared out among processes, not after")
        kept = old[:used]
        mean = kept.float().mean(0, keepdim=True).to(old.dtype)
        grown = nn.Parameter(torch.cat([kept, mean.expand(new_size - len(kept), -1)]), old.requires_grad)
        layer.weight = grown
        if tied:
            model.head.weight = grown
    bias = model.head.bias
    if bias is not None:
        bias = bias[:used]
        model.head.bias = nn.Parameter(torch.cat([bias, bias.mean().expand(new_size - len(bias))]), bias.requires_grad)
    model.embed.num_embeddings = model.head.out_features = model.vocab_size = new_size


@torch.no_grad()
def load_weights(model: nn.Module, tensors: Mapping[str, Tensor], origin: str) -> None:
    """Put `tensors` into all of `model`."""
    copy_weights(dict(model.named_parameters()), tensors, origin)


@torch.no_grad()
def copy_weights(parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor], origin: str) -> None:
    """Put `tensors` into `parameters`; missing, unknown, misshapen and non-finite ones are refused before any copy."""
    check_names(parameters, tensors, origin)
    for name, parameter in parameters.items():
        check_tensor(name, tensors[name], parameter.shape, origin)
    for name, parameter in parameters.items():
        parameter.copy_(tensors[name])


def check_names(parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor], origin: str) -> None:
    """Refuse missing and unknown tensors."""
    if told := difference(parameters.keys(), tensors.keys()):
        raise CheckpointError(f"{origin} is of another architecture: it {told}")


def check_tensor(name: str, tensor: Tensor, shape: Sequence[int], origin: str) -> None:
    """Refuse a wrong shape and values that are not finite."""
    if tuple(tensor.shape) != tuple(shape):
        raise CheckpointError(
            f"{origin} is of another size: {name} is {tuple(tensor.shape)} there, {tuple(shape)} in the model"
        )
    if not all_finite(local(tensor)):
        raise CheckpointError(f"{origin}: {name} holds values that are not finite")


def all_finite(tensor: Tensor) -> bool:
    """Whether every value is finite. One that is not makes the sum so, in one pass without a copy; a sum may also
    overflow, and then each is looked at.

    >>> huge = torch.tensor([3e38, 3e38])
    >>> all_finite(huge), all_finite(torch.tensor([torch.inf, -torch.inf])), all_finite(huge * huge)
    (True, False, False)
    """
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


@torch.no_grad()
def fill_weights(
    model: nn.Module, tensors: Mapping[str, Tensor], origin: str, quantiser: Callable[[Any], nn.Module] | None = None
) -> None:
    """Give `tensors` to a model that was built on the meta device: at most one is held beside them.

    With the checks of `load_weights`; each tensor is asked for once and kept in fp32 (fp64 stays). quantiser: puts each
    linear layer of a block into few bits as soon as its weight is there, so the whole is never held.
    """
    parameters = dict(model.named_parameters())
    check_names(parameters, tensors, origin)
    places: dict[int, list[str]] = {}  # a parameter that has two names stays one
    for name, parameter in model.named_parameters(remove_duplicate=False):
        places.setdefault(id(parameter), []).append(name)
    for name, parameter in parameters.items():
        tensor = tensors[name]
        check_tensor(name, tensor, parameter.shape, origin)
        filled = nn.Parameter(tensor.to(torch.promote_types(tensor.dtype, torch.float32)).contiguous())
        for owner, _, last in (place.rpartition(".") for place in places[id(parameter)]):
            layer = model.get_submodule(owner)
            setattr(layer, last, filled)
            if quantiser and last == "weight" and owner.startswith("blocks.") and isinstance(layer, nn.Linear):
                model.set_submodule(owner, quantiser(layer))
