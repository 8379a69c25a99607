"""Settings of optimizers and schedules. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from trivium.errors import ConfigError


def _shares(owner: object, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(owner, name) < 1:
            raise ConfigError(f"optim.{name}={getattr(owner, name)} must be at least 0 and less than 1")


def _positive(owner: object, *names: str) -> None:
    for name in names:
        if not getattr(owner, name) > 0:
            raise ConfigError(f"optim.{name}={getattr(owner, name)} must be greater than 0")


@dataclass  # not frozen: OmegaConf makes the entries of a list one by one and must be able to fill them
class GroupConfig:
    """What is different for the parameters whose names a pattern matches."""

    match: str = ""  # glob over parameter names, such as embed* or *.attn.*; a parameter's first match counts
    lr: float = 1.0  # factor on the peak rate
    weight_decay: float | None = None  # in place of the optimizer's; a number reaches norms and biases too
    freeze: bool = False  # not trained at all: no gradient, no state, no decay

    def __post_init__(self) -> None:
        if not self.match:
            raise ConfigError('optim.groups: each group needs a pattern, such as {match: "embed*", lr: 0.1}')
        if not self.lr > 0:
            raise ConfigError(
                f"optim.groups: {self.match!r} has lr={self.lr}; a factor is greater than 0, and freeze=true trains not"
            )
        if self.weight_decay is not None and not self.weight_decay >= 0:
            raise ConfigError(f"optim.groups: {self.match!r} has weight_decay={self.weight_decay}, which is negative")


@dataclass(frozen=True)
class OptimizerConfig:
    """What every optimizer has."""

    averages: ClassVar[bool] = False
    """Whether it averages weights itself, in place of a schedule and of trainer.average."""

    lr: float = 1e-3  # peak learning rate; the schedule multiplies it
    weight_decay: float = 0.1  # on matrices only, never on norms, biases or scalars (unless a group says so)
    groups: list[GroupConfig] = field(default_factory=list)  # rates, decay and freezing by name of parameter

    def __post_init__(self) -> None:
        _positive(self, "lr")
        if not self.weight_decay >= 0:
            raise ConfigError(f"optim.weight_decay={self.weight_decay} must not be negative")


@dataclass(frozen=True)
class AdamWConfig(OptimizerConfig):
    """AdamW (Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101)."""

    beta1: float = 0.9
    beta2: float = 0.95  # smaller forgets faster: steadier on small batches of text
    eps: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        _shares(self, "beta1", "beta2")
        _positive(self, "eps")


@dataclass(frozen=True)
class AdamW8bitConfig(AdamWConfig):
    """AdamW with its moments in 8 bits (Dettmers et al. 2022, https://arxiv.org/abs/2110.02861), by bitsandbytes."""

    min_8bit_size: int = 4096  # parameters with fewer elements keep moments of 32 bits

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_8bit_size < 0:
            raise ConfigError(f"optim.min_8bit_size={self.min_8bit_size} must not be negative")


@dataclass(frozen=True)
class AdafactorConfig(OptimizerConfig):
    """Adafactor (Shazeer and Stern 2018, https://arxiv.org/abs/1804.04235): moments as rows and columns."""

    lr: float = 1e-2  # peak of the relative step: an update is at most lr times the root mean square of its weights
    weight_decay: float = 0.0  # on matrices only, times lr
    beta2_decay: float = -0.8  # the second moment forgets a share of step^beta2_decay
    eps: float = 1e-3  # a tensor counts as at least so large, so that one of zeros can grow
    clip: float = 1.0  # largest root mean square of an update before lr

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive(self, "eps")
        if not self.beta2_decay <= 0:
            raise ConfigError(f"optim.beta2_decay={self.beta2_decay} must not be greater than 0")
        if not self.clip >= 1:
            raise ConfigError(f"optim.clip={self.clip} must be at least 1")


@dataclass(frozen=True)
class LionConfig(OptimizerConfig):
    """Lion (Chen et al. 2023, https://arxiv.org/abs/2302.06675): the sign of a momentum; one moment in memory."""

    lr: float = 1e-4  # every weight moves by it: a third to a tenth of AdamW's
    weight_decay: float = 1.0  # times lr, so three to ten times AdamW's
    beta1: float = 0.9  # share of the momentum in the direction
    beta2: float = 0.99  # share of the momentum that is kept

    def __post_init__(self) -> None:
        super().__post_init__()
        _shares(self, "beta1", "beta2")


@dataclass(frozen=True)
class MuonConfig(AdamWConfig):
    """Muon for the matrices of the blocks, AdamW for all else (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/).

    beta1, beta2 and eps are AdamW's.
    """

    momentum: float = 0.95
    nesterov: bool = True
    newton_schulz_steps: int = 5  # more brings the update closer to an orthogonal matrix
    scale: str = "match_rms_adamw"  # or original; the first lets one lr serve both (https://arxiv.org/abs/2502.16982)

    def __post_init__(self) -> None:
        super().__post_init__()
        _shares(self, "momentum")
        if not 1 <= self.newton_schulz_steps < 100:
            raise ConfigError(f"optim.newton_schulz_steps={self.newton_schulz_steps} must be between 1 and 99")
        if self.scale not in ("match_rms_adamw", "original"):
            raise ConfigError(f"optim.scale={self.scale!r} is not one of match_rms_adamw, original")


@dataclass(frozen=True)
class ScheduleFreeConfig(AdamWConfig):
    """Schedule-free AdamW (Defazio et al. 2024, https://arxiv.org/abs/2405.15682); choose schedule=constant with it."""

    averages: ClassVar[bool] = True

    lr: float = 2.5e-3  # one to ten times what AdamW takes with a schedule
    beta1: float = 0.9  # where gradients are taken: share of the average x; the rest is the sequence z

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive(self, "beta1")


@dataclass(frozen=True)
class SGDConfig(OptimizerConfig):
    """Stochastic gradient descent with momentum (Sutskever et al. 2013)."""

    lr: float = 0.1
    weight_decay: float = 0.0  # times the weight, added to the gradient of matrices (so the momentum holds it too)
    momentum: float = 0.9  # 0 is none, and no state
    nesterov: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _shares(self, "momentum")
        if self.nesterov and not self.momentum:
            raise ConfigError("optim.nesterov=true needs a momentum; set optim.momentum=0.9")


@dataclass(frozen=True)
class ScheduleConfig:
    """What every schedule has: a linear warmup, then a shape that ends at `final` of the peak."""

    warmup: float = 0.05  # share of the steps spent rising from 0 to the peak
    warmup_steps: int = 0  # the same as a number of steps, in place of the share; 0 uses the share
    final: float = 0.1  # share of the peak left at the last step

    def __post_init__(self) -> None:
        if not 0 <= self.warmup < 1:
            raise ConfigError(f"schedule.warmup={self.warmup} is a share of the steps: at least 0 and less than 1")
        if self.warmup_steps < 0:
            raise ConfigError(
                f"schedule.warmup_steps={self.warmup_steps} must not be negative (0 uses schedule.warmup)"
            )
        if not 0 <= self.final <= 1:
            raise ConfigError(f"schedule.final={self.final} is a share of the peak: between 0 and 1")


@dataclass(frozen=True)
class ConstantConfig(ScheduleConfig):
    """Warmup, then the peak to the end."""

    final: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.final != 1:
            raise ConfigError(f"schedule.final={self.final}: a constant rate ends at its peak; choose schedule=linear")


@dataclass(frozen=True)
class WSDConfig(ScheduleConfig):
    """Warmup, stable, decay (MiniCPM, https://arxiv.org/abs/2404.06395)."""

    decay: float = 0.2  # share of the steps, at the end, over which the rate falls linearly

    def __post_init__(self) -> None:
        super().__post_init__()
        room = 1 if self.warmup_steps else 1 - self.warmup
        if not 0 < self.decay <= room:
            raise ConfigError(f"schedule.decay={self.decay} must be more than 0 and fit beside warmup={self.warmup}")


@dataclass(frozen=True)
class InverseSqrtConfig(ScheduleConfig):
    """Warmup, then one over the root of the step (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762)."""

    final: float = 0.0  # share of the peak below which the rate never falls
    timescale: int = 0  # after three times as many steps the rate is halved; 0 is the warmup's length

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.timescale < 0:
            raise ConfigError(f"schedule.timescale={self.timescale} must not be negative (0 is the warmup's length)")


@dataclass(frozen=True)
class CyclicConfig(ScheduleConfig):
    """Cosine with restarts (SGDR, Loshchilov and Hutter 2017, https://arxiv.org/abs/1608.03983)."""

    num_cycles: int = 4  # falls from the peak to `final`, one after the other
    t_mult: float = 1.0  # each cycle is so many times longer than the one before

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_cycles < 1:
            raise ConfigError(f"schedule.num_cycles={self.num_cycles} must be at least 1")
        if not self.t_mult >= 1:
            raise ConfigError(f"schedule.t_mult={self.t_mult} must be at least 1")
