"""Any causal language model of transformers behind our protocol: for families that have no file of their own here.

Slower than a native family, and as right as transformers is: what comes out is compared with its own logits when a
model is loaded (`confirm`), in one pass, packed and through the cache, and refused if it differs. Nothing of a
checkpoint is executed: configs that bring code of their own are refused.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trivium.errors import CheckpointError, ConfigError
from trivium.models.attention import visible
from trivium.models.cache import KVCache
from trivium.models.config import HFConfig
from trivium.models.huggingface import Reader
from trivium.models.names import few
from trivium.models.protocol import CausalLM

FULL, SLIDING = "full_attention", "sliding_attention"
LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx")
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
CLOSE = 1e-4  # of the largest logit where that is above 1: `confirm`


class HuggingFace(CausalLM):
    """transformers' model of `config.settings` (a config.json). `blocks` are its layers, under our name."""

    supports_packing: ClassVar[bool] = True
    hf_buffers: ClassVar[tuple[str, ...]] = ("rotary_emb.inv_freq", "attn.bias", "attn.masked_bias", "attention.bias")
    config: HFConfig

    def __init__(self, config: HFConfig, vocab_size: int) -> None:
        super().__init__(config, vocab_size)
        raw = settings_of(config)
        inner = _built(raw | {"vocab_size": vocab_size})
        self.settings = inner.config
        layers = [m for m in inner.base_model.modules() if isinstance(m, nn.ModuleList)]
        count = getattr(self.settings, "num_hidden_layers", 0)
        blocks = next((m for m in layers if len(m) == count), None)
        if blocks is None or inner.get_output_embeddings() is None:
            raise ConfigError(f"model_type={raw['model_type']!r} has no layers, or no head, that could be found")
        # in this order: what has two names is known by the first, which is ours
        self.blocks, self.embed, self.head = blocks, inner.get_input_embeddings(), inner.get_output_embeddings()
        self.inner = inner
        self._kinds = _kinds(self.settings)
        if any((getattr(self.settings, name, 0) or 0) > 1 for name in EXPERTS):
            self.untrainable = (
                f"model_type={raw['model_type']!r} has experts, whose balance is not learnt through model=hf; mixtral "
                "and qwen3_moe are native"
            )
        given = inspect.signature(inner.base_model.forward).parameters
        self._cache_name = "cache" if "cache" in given else "past_key_values"
        if "position_ids" not in given:
            raise ConfigError(f"model_type={raw['model_type']!r} takes no positions, so its rows cannot be packed")

    def forward(
        self, tokens: Tensor, positions: Tensor, segments: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        more: dict[str, Any] = {"use_cache": cache is not None}
        if cache is not None:
            more[self._cache_name] = _through(cache, positions)
        if segments is not None or cache is not None:
            slots = cache.length if cache is not None else None
            window = getattr(self.settings, "sliding_window", None) or 0
            masks = {
                kind: self._mask(visible(positions, segments, slots, window * (kind == SLIDING)))
                for kind in self._kinds
            }
            more["attention_mask"] = masks if len(masks) > 1 else next(iter(masks.values()))
        return self.inner.base_model(input_ids=tokens, position_ids=positions, **more).last_hidden_state

    def _mask(self, seen: Tensor | None) -> Tensor | None:
        if seen is None or self.settings._attn_implementation == "sdpa":
            return seen
        dtype = self.embed.weight.dtype
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)

    def tie(self) -> None:
        self.inner.tie_weights()

    def init_weights(self, seed: int) -> None:
        """As transformers draws them, from `seed`; what was drawn before and comes after is not changed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            drawn = _built(self.settings.to_dict())
        with torch.no_grad():
            for ours, theirs in zip(self.inner.parameters(), drawn.parameters(), strict=True):
                ours.copy_(theirs)

    def flops_per_token(self, context: int) -> float:
        heads, width = self._heads()
        matrices = sum(p.numel() for p in self.blocks.parameters() if p.dim() > 1) + self.head.weight.numel()
        return 6 * matrices + 12 * len(self.blocks) * heads * width * context / 2

    def new_cache(self, rows: int, length: int) -> KVCache:
        heads, width = self._heads()
        heads = getattr(self.settings, "num_key_value_heads", None) or heads
        weight = self.embed.weight
        return KVCache(len(self.blocks), rows, heads, length, width, device=weight.device, dtype=weight.dtype)

    def _heads(self) -> tuple[int, int]:
        heads = self.settings.num_attention_heads
        return heads, getattr(self.settings, "head_dim", None) or self.settings.hidden_size // heads

    def compile_blocks(self) -> None:
        raise ConfigError("trainer.compile=true is for native families; with model=hf set it to false")

    @property
    def recompute(self) -> int:
        """Whether layers keep no activations: all of them or none."""
        return getattr(self, "_every", 0)

    @recompute.setter
    def recompute(self, every: int) -> None:
        if not hasattr(self, "inner"):  # the base class sets it first
            return
        if every > 1:
            raise ConfigError(f"trainer.recompute={every}: model=hf recomputes every layer (1) or none (0)")
        if every:
            self.inner.gradient_checkpointing_enable({"use_reentrant": False})
        elif self.recompute:
            self.inner.gradient_checkpointing_disable()
        self._every = every

    @property
    def context(self) -> int:
        found = next((v for k in LENGTHS if isinstance(v := getattr(self.settings, k, None), int)), None)
        if found is None:
            raise ConfigError(f"model_type={self.settings.model_type!r} does not say how long its context is")
        return found

    @property
    def width_times_depth(self) -> int:
        return self.settings.hidden_size * len(self.blocks)

    def hf_names(self) -> dict[str, str]:
        theirs = {parameter: name for name, parameter in self.inner.named_parameters()}
        found = {name: theirs[parameter] for name, parameter in self.named_parameters() if parameter in theirs}
        modules = {module: name for name, module in self.inner.named_modules()}
        for name, module in self.named_modules():  # weights in few bits are no parameters
            if hasattr(module, "restored"):
                found[f"{name}.weight"] = f"{modules[module]}.weight"
        return found

    @classmethod
    def settings_from_hf(cls, config: Reader) -> dict[str, Any]:
        return {"settings": json.dumps(dict(config.raw), sort_keys=True)}

    def hf_config(self) -> dict[str, Any]:
        return settings_of(self.config) | {"vocab_size": self.vocab_size}

    @torch.no_grad()
    def confirm(self) -> None:
        """Compare with transformers' own logits: in one pass, packed, and through the cache. Raises CheckpointError."""
        try:
            self._confirm()
        except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
            told = (str(error).splitlines() or [type(error).__name__])[0]
            raise CheckpointError(f"model_type={self.settings.model_type!r} cannot be run here: {told}") from error

    def _confirm(self) -> None:
        was_training = self.training
        self.eval()
        length = min(40, self.context)
        device = self.embed.weight.device
        tokens = (torch.arange(2 * length, device=device) * 7 % self.vocab_size).view(2, length)
        places, cut = torch.arange(length, device=device).expand(2, -1), length // 3
        wanted = self.inner(tokens, use_cache=False).logits
        documents = torch.tensor([[1] * length + [2] * length], device=device)
        cache = self.new_cache(2, length + 25)
        steps = [self(tokens[:, p], places[:, p], cache=cache) for p in (slice(0, cut), slice(cut, length))]
        ways = {
            "in one pass": self(tokens, places),
            "packed": self(tokens.view(1, -1), places.reshape(1, -1), documents).view(2, length, -1),
            "through the cache": torch.cat(steps, 1),
        }
        for way, hidden in ways.items():
            off = (self.head(hidden) - wanted).abs().max().item()
            if not off <= CLOSE * max(1.0, wanted.abs().max().item()):
                raise CheckpointError(
                    f"model_type={self.settings.model_type!r} cannot be run here: {way} its logits are {off:.2g} off "
                    "transformers' own"
                )
        self.train(was_training)


