"""Settings of the objectives. No torch here: `explain`, `--help` and validation read these."""

from __future__ import annotations

from dataclasses import dataclass

from trivium.errors import ConfigError

TRAIN_ON = ("assistant", "last_turn", "completion", "all")


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
    dft: bool = False  # weight each token by its own probability, detached (DFT, 2508.05629)
    neftune_alpha: float = 0.0  # uniform noise on the embeddings, alpha / sqrt(length * width) (2310.05914)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train_on not in TRAIN_ON:
            raise ConfigError(f"objective.train_on={self.train_on!r} is not one of {', '.join(TRAIN_ON)}")
        if self.neftune_alpha < 0:
            raise ConfigError(f"objective.neftune_alpha={self.neftune_alpha} must not be negative")
