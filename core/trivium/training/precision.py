"""What is computed in which number format, and the loss scale that fp16 needs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True)
class Precision:
    """weights: what weights, gradients and optimizer state are kept in; None leaves them as they are (fp32).

    autocast: what matrix products are computed in where it differs. scaled: whether the loss needs a scale.
    """

    name: str
    weights: torch.dtype | None = None
    autocast: torch.dtype | None = None
    scaled: bool = False

    @property
    def compute(self) -> torch.dtype | None:
        """The format of matrix products; None is that of the weights, fp32 (or fp64 in tests)."""
        return self.autocast or self.weights

    @property
    def tolerance(self) -> float:
        """How far a figure that is known exactly may be off, relative where it is above 1.

        Rounding of log-probabilities summed over an answer: 24, 11 and 8 bits of mantissa.
        """
        return {torch.bfloat16: 2e-2, torch.float16: 4e-3}.get(self.compute, 1e-4)  # type: ignore[arg-type]


FP32 = Precision("fp32")
PRECISIONS = {
    "fp32": FP32,
    "bf16": Precision("bf16", autocast=torch.bfloat16),
    "bf16_true": Precision("bf16_true", weights=torch.bfloat16),
    "fp16": Precision("fp16", autocast=torch.float16, scaled=True),
}


def precision_of(name: str, accelerator: str) -> Precision:
    """What `precision` means on this hardware: "auto" is bf16 where it is computed, not emulated, else fp32."""
    if name != "auto":
        return PRECISIONS[name]
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has_bf16 = "bf16" in _cpu_flags()  # avx512_bf16, amx_bf16, or bf16 on Arm
    return PRECISIONS["bf16" if has_bf16 else "fp32"]


def _cpu_flags() -> str:
    info = Path("/proc/cpuinfo")
    return info.read_text() if info.is_file() else ""


class LossScale:
    """Keeps fp16 gradients above its smallest number (Micikevicius et al. 2018, https://arxiv.org/abs/1710.03740).

    An overflow is no bad step: the scale is halved and the same step is made again, so no data is lost to it. What is
    not finite without a scale either is the guard's. That takes one look at the gradient norm a step, for which the
    host waits; bf16 needs none of this.
    """

    GROWTH_STEPS = 2000

    def __init__(self) -> None:
        self.scale, self.good_steps = 2.0**16, 0
        self._first = self.scale

    def begin(self) -> None:
        """A new step: after so many good ones the scale may grow."""
        if self.good_steps >= self.GROWTH_STEPS:
            self.scale, self.good_steps = self.scale * 2, 0
        self._first = self.scale

    def overflowed(self, loss: Tensor, norm: Tensor) -> bool:
        """Whether the gradients may be too large for fp16 because of the scale; then it is half of what it was."""
        if torch.isfinite(loss) and torch.isfinite(norm):
            self.good_steps += 1
            return False
        self.good_steps = 0
        if torch.isfinite(loss) and self.scale > 1:
            self.scale = self.scale / 2
            return True
        self.scale = self._first  # the scale was not to blame
        return False

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"scale": self.scale, "good_steps": self.good_steps}

    def restore(self, state: dict) -> None:
        """Take up a checkpoint's state."""
        self.scale, self.good_steps = state["scale"], state["good_steps"]
