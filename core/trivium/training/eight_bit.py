"""AdamW with moments in 8 bits, by bitsandbytes; paged: they may leave the GPU's memory while it is short.

(Dettmers et al. 2022, https://arxiv.org/abs/2110.02861.) Its kernels wait for the device after every parameter and
know no flag, so the host reads the guard's before a step.
"""

from __future__ import annotations

import logging
from typing import ClassVar

import torch
from torch import nn
from torch.optim import Optimizer

from trivium.errors import ConfigError
from trivium.training.config import AdamW8bitConfig
from trivium.training.groups import parameter_groups

# on CPUs that compute in bf16 it looks for a kernel of another package, for a format that is not used here
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
import bitsandbytes  # noqa: E402
import bitsandbytes.optim.adamw  # noqa: E402


class AdamW8bit(bitsandbytes.optim.adamw.AdamW8bit):
    """bitsandbytes' own. Small parameters (`min_8bit_size`) keep moments of 32 bits."""

    constants: ClassVar[tuple[str, ...]] = ("qmap1", "qmap2")
    """Entries of the state that are the same for every parameter, and not worth saving."""

    def begin(self, parameter: nn.Parameter) -> None:
        """Make the state of a parameter, as the first step would: paged memory is paged again, tables are shared."""
        for i, group in enumerate(self.param_groups):
            for j, other in enumerate(group["params"]):
                if other is parameter:
                    self.init_state(group, parameter, i, j)

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        first = self.param_groups[0]["params"][0]
        if self.is_paged and first.device.type != "cuda":
            raise ConfigError(NO_PAGES)
        try:
            super().step(closure)
        except NotImplementedError as error:
            raise ConfigError(
                f"optim=adamw8bit: bitsandbytes {bitsandbytes.__version__} has no kernel for {first.device.type} "
                f"({str(error).splitlines()[0]}); choose optim=adamw"
            ) from error


NO_PAGES = "optim=paged_adamw8bit pages the memory of a CUDA device, and there is none here; choose optim=adamw8bit"


def adamw8bit(config: AdamW8bitConfig, model: nn.Module, paged: bool = False) -> Optimizer:
    """AdamW with moments in 8 bits, on a GPU or a CPU."""
    groups = parameter_groups(config, model)
    betas, size = (config.beta1, config.beta2), config.min_8bit_size
    return AdamW8bit(groups, config.lr, betas, config.eps, min_8bit_size=size, is_paged=paged)


def paged_adamw8bit(config: AdamW8bitConfig, model: nn.Module) -> Optimizer:
    """The same, its moments in pages that CUDA moves to the host and back. Raises ConfigError without CUDA."""
    if not torch.cuda.is_available():
        raise ConfigError(NO_PAGES)
    return adamw8bit(config, model, paged=True)
