"""Whether a step may be taken: a flag on the device, handed to the optimizer, read by the host one step later.

A step whose loss or gradient is not finite, or (if asked for) far above what was usual, changes neither weights nor
optimizer. What happens then is `guard.policy`: stop, skip the step, or roll back to the last checkpoint and go on
behind the data that led there. "off" only sees it afterwards.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trivium.errors import TrainingError
from trivium.schema import GuardConfig


class RollBack(Exception):
    """Step `step` was bad; training goes on from the last checkpoint, with the data after that step.

    signal: the one that had come by then, if any.
    """

    signal: int | None = None

    def __init__(self, step: int, said: str) -> None:
        super().__init__(said)
        self.step = step


class Guard:
    """Judges steps. Its state is what it has seen of good ones: how many, and mean and variance of loss and norm."""

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self.seen = torch.zeros(5)  # good steps; means of loss and gradient norm; variances
        self.skipped = 0  # bad steps in a row, up to the last one read

    @property
    def holds(self) -> bool:
        """Whether bad steps are kept from the weights; without it they are only seen."""
        return self.config.policy != "off"

    def judge(self, loss: Tensor, norm: Tensor) -> Tensor:
        """1.0 where the step must not be taken, else 0.0: (), on the device, without waiting for it."""
        figures = torch.stack([loss, norm]).float()
        bad = ~figures.isfinite().all()
        if self.config.spike_sigma:
            self.seen = self.seen.to(figures.device)
            count, mean, variance = self.seen[0], self.seen[1:3], self.seen[3:5]
            far = figures > mean + self.config.spike_sigma * variance.sqrt()
            bad = bad | (far.any() & (count >= self.config.window))
            # the mean over all steps until there are `window`, then one that forgets: West 1979, with weight 1/n
            weight = 1 / (count + 1).clamp(max=self.config.window)
            off = figures - mean
            after = torch.cat([
                (count + 1)[None],
                mean + weight * off,
                (1 - weight) * (variance + weight * off**2),
            ])  # fmt: skip
            self.seen = torch.where(bad, self.seen, after)
        return bad.float()

    def read(self, bad: bool, row: dict[str, float | None]) -> None:
        """Told of every step in turn, once its figures are here. Raises TrainingError or RollBack."""
        self.skipped = self.skipped + 1 if bad else 0
        if not bad:
            return
        step, policy = int(row["step"] or 0), self.config.policy
        said = f"step {step}: loss {row['train/loss']:.4g}, gradient norm {row['grad_norm']:.4g}"
        hint = "Lower optim.lr, raise schedule.warmup or set precision=fp32"
        if all(x is not None and abs(x) < float("inf") for x in (row["train/loss"], row["grad_norm"])):
            usual = self.seen.tolist()
            said += f" (usual: {usual[1]:.4g} and {usual[2]:.4g}; guard.spike_sigma={self.config.spike_sigma:g})"
            hint = "Lower optim.lr, or raise guard.spike_sigma if this is the level from here on"
        if policy == "off":
            raise TrainingError(
                f"{said}. With guard.policy=off the weights hold it; the last checkpoint is sound: the same command "
                f"goes on from there. {hint}"
            )
        if policy == "rollback":
            raise RollBack(step, said)
        if policy == "stop":
            raise TrainingError(
                f"{said}. The step was not taken; the last checkpoint is sound. {hint}, or guard.policy=skip"
            )
        if self.skipped > self.config.patience:
            raise TrainingError(
                f"{said}; the {self.skipped} steps up to here were all skipped (guard.patience="
                f"{self.config.patience}). {hint}"
            )

    def state(self) -> dict:
        """What a checkpoint keeps; floats as hex, which is exact."""
        return {"seen": [float(x).hex() for x in self.seen.tolist()], "skipped": self.skipped}

    def restore(self, state: dict) -> None:
        """Take up a checkpoint's state."""
        self.seen = torch.tensor([float.fromhex(x) for x in state["seen"]])
        self.skipped = state["skipped"]
