"""Optimizers: always one object for the whole model, so there is one step and one state to save.

Here are those of torch, and what is done with every one of them; each of ours has a file of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trivium.errors import CheckpointError
from trivium.training.config import AdafactorConfig, AdamWConfig
from trivium.training.groups import parameter_groups


def adamw(config: AdamWConfig, model: nn.Module) -> Optimizer:
    """AdamW, fused: one kernel for all parameters."""
    groups = parameter_groups(config, model)
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


def adafactor(config: AdafactorConfig, model: nn.Module) -> Optimizer:
    """Adafactor, torch's. It looks at norms on the host, so it waits for the device several times a step."""
    groups = parameter_groups(config, model)
    decay, eps = config.beta2_decay, (None, config.eps)
    return torch.optim.Adafactor(groups, lr=config.lr, beta2_decay=decay, eps=eps, d=config.clip)


def set_rates(optimizer: Optimizer, factor: float) -> float:
    """Give every group its own peak rate times `factor`; returns the rate of parameters without a pattern."""
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("peak_lr", group["lr"]) * factor
    return optimizer.defaults["lr"] * factor


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


def keep_where(bad: Tensor | None, old: Sequence[Tensor], new: Sequence[Tensor]) -> None:
    """Write `new` into `old`, unless `bad` is 1.0: then every bit of `old` stays, whatever `new` holds.

    The host does not wait. None is a step that nobody judged.
    """
    for before, after in zip(old, new, strict=True):
        before.copy_(after if bad is None else torch.where(bad.to(before.device) > 0, before, after))


UNTOUCHED = "untouched"
"""The one entry (no element) of a parameter that has no state yet, so that a checkpoint still names it."""


def named(optimizer: Optimizer) -> dict[str, tuple[nn.Parameter, dict]]:
    """Parameter name -> the parameter and its group; in an optimizer that was given no names, its number instead."""
    found: dict[str, tuple[nn.Parameter, dict]] = {}
    for group in optimizer.param_groups:
        names = group.get("param_names") or map(str, range(len(found), len(found) + len(group["params"])))
        found |= {n: (p, group) for n, p in zip(names, group["params"], strict=True)}
    return found


def optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as flat tensors named "parameter.entry": all of it, so however it is grouped later."""
    constants = getattr(optimizer, "constants", ())
    tensors: dict[str, Tensor] = {}
    for name, (parameter, _) in named(optimizer).items():
        entries = {k: v for k, v in optimizer.state.get(parameter, {}).items() if k not in constants}
        for key, value in (entries or {UNTOUCHED: torch.empty(0)}).items():
            tensors[f"{name}.{key}"] = torch.as_tensor(value).detach()
    return tensors


def load_optimizer(optimizer: Optimizer, tensors: dict[str, Tensor], origin: str) -> None:
    """Put flat tensors back, bit for bit. Raises CheckpointError if they are not this optimizer's."""
    saved: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, entry = key.rpartition(".")
        saved.setdefault(name, {})[entry] = tensor
    parameters = named(optimizer)
    if saved.keys() != parameters.keys():
        odd = sorted(saved.keys() ^ parameters.keys())
        raise CheckpointError(
            f"{origin} holds the optimizer's state of {len(saved)} parameters, {len(parameters)} are trained; the "
            f"first that only one of them has is {odd[0]}"
        )
    optimizer.state.clear()
    begin = getattr(optimizer, "begin", None)
    for name, entries in saved.items():
        parameter, group = parameters[name]
        if UNTOUCHED in entries:
            continue
        if begin is not None:  # such as buffers of a special kind, to be filled
            begin(parameter)
        state = optimizer.state[parameter]
        for key, tensor in entries.items():
            state[key] = _placed(state.get(key), tensor, parameter, group, key)


def _placed(before: object, tensor: Tensor, parameter: Tensor, group: dict, key: str) -> Tensor | int:
    """A saved entry in its own format where the optimizer wants it: not in that of the weights, as torch has it."""
    if isinstance(before, int):
        return int(tensor)
    if isinstance(before, Tensor):
        return before.copy_(tensor)
    on_host = key == "step" and not (group.get("fused") or group.get("capturable"))  # where torch keeps it
    return tensor.clone() if on_host else tensor.to(parameter.device, copy=True)