def settings_of(config: HFConfig) -> dict[str, Any]:
    """The config.json that a model is made from. Raises ConfigError where there is none."""
    if not config.settings:
        raise ConfigError("model=hf needs a model: init_from=FOLDER, or model.settings='{...}' of a config.json")
    try:
        raw = json.loads(config.settings)
    except ValueError as error:
        raise ConfigError(f"model.settings is no JSON ({error})") from error
    if not isinstance(raw, dict) or not isinstance(raw.get("model_type"), str):
        raise ConfigError("model.settings is no config.json: it has no model_type")
    if raw.get("auto_map"):
        raise ConfigError(f"model_type={raw['model_type']!r} brings code of its own (auto_map), which is never run")
    return raw


def read_folder(path: Path) -> dict[str, Tensor]:
    """The weights of a folder by the names that transformers has in memory, which are not those of every file."""
    transformers = _transformers()
    try:
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except Exception as error:  # its own code raises anything for a folder that is wrong
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path} cannot be read by transformers {transformers.__version__}: {said}") from error
    model, told = loaded
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if found := told.get(kind):
            raise CheckpointError(f"{path} is of another architecture: {kind} {few(map(str, found))}")
    return dict(model.named_parameters())


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ConfigError("model=hf needs transformers, which is not installed: pip install trivium-llm[hf]") from error
    return transformers


def _built(raw: Mapping[str, Any]) -> Any:
    transformers = _transformers()
    settings = {key: value for key, value in raw.items() if key not in ("dtype", "torch_dtype", "transformers_version")}
    kind = settings.pop("model_type")
    try:
        config = transformers.AutoConfig.for_model(kind, **settings)
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    except Exception as error:  # its own code raises anything for a config that is wrong
        told = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"transformers {transformers.__version__} makes no causal model of {kind!r}: {told}"
        ) from error


def _kinds(settings: Any) -> set[str]:
    """What its layers see. Raises ConfigError for layers that are no attention over a mask."""
    window = getattr(settings, "sliding_window", None)
    rope = getattr(settings, "rope_parameters", None) or getattr(settings, "rope_scaling", None) or {}
    kinds = [rope, *(v for v in rope.values() if isinstance(v, Mapping))]
    turned = {kind.get("rope_type") for kind in kinds} & {"longrope", "dynamic"}
    if turned or any(getattr(settings, name, None) for name in ("attention_types", "attention_layers", "alibi")):
        told = f"positions of kind {turned.pop()}" if turned else "attention that no mask describes"
        raise ConfigError(f"model_type={settings.model_type!r} has {told}, which cannot be run here")
    found = set(getattr(settings, "layer_types", None) or [SLIDING if window else FULL])
    if odd := found - {FULL, SLIDING}:
        raise ConfigError(
            f"model_type={settings.model_type!r} has layers of {', '.join(odd)}, which cannot be run here"
        )
    return found


def _through(cache: KVCache, positions: Tensor) -> Any:
    """Our cache as transformers' layers use theirs."""
    from transformers.cache_utils import Cache

    class Through(Cache):
        def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
            return cache.update(layer_idx, key_states, value_states, positions)

        def get_seq_length(self, *_: Any, **__: Any) -> int:
            return 0

    return Through(layers=[])
