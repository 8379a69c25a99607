"""Muon for the matrices of the blocks, AdamW for embeddings, head, norms and biases: one optimizer, one step.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) takes the momentum of a matrix to a nearly
orthogonal one, by Newton-Schulz iterations, and steps along that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trivium.errors import ConfigError
from trivium.training.config import MuonConfig
from trivium.training.groups import parameter_groups
from trivium.training.optim import keep_where


class Muon(Optimizer):
    """torch's Muon and torch's fused AdamW on one list of groups and one state; `kind` of a group says whose it is."""

    _step_supports_amp_scaling = True  # a flag `found_inf` of 1.0 is a step not taken, read on the device

    def __init__(self, groups: list[dict], lr: float, muon: dict[str, Any], adamw: dict[str, Any]) -> None:
        mine = {kind: [g for g in groups if g["kind"] == kind] for kind in ("muon", "adamw")}
        self._muon = torch.optim.Muon(mine["muon"], lr=lr, **muon)
        self._adamw = torch.optim.AdamW(mine["adamw"], lr=lr, fused=True, **adamw) if mine["adamw"] else None
        filled = [*self._muon.param_groups, *(self._adamw.param_groups if self._adamw else ())]
        super().__init__(filled, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        bad = getattr(self, "found_inf", None)
        if self._adamw is not None:
            self._adamw.param_groups = [g for g in self.param_groups if g["kind"] == "adamw"]
            self._adamw.state = self.state
            self._adamw.found_inf = bad  # type: ignore[attr-defined]
            self._adamw.step()
        for group in self.param_groups:
            for matrix in group["params"] if group["kind"] == "muon" else ():
                if matrix.grad is not None:
                    self._orthogonal_step(matrix, group, bad)

    def _orthogonal_step(self, matrix: Tensor, group: dict, bad: Tensor | None) -> None:
        """torch's Muon knows no flag: what it did to one matrix is taken back where the flag is set."""
        state = self.state[matrix]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(matrix)
        kept = (matrix, state["momentum_buffer"])
        before = [t.clone() for t in kept] if bad is not None else []
        self._muon.param_groups = [{**group, "params": [matrix]}]
        self._muon.state = self.state
        self._muon.step()
        if bad is not None:
            keep_where(1 - bad, kept, before)


def muon(config: MuonConfig, model: nn.Module) -> Optimizer:
    """Muon and AdamW as one. Raises ConfigError if no matrix of a block is trained."""

    def kind(name: str, parameter: Tensor) -> str:
        return "muon" if name.startswith("blocks.") and parameter.dim() == 2 else "adamw"

    groups = parameter_groups(config, model, kind)
    if all(group["kind"] != "muon" for group in groups):
        raise ConfigError("optim=muon: no matrix of a block is trained, which is all it is for; choose optim=adamw")
    own = {"momentum": config.momentum, "nesterov": config.nesterov, "ns_steps": config.newton_schulz_steps}
    adamw = {"betas": (config.beta1, config.beta2), "eps": config.eps}
    return Muon(groups, config.lr, {**own, "adjust_lr_fn": config.scale}, adamw)
