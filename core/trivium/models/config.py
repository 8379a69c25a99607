"""Settings of the model families. No torch here: `explain`, `--help` and validation read these."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from trivium.errors import ConfigError

ROPE_KINDS = ("none", "linear", "dynamic", "llama3", "yarn")


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the context that a model was first trained on."""

    kind: str = "none"  # none | linear | dynamic (NTK) | llama3 | yarn
    factor: float = 1.0  # how many times longer the context becomes
    original_context: int = 0  # tokens it was trained on at first; 0 is the context itself
    low_freq_factor: float = 1.0  # llama3: waves longer than original_context / this are stretched
    high_freq_factor: float = 4.0  # llama3: waves shorter than original_context / this are left alone
    beta_fast: float = 32.0  # yarn: waves that turn more often within original_context are left alone
    beta_slow: float = 1.0  # yarn: waves that turn less often are stretched
    attention_factor: float = 0.0  # yarn: scale of the rotated queries and keys; 0 is 0.1 ln(factor) + 1

    def __post_init__(self) -> None:
        if self.kind not in ROPE_KINDS:
            raise ConfigError(f"model.rope_scaling.kind={self.kind!r} is not one of {', '.join(ROPE_KINDS)}")
        if self.factor < 1:
            raise ConfigError(f"model.rope_scaling.factor={self.factor} must be at least 1")


