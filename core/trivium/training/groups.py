"""Which parameters are trained, how fast and with what decay: groups by pattern over their names."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase

from torch import Tensor, nn

from trivium.errors import ConfigError
from trivium.training.config import GroupConfig, OptimizerConfig


def parameter_groups(
    config: OptimizerConfig, model: nn.Module, kind: Callable[[str, Tensor], str] = lambda name, parameter: ""
) -> list[dict]:
    """Groups for any torch optimizer: named parameters, `lr` (the group's peak) and `weight_decay`.

    Matrices decay; norms, biases and scalars (one dimension or none) do not, unless a pattern says so. Parameters that
    a pattern freezes need no gradient from now on. kind(name, parameter): what is kept apart besides, as `kind` of a
    group. Raises ConfigError for a pattern that matches nothing, or if nothing is left to train.
    """
    chosen = _first_matches(config.groups, model)
    groups: dict[tuple, dict] = {}
    for name, parameter in model.named_parameters():
        pattern = chosen.get(name)
        if pattern is not None and pattern.freeze:
            parameter.requires_grad_(False)
        if not parameter.requires_grad:
            continue
        decay = config.weight_decay if parameter.dim() > 1 else 0.0
        if pattern is not None and pattern.weight_decay is not None:
            decay = pattern.weight_decay
        rate = config.lr * (pattern.lr if pattern is not None else 1.0)
        mesh = getattr(parameter, "device_mesh", None)  # one operation takes no tensors shared out in different ways
        key = (kind(name, parameter), rate, decay, mesh)
        group = groups.setdefault(key, {"params": [], "lr": rate, "weight_decay": decay, "kind": key[0]})
        group["params"].append((name, parameter))
    if not groups:
        raise ConfigError("optim.groups: nothing is left to train, every parameter is frozen")
    return list(groups.values())


def _first_matches(groups: list[GroupConfig], model: nn.Module) -> dict[str, GroupConfig]:
    """Parameter name -> its group, where one matches. A pattern that matches no name at all is an error."""
    names = [name for name, _ in model.named_parameters()]
    for group in groups:
        if any(fnmatchcase(name, group.match) for name in names):
            continue
        shared = {p: name for name, p in model.named_parameters()}
        for alias, parameter in model.named_parameters(remove_duplicate=False):
            if fnmatchcase(alias, group.match):
                raise ConfigError(
                    f"optim.groups: {group.match!r} matches {alias} only, which is {shared[parameter]} itself (they "
                    "are tied); name that one"
                )
        some = [*dict.fromkeys([*names[:8], *names[-2:]])]
        raise ConfigError(f"optim.groups: {group.match!r} matches no parameter; there are {', '.join(some)}, ...")
    return {name: g for name in names for g in reversed(groups) if fnmatchcase(name, g.match)}
