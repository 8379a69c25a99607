"""AdamW without a schedule: an average of the weights takes its place (Defazio et al. 2024, 2405.15682, algorithm 1).

Three sequences. z is what plain AdamW steps would give; x is its average, and what others get; gradients are taken at
y = (1 - beta1) z + beta1 x, which is what the model holds while it trains.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trivium.training.config import ScheduleFreeConfig
from trivium.training.groups import parameter_groups
from trivium.training.optim import keep_where


class ScheduleFree(Optimizer):
    """x, z and the second moment are kept in fp32 at least: in bf16 a late step would be lost in the average.

    The paper's code keeps z only and works x out from the model's y. Here x is kept as well, for four bytes more a
    weight, so that reading it is exact and touches nothing. Of its choices: bias correction of the second moment as in
    AdamW, averaging weights of rate squared, decay taken at y.
    """

    _step_supports_amp_scaling = True  # a flag `found_inf` of 1.0 is a step not taken, read on the device

    def __init__(self, groups: list[dict], lr: float, beta1: float, beta2: float, eps: float) -> None:
        # capturable: as in torch, the step count is on the device
        defaults = {"lr": lr, "betas": (beta1, beta2), "eps": eps, "weight_decay": 0.0, "capturable": True}
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        bad = getattr(self, "found_inf", None)
        for group in self.param_groups:
            for y in group["params"]:
                if y.grad is not None:
                    self._move(y, y.grad, self.state[y], group, bad)

    def _move(self, y: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict, bad: Tensor | None) -> None:
        (beta1, beta2), rate = group["betas"], group["lr"]
        wide = torch.promote_types(y.dtype, torch.float32)
        if not state:
            exact = torch.float32 if y.device.type == "mps" else torch.float64  # a sum of many small squares
            for name in ("step", "weight_sum"):
                state[name] = torch.zeros((), dtype=exact, device=y.device)
            state["z"], state["x"] = y.to(wide, copy=True), y.to(wide, copy=True)
            state["exp_avg_sq"] = torch.zeros_like(y, dtype=wide)
        names = ("step", "weight_sum", "exp_avg_sq", "z", "x")
        step, weight_sum, second, z, x = (state[name] for name in names)
        grad = grad.to(wide)
        step, weight_sum = step + 1, weight_sum + rate**2
        second = second * beta2 + grad * grad * (1 - beta2)
        correction = (1 - beta2**step).to(wide)
        z = z - rate * (grad / ((second / correction).sqrt_() + group["eps"]) + group["weight_decay"] * y)
        x = x.lerp(z, (rate**2 / weight_sum).to(wide))
        keep_where(bad, [state[name] for name in names], (step, weight_sum, second, z, x))
        keep_where(bad, (y,), (z.lerp(x, beta1),))

    def weights(self) -> dict[nn.Parameter, Tensor]:
        """The average x of each parameter that has been trained."""
        trained = [p for group in self.param_groups for p in group["params"]]
        return {p: self.state[p]["x"] for p in trained if self.state.get(p)}


def schedule_free(config: ScheduleFreeConfig, model: nn.Module) -> Optimizer:
    """Schedule-free AdamW."""
    return ScheduleFree(parameter_groups(config, model), config.lr, config.beta1, config.beta2, config.eps)