@dataclass(frozen=True)
class LlamaConfig:
    """Llama 1-3 shape (Touvron et al. 2023, https://arxiv.org/abs/2302.13971)."""

    runtime_fields: ClassVar[tuple[str, ...]] = ("dropout", "init_std")
    """Settings that a checkpoint's weights do not depend on: they may differ when it is loaded."""

    size: str = ""  # about so many parameters in all, such as 30m: makes dim, layers, heads, kv_heads and ffn_dim
    dim: int = 512  # width C; parameters grow with its square
    layers: int = 8  # depth L; time grows with it, width sets memory
    heads: int = 8  # query heads H
    head_dim: int = 0  # width D of a head; 0 is dim / heads
    kv_heads: int = 4  # key/value heads K (Ainslie et al. 2023); fewer make the cache smaller
    ffn_dim: int = 1408  # hidden width of SwiGLU; about 8/3 of dim
    context: int = 1024  # longest sequence; a longer one is refused, never cut
    rope_theta: float = 10000.0  # base of the rotary frequencies; grow it with the context
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    norm_eps: float = 1e-5
    tied: bool = True  # the head shares the embedding's weight: fewer parameters, better for small models
    dropout: float = 0.0  # on the residual branches; 0 where data is seen about once
    init_std: float = 0.02  # of every matrix; branches that end in the residual get init_std / sqrt(2 L)

    def __post_init__(self) -> None:
        for name in ("dim", "layers", "heads", "kv_heads", "ffn_dim", "context"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"model.{name}={getattr(self, name)} must be greater than 0")
        if not self.head_dim and (self.dim % self.heads or (self.dim // self.heads) % 2):
            raise ConfigError(
                f"model.dim={self.dim} / model.heads={self.heads} must be an even whole number (RoPE pairs)"
            )
        if self.head_dim < 0 or self.head_dim % 2:
            raise ConfigError(f"model.head_dim={self.head_dim} must be even (RoPE pairs), or 0 for dim / heads")
        if self.heads % self.kv_heads:
            raise ConfigError(f"model.heads={self.heads} must be a multiple of model.kv_heads={self.kv_heads}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"model.dropout={self.dropout} must be at least 0 and less than 1")

    @property
    def head_width(self) -> int:
        """D."""
        return self.head_dim or self.dim // self.heads


@dataclass(frozen=True)
class MistralConfig(LlamaConfig):
    """Mistral: a Llama whose tokens see only the last `window` (Jiang et al. 2023, https://arxiv.org/abs/2310.06825)."""

    window: int = 4096  # tokens a token sees, itself included; 0 is all before it
    tied: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 0:
            raise ConfigError(f"model.window={self.window} must not be negative (0 is off)")


@dataclass(frozen=True)
class Qwen2Config(LlamaConfig):
    """Qwen2 and 2.5: a Llama with biases on queries, keys and values (https://arxiv.org/abs/2407.10671)."""

    rope_theta: float = 1e6
    norm_eps: float = 1e-6


@dataclass(frozen=True)
class Qwen3Config(LlamaConfig):
    """Qwen3: a Llama that norms each head's queries and keys (https://arxiv.org/abs/2505.09388)."""

    head_dim: int = 128
    rope_theta: float = 1e6
    norm_eps: float = 1e-6


@dataclass(frozen=True)
class Gemma2Config(LlamaConfig):
    """Gemma 2 shape (Gemma Team 2024, https://arxiv.org/abs/2408.00118, section 2)."""

    head_dim: int = 256
    window: int = 4096  # of every second layer, beginning with the first; the others see everything before
    query_scale: int = 256  # scores are divided by its root, not by that of the head's width
    attention_cap: float = 50.0  # scores become cap * tanh(score / cap); 0 is off
    logit_cap: float = 30.0  # and so do logits
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("query_scale", "window"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"model.{name}={getattr(self, name)} must be greater than 0")
        for name in ("attention_cap", "logit_cap"):
            if getattr(self, name) < 0:
                raise ConfigError(f"model.{name}={getattr(self, name)} must not be negative (0 is off)")


@dataclass(frozen=True)
class MixtralConfig(MistralConfig):
    """Mixtral: a Mistral whose feed-forward layers are several experts (https://arxiv.org/abs/2401.04088)."""

    runtime_fields: ClassVar[tuple[str, ...]] = (*LlamaConfig.runtime_fields, "balance")

    ffn_dim: int = 704  # hidden width of one expert
    experts: int = 8  # in each layer; memory grows with them, time does not
    active: int = 2  # experts that a token goes through; time grows with them; at 1 the router gets no gradient
    balance: float = 0.02  # of the load-balance loss: more keeps experts as busy as one another; 0 is off
    rope_theta: float = 1e6
    window: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_experts(self.experts, self.active, self.balance)


@dataclass(frozen=True)
class Qwen3MoeConfig(Qwen3Config):
    """Qwen3's mixtures: many narrow experts (https://arxiv.org/abs/2505.09388, section 2)."""

    runtime_fields: ClassVar[tuple[str, ...]] = (*LlamaConfig.runtime_fields, "balance")

    ffn_dim: int = 192  # hidden width of one expert
    experts: int = 32  # in each layer; memory grows with them, time does not
    active: int = 8  # experts that a token goes through; time grows with them
    renormalise: bool = True  # the weights of a token's experts sum to one; else to their share of all
    balance: float = 0.001  # of the load-balance loss: more keeps experts as busy as one another; 0 is off
    tied: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_experts(self.experts, self.active, self.balance)


def _check_experts(experts: int, active: int, balance: float) -> None:
    if experts < 1:
        raise ConfigError(f"model.experts={experts} must be greater than 0")
    if not 1 <= active <= experts:
        raise ConfigError(f"model.active={active} must be at least 1 and at most model.experts={experts}")
    if balance < 0:
        raise ConfigError(f"model.balance={balance} must not be negative (0 is off)")


@dataclass(frozen=True)
class GPT2Config:
    """GPT-2 shape (Radford et al. 2019, "Language models are unsupervised multitask learners")."""

    runtime_fields: ClassVar[tuple[str, ...]] = ("dropout", "init_std")

    size: str = ""  # about so many parameters in all, such as 30m: makes dim, layers and heads
    dim: int = 768  # width C
    layers: int = 12  # depth L
    heads: int = 12  # heads H; dim / heads is the head width D
    context: int = 1024  # longest sequence: each position has an embedding of its own
    norm_eps: float = 1e-5
    tied: bool = True
    dropout: float = 0.0  # on the residual branches
    init_std: float = 0.02  # of every matrix; branches that end in the residual get init_std / sqrt(2 L)

    def __post_init__(self) -> None:
        for name in ("dim", "layers", "heads", "context"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"model.{name}={getattr(self, name)} must be greater than 0")
        if self.dim % self.heads:
            raise ConfigError(f"model.dim={self.dim} must be a multiple of model.heads={self.heads}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"model.dropout={self.dropout} must be at least 0 and less than 1")


@dataclass(frozen=True)
class HFConfig:
    """Any causal model of transformers, by its config.json."""

    settings: str = ""  # the text of a config.json; init_from=FOLDER fills it in


@dataclass(frozen=True)
class LoraConfig:
    """LoRA: W x + (alpha / rank) B A x, of which A and B are trained (https://arxiv.org/abs/2106.09685)."""

    magnitude: ClassVar[bool] = False
    root: ClassVar[bool] = False

    rank: int = 16  # rows of A and columns of B; more can learn more and takes more memory
    alpha: float = 32.0  # how loudly it is heard; with another rank the same alpha keeps about the same rate
    dropout: float = 0.0  # of what A reads
    targets: list[str] = field(default_factory=lambda: ["blocks.*"])  # linear layers, by pattern over their names
    also: list[str] = field(default_factory=list)  # modules that are trained whole instead, such as embed or head

    def __post_init__(self) -> None:
        for name in ("rank", "alpha"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"adapter.{name}={getattr(self, name)} must be greater than 0, and a number")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"adapter.dropout={self.dropout} must be at least 0 and less than 1")
        if not self.targets:
            raise ConfigError("adapter.targets=[] leaves an adapter nothing to stand on; [blocks.*] is every layer")

    @property
    def scaling(self) -> float:
        """Of B A x."""
        return self.alpha / (self.rank**0.5 if self.root else self.rank)


@dataclass(frozen=True)
class RsLoraConfig(LoraConfig):
    """LoRA scaled by alpha / sqrt(rank), which stays right at high ranks (https://arxiv.org/abs/2312.03732)."""

    root: ClassVar[bool] = True


@dataclass(frozen=True)
class DoraConfig(LoraConfig):
    """LoRA for the direction of each row, and a trained magnitude beside it (https://arxiv.org/abs/2402.09353)."""

    magnitude: ClassVar[bool] = True


@dataclass(frozen=True)
class QLoraConfig(LoraConfig):
    """LoRA over a base whose weights are held in 4 or 8 bits (https://arxiv.org/abs/2305.14314)."""

    quant_type: str = "nf4"  # nf4 | fp4 | int8: how the weights of blocks are held; 8 bits are nearer to the whole
    double_quant: bool = True  # of 4 bits: the scales of blocks are quantised too, 0.4 bits a weight less

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.quant_type not in ("nf4", "fp4", "int8"):
            raise ConfigError(f"adapter.quant_type={self.quant_type!r} is not one of nf4, fp4, int8")
