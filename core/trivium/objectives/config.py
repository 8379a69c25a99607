"""Settings of the objectives. No torch here: `explain`, `--help` and validation read these."""

from __future__ import annotations

from dataclasses import dataclass

from trivium.errors import ConfigError

TRAIN_ON = ("assistant", "last_turn", "completion", "all")
TURNS = ("fork", "refuse")


@dataclass(frozen=True)
class NextTokenConfig:
    """Cross-entropy of the next token, summed over trained tokens."""

    z_loss: float = 0.0  # weight of log(Z)^2 (PaLM, 2204.02311 section 5); keeps logits from drifting
    label_smoothing: float = 0.0  # share of the target spread evenly over the vocabulary

    def __post_init__(self) -> None:
        if self.z_loss < 0:
            raise ConfigError(f"objective.z_loss={self.z_loss} must not be negative")
        if not 0 <= self.label_smoothing < 1:
            raise ConfigError(f"objective.label_smoothing={self.label_smoothing} must be at least 0 and less than 1")


@dataclass(frozen=True)
class SFTConfig(NextTokenConfig):
    """Next token on the tokens that the assistant wrote, its end-of-turn token included."""

    train_on: str = "assistant"  # assistant: every assistant turn | last_turn | completion: after the prompt | all
    turns: str = (
        "fork"  # a template rewrites earlier turns: fork trains each answer after what it is asked with | refuse
    )
    dft: bool = False  # weight each token by its own probability, detached (DFT, 2508.05629)
    neftune_alpha: float = 0.0  # uniform noise on the embeddings, alpha / sqrt(length * width) (2310.05914)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train_on not in TRAIN_ON:
            raise ConfigError(f"objective.train_on={self.train_on!r} is not one of {', '.join(TRAIN_ON)}")
        _among(self, "turns", TURNS)
        if self.neftune_alpha < 0:
            raise ConfigError(f"objective.neftune_alpha={self.neftune_alpha} must not be negative")


PAIR_LOSSES = ("sigmoid", "robust", "hinge", "ipo")
KL_ESTIMATORS = ("k2", "k3", "k3+")
AGGREGATES = ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "constant")
ADVANTAGES = ("group", "none", "rloo", "batch")


def _above_zero(owner: object, *names: str) -> None:
    for name in names:
        if getattr(owner, name) <= 0:
            raise ConfigError(f"objective.{name}={getattr(owner, name)} must be greater than 0")


def _at_least_zero(owner: object, *names: str) -> None:
    for name in names:
        if getattr(owner, name) < 0:
            raise ConfigError(f"objective.{name}={getattr(owner, name)} must not be negative")


def _among(owner: object, name: str, allowed: tuple[str, ...]) -> None:
    if getattr(owner, name) not in allowed:
        raise ConfigError(f"objective.{name}={getattr(owner, name)!r} is not one of {', '.join(allowed)}")


@dataclass(frozen=True)
class PreferenceConfig:
    """Pairs against a reference (DPO and its relatives)."""

    loss: str = "sigmoid"  # sigmoid (DPO) | robust | hinge (SLiC) | ipo
    beta: float = 0.1  # more keeps the policy nearer to the reference
    label_smoothing: float = 0.0  # share of pairs taken to be the wrong way round (sigmoid: cDPO; robust)
    sft_weight: float = 0.0  # of the chosen answer's cross-entropy per token, added; more keeps its likelihood up

    def __post_init__(self) -> None:
        _among(self, "loss", PAIR_LOSSES)
        _above_zero(self, "beta")
        _at_least_zero(self, "sft_weight")
        if not 0 <= self.label_smoothing < 0.5:
            raise ConfigError(f"objective.label_smoothing={self.label_smoothing} must be at least 0 and less than 0.5")
        if self.label_smoothing and self.loss not in ("sigmoid", "robust"):
            raise ConfigError(f"objective.label_smoothing is for loss=sigmoid and loss=robust, not loss={self.loss}")


@dataclass(frozen=True)
class UnpairedConfig:
    """Verdicts without pairs (KTO)."""

    beta: float = 0.1  # more keeps the policy nearer to the reference
    desirable_weight: float = 1.0  # of desirable answers; raise it where they are few
    undesirable_weight: float = 1.0

    def __post_init__(self) -> None:
        _above_zero(self, "beta", "desirable_weight", "undesirable_weight")


@dataclass(frozen=True)
class RewardConfig:
    """A Bradley-Terry reward model."""

    margin: float = 0.0  # by how much the chosen score must win before the loss is easy
    centering: float = 0.0  # weight of (r_c + r_r)^2, which keeps scores around 0 (2312.09244)

    def __post_init__(self) -> None:
        _at_least_zero(self, "centering")


@dataclass(frozen=True)
class GRPOConfig:
    """Policy gradient on groups of the policy's own samples."""

    advantage: str = "group"  # group: (r - mean)/std | none: r - mean (Dr. GRPO) | rloo | batch: one std for all
    clip_low: float = 0.2  # ratios below 1 - this stop pushing down
    clip_high: float = 0.2  # ratios above 1 + this stop pushing up; higher lets rare tokens grow (DAPO: 0.28)
    dual_clip: float = 0.0  # bounds the loss of bad samples at this times |A|; 0 is off, 3 is usual
    ratio: str = "token"  # token | sequence (GSPO)
    kl_weight: float = 0.02  # of the KL to the reference; 0 does without a reference
    kl: str = "k2"  # the penalty's estimator: k2 (gradient of KL(pi || ref)) | k3 (of KL(ref || pi)) | k3+
    aggregate: str = "token_mean"  # token_mean | seq_mean_token_mean | seq_mean_token_sum | constant (Dr. GRPO)

    def __post_init__(self) -> None:
        _among(self, "advantage", ADVANTAGES)
        _among(self, "ratio", ("token", "sequence"))
        _among(self, "kl", KL_ESTIMATORS)
        _among(self, "aggregate", AGGREGATES)
        _at_least_zero(self, "kl_weight")
        _above_zero(self, "clip_low", "clip_high")
        if self.clip_low >= 1:
            raise ConfigError(f"objective.clip_low={self.clip_low} must be less than 1: a ratio is never negative")
        if self.dual_clip and self.dual_clip <= 1:
            raise ConfigError(f"objective.dual_clip={self.dual_clip} must be greater than 1, or 0 for none")


@dataclass(frozen=True)
class DistillConfig:
    """Divergence from a teacher."""

    train_on: str = "assistant"  # which tokens of conversations: as for sft
    turns: str = "fork"  # where a template rewrites earlier turns: as for sft
    beta: float = 0.0  # 0: forward KL | 1: reverse KL | between: generalised Jensen-Shannon
    temperature: float = 1.0  # of both; more shows more of what the teacher thinks unlikely
    temperature_squared: bool = False  # times temperature^2: gradients keep their size (1503.02531, section 2.1)
    ce_weight: float = 0.0  # share of the text's own cross-entropy in the loss; 1 would need no teacher

    def __post_init__(self) -> None:
        _among(self, "train_on", TRAIN_ON)
        _among(self, "turns", TURNS)
        _above_zero(self, "temperature")
        if not 0 <= self.beta <= 1:
            raise ConfigError(f"objective.beta={self.beta} must be between 0 (forward KL) and 1 (reverse KL)")
        if not 0 <= self.ce_weight < 1:
            raise ConfigError(f"objective.ce_weight={self.ce_weight} must be at least 0 and less than 1")
