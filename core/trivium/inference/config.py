"""Settings of the inference backends. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from trivium.errors import ConfigError
from trivium.schema import EncoderSettings


@dataclass(frozen=True)
class SamplingConfig:
    """How tokens are drawn unless a request says otherwise."""

    temperature: float = 0.0  # 0 is greedy; 1 samples the model's own distribution
    top_k: int = 0  # keep the k likeliest tokens; 0 keeps all
    top_p: float = 1.0  # keep the likeliest tokens that together reach this probability
    max_tokens: int = 64  # longest answer
    seed: int = 0  # equal seeds give equal answers, whatever else is in the batch

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ConfigError(f"inference.sampling.temperature={self.temperature} must not be negative")
        if self.top_k < 0:
            raise ConfigError(f"inference.sampling.top_k={self.top_k} must not be negative")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"inference.sampling.top_p={self.top_p} must be more than 0 and at most 1")
        if self.max_tokens <= 0:
            raise ConfigError(f"inference.sampling.max_tokens={self.max_tokens} must be greater than 0")


@dataclass(frozen=True)
class BackendConfig:
    """What every backend can be told."""

    sampling: SamplingConfig = field(default_factory=SamplingConfig)


@dataclass(frozen=True)
class NativeConfig(BackendConfig):
    """Our own engine: batched, ragged, cached, on the weights that are being trained."""

    max_batch: int = 64  # rows decoded together; more is faster a token and takes more cache memory
    step_tokens: int = (
        512  # tokens that a step computes at most: a long prompt is read in pieces between steps of others
    )
    memory: str = "auto"  # slab: contiguous, for CPUs; paged: as much as rows use, for GPUs; auto: by the device
    slots: int = 0  # tokens whose keys and values are held; 0: a quarter of the free memory, no more than can be used
    page: int = 16  # tokens of a page: what prompts share is found in whole pages
    prefix_cache: bool = True  # prompts that begin as earlier ones did do not compute that again
    prefix_slots: int = 0  # tokens kept for later prompts beside a slab; 0: a quarter of `slots`
    speculate: str = "none"  # guess tokens, confirm them together: ngram (what followed before), draft (a small model),
    # self (the model's own weights in fewer bits)
    draft: str = ""  # for speculate=draft: a run, a folder or a file of a model with the same tokenizer
    draft_weights: str = "int8"  # for speculate=self: bf16, int8, int4
    draft_tokens: int = 4  # guesses at a time
    draft_rows: int = 4  # guess while so many rows are decoded at most: with more, a pass has enough to do
    cache: str = "same"  # keys and values as the weights are, or int8: in a half or a quarter of the memory
    weights: str = "same"  # the very ones being trained; or a copy made for speed: fp32, bf16, int8, int4
    compile: bool = False  # decode through compiled blocks: some seconds at the start, and a C++ compiler

    def __post_init__(self) -> None:
        if self.speculate not in ("none", "ngram", "draft", "self"):
            raise ConfigError(f"inference.speculate={self.speculate} is not none, ngram, draft or self")
        if (self.speculate == "draft") != bool(self.draft):
            raise ConfigError(
                f"inference.speculate={self.speculate} and inference.draft={self.draft or '(none)'} do not go "
                "together: speculate=draft takes the model that draft names"
            )
        for name in ("max_batch", "step_tokens", "page", "draft_tokens", "draft_rows"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"inference.{name}={getattr(self, name)} must be greater than 0")
        for name in ("slots", "prefix_slots"):
            if getattr(self, name) < 0:
                raise ConfigError(f"inference.{name}={getattr(self, name)} must not be negative")
        if self.memory not in ("auto", "slab", "paged"):
            raise ConfigError(f"inference.memory={self.memory} is not auto, slab or paged")
        if self.cache not in ("same", "int8"):
            raise ConfigError(f"inference.cache={self.cache} is not same or int8")
        if self.weights not in ("same", "fp32", "bf16", "int8", "int4"):
            raise ConfigError(f"inference.weights={self.weights} is not same, fp32, bf16, int8 or int4")
        if self.compile and self.weights == "same":
            raise ConfigError("inference.compile=true is of a copy: set inference.weights=fp32, bf16, int8 or int4")
        if self.compile and (self.cache != "same" or self.memory == "paged"):
            raise ConfigError(
                f"inference.compile=true is for keys in a slab, as they are: inference.cache={self.cache} and "
                f"inference.memory={self.memory} must be same, and auto or slab"
            )
        if self.draft_weights not in ("bf16", "int8", "int4"):
            raise ConfigError(f"inference.draft_weights={self.draft_weights} is not bf16, int8 or int4")
        bits = {"same": 32, "fp32": 32, "bf16": 16, "int8": 8, "int4": 4}
        if self.speculate == "self" and bits[self.draft_weights] >= bits[self.weights]:
            raise ConfigError(
                f"inference.speculate=self guesses with inference.draft_weights={self.draft_weights}, which must be of "
                f"fewer bits than the weights that answer, inference.weights={self.weights}"
            )


@dataclass(frozen=True)
class HFBackendConfig(BackendConfig):
    """transformers' generate over the same weights: slow, and independent of ours."""


@dataclass(frozen=True)
class LlamaCppConfig(BackendConfig):
    """llama.cpp over a GGUF file, in a process of its own."""

    form: ClassVar[str] = "gguf"
    """What `path` is."""
    path: str = ""  # the GGUF file; empty: the one that init_from names, else one that is written of the model
    threads: int = 0  # of the processor; 0: as many as this process may use
    context: int = 0  # tokens of prompt and answer together; 0: as many as the model knows, which all take memory
    gpu_layers: int = 0  # layers on the GPU, where llama.cpp was built for one

    def __post_init__(self) -> None:
        for name in ("threads", "context", "gpu_layers"):
            if getattr(self, name) < 0:
                raise ConfigError(f"inference.{name}={getattr(self, name)} must not be negative")


@dataclass(frozen=True)
class EncoderConfig(BackendConfig, EncoderSettings):
    """An encoder, which makes vectors of texts and writes none."""

    alone: ClassVar[bool] = True
    """It is a model of its own: init_from has no part in it."""


@dataclass(frozen=True)
class VLLMConfig(BackendConfig):
    """vLLM over a Hugging Face folder, for one or several GPUs. Never run by the project's own tests."""

    form: ClassVar[str] = "folder"
    path: str = ""  # the folder; empty: the one that init_from names, else one that is written of the model
    dtype: str = "auto"  # auto: the folder's own
    gpu_memory: float = 0.9  # share of each GPU's memory that is taken
    tensor_parallel: int = 1  # GPUs that compute a layer together
    context: int = 0  # tokens of prompt and answer together; 0: as many as the model knows

    def __post_init__(self) -> None:
        if self.dtype not in ("auto", "float32", "float16", "bfloat16"):
            raise ConfigError(f"inference.dtype={self.dtype} is not auto, float32, float16 or bfloat16")
        if not 0 < self.gpu_memory <= 1:
            raise ConfigError(f"inference.gpu_memory={self.gpu_memory} must be more than 0 and at most 1")
        if self.tensor_parallel <= 0 or self.context < 0:
            raise ConfigError(
                f"inference.tensor_parallel={self.tensor_parallel} must be greater than 0, "
                f"inference.context={self.context} not negative"
            )
