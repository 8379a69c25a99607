"""GGUF files in, in Hugging Face's words: config.json's keys, its tensor names, its order of rows (out: gguf_write.py).

What llama.cpp's converter (https://github.com/ggml-org/llama.cpp, convert_hf_to_gguf.py) did on the way in is undone:
the rows of q and k of Llama files are stored by rotary pairs, Gemma's norms have 1 added, GPT-2's matrices lie the
other way round. Mistral files say "llama" of themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trivium.errors import CheckpointError
from trivium.models.gguf_file import Header, read_header
from trivium.models.names import difference, few

Block = Mapping[str, tuple[str, str]]
OUTER: Block = {
    "token_embd.weight": ("model.embed_tokens.weight", "VC"),
    "output_norm.weight": ("model.norm.weight", "C"),
    "output.weight": ("lm_head.weight", "VC"),
}
LLAMA: Block = {
    "attn_norm.weight": ("input_layernorm.weight", "C"),
    "attn_q.weight": ("self_attn.q_proj.weight", "QC"),
    "attn_k.weight": ("self_attn.k_proj.weight", "KC"),
    "attn_v.weight": ("self_attn.v_proj.weight", "KC"),
    "attn_output.weight": ("self_attn.o_proj.weight", "CQ"),
    "ffn_norm.weight": ("post_attention_layernorm.weight", "C"),
    "ffn_gate.weight": ("mlp.gate_proj.weight", "FC"),
    "ffn_up.weight": ("mlp.up_proj.weight", "FC"),
    "ffn_down.weight": ("mlp.down_proj.weight", "CF"),
}
QWEN2: Block = LLAMA | {
    "attn_q.bias": ("self_attn.q_proj.bias", "Q"),
    "attn_k.bias": ("self_attn.k_proj.bias", "K"),
    "attn_v.bias": ("self_attn.v_proj.bias", "K"),
}
QWEN3: Block = LLAMA | {
    "attn_q_norm.weight": ("self_attn.q_norm.weight", "D"),
    "attn_k_norm.weight": ("self_attn.k_norm.weight", "D"),
}
GEMMA2: Block = LLAMA | {
    "post_attention_norm.weight": ("post_attention_layernorm.weight", "C"),
    "ffn_norm.weight": ("pre_feedforward_layernorm.weight", "C"),
    "post_ffw_norm.weight": ("post_feedforward_layernorm.weight", "C"),
}
GPT2_OUTER: Block = {
    "token_embd.weight": ("transformer.wte.weight", "VC"),
    "position_embd.weight": ("transformer.wpe.weight", "PC"),
    "output_norm.weight": ("transformer.ln_f.weight", "C"),
    "output_norm.bias": ("transformer.ln_f.bias", "C"),
    "output.weight": ("lm_head.weight", "VC"),
}
GPT2: Block = {
    "attn_norm.weight": ("ln_1.weight", "C"),
    "attn_norm.bias": ("ln_1.bias", "C"),
    "attn_qkv.weight": ("attn.c_attn.weight", "TC"),
    "attn_qkv.bias": ("attn.c_attn.bias", "T"),
    "attn_output.weight": ("attn.c_proj.weight", "CC"),
    "attn_output.bias": ("attn.c_proj.bias", "C"),
    "ffn_norm.weight": ("ln_2.weight", "C"),
    "ffn_norm.bias": ("ln_2.bias", "C"),
    "ffn_up.weight": ("mlp.c_fc.weight", "FC"),
    "ffn_up.bias": ("mlp.c_fc.bias", "F"),
    "ffn_down.weight": ("mlp.c_proj.weight", "CF"),
    "ffn_down.bias": ("mlp.c_proj.bias", "C"),
}
FAMILIES: Mapping[str, tuple[str, Block]] = {
    "llama": ("LlamaForCausalLM", LLAMA),
    "qwen2": ("Qwen2ForCausalLM", QWEN2),
    "qwen3": ("Qwen3ForCausalLM", QWEN3),
    "gemma2": ("Gemma2ForCausalLM", GEMMA2),
    "gpt2": ("GPT2LMHeadModel", GPT2),
}
"""Architecture -> Hugging Face's class, and the tensors of a layer: GGUF's name -> Hugging Face's, and the shape in
letters: V vocabulary, C width, Q query heads times head width, K key heads times it, D head width, F feed-forward
width, P positions, T three times C."""
ROPE_FREQS = "rope_freqs.weight"


@dataclass(frozen=True)
class GGUF:
    """A model out of a GGUF file.

    config: as config.json has it. tensors: fp32 under Hugging Face's names; each is read when it is asked for, so that
    no more than one is held besides those that the caller keeps. tokenizer: the keys that begin with "tokenizer.".
    """

    config: dict[str, Any]
    tensors: Mapping[str, Tensor]
    tokenizer: dict[str, Any]


@dataclass(frozen=True)
class Part:
    """One tensor under both names. shape: in the GGUF file."""

    gguf: str
    hf: str
    shape: tuple[int, ...]


class _Tensors(Mapping[str, Tensor]):
    """Tensors by Hugging Face's names, read when asked for. Raises CheckpointError where values are not finite."""

    def __init__(self, header: Header, parts: list[Part], change: Callable[[str, Tensor], Tensor]) -> None:
        self._header, self._parts, self._change = header, {p.hf: p.gguf for p in parts}, change

    def __getitem__(self, name: str) -> Tensor:
        return self._change(self._parts[name], self._header.read(self._parts[name]))

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)


def read_gguf(path: Path) -> GGUF:
    """Read a GGUF file. Raises CheckpointError naming it for anything damaged, unknown, missing or of another shape.

    Non-finite values are found when their tensor is asked for.
    """
    header = read_header(path)
    kind = header.text("general.architecture")
    if kind not in FAMILIES:
        raise CheckpointError(f"{path} is of the architecture {kind!r}; read are {', '.join(FAMILIES)}")
    if header.values.get(f"{kind}.attention.causal", True) is not True:
        raise CheckpointError(f"{path} reads its text in both directions ({kind}.attention.causal is not true)")
    config = _config_of_gpt2(header) if kind == "gpt2" else _config_of(header, kind)
    parts = parts_of(config, len(header.tensors), str(path))
    _agree(header, parts, free={ROPE_FREQS} if kind == "llama" else set())
    if ROPE_FREQS in header.tensors:
        config["rope_scaling"] = _llama3_scaling(header, config)
    heads = {"attn_q": config.get("num_attention_heads", 1), "attn_k": config.get("num_key_value_heads", 1)}

    def change(name: str, tensor: Tensor) -> Tensor:
        layer_part = name.split(".")[2] if name.startswith("blk.") else ""
        if kind == "llama" and layer_part in heads:
            return by_halves(tensor, heads[layer_part])
        if kind == "gemma2" and name.endswith("norm.weight"):
            return tensor - 1
        if kind == "gpt2" and tensor.dim() == 2 and layer_part:
            return tensor.T.contiguous()
        return tensor

    tokenizer = {key: value for key, value in header.values.items() if key.startswith("tokenizer.")}
    return GGUF(config, _Tensors(header, parts, change), tokenizer)


def by_halves(weight: Tensor, heads: int) -> Tensor:
    """Rows (heads * D, ...) of q or k from GGUF's order, rotary pairs together, to Hugging Face's, a half after a half.

    >>> by_halves(torch.arange(8), 2).tolist()
    [0, 2, 1, 3, 4, 6, 5, 7]
    """
    return weight.view(heads, -1, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def by_pairs(weight: Tensor, heads: int) -> Tensor:
    """The inverse of `by_halves`."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def _config_of(header: Header, kind: str) -> dict[str, Any]:
    """config.json of a file whose model has rotary positions and RMS norms."""
    dim, heads = header.whole(f"{kind}.embedding_length"), header.whole(f"{kind}.attention.head_count")
    head_dim = header.whole(f"{kind}.attention.key_length", dim // heads)
    kv_heads = header.whole(f"{kind}.attention.head_count_kv", heads)
    same = {f"{kind}.attention.value_length": head_dim, f"{kind}.rope.dimension_count": head_dim}
    for key, wanted in same.items():
        if header.whole(key, wanted) != wanted:
            raise CheckpointError(f"{header.path}: {key} is {header.values[key]}; only the head width {wanted} is read")
    if heads % kv_heads or head_dim % 2:
        raise CheckpointError(
            f"{header.path}: {heads} query heads, {kv_heads} key heads of width {head_dim} do not fit"
        )
    config = {
        "architectures": [FAMILIES[kind][0]],
        "model_type": kind,
        "vocab_size": _vocabulary(header, kind),
        "hidden_size": dim,
        "intermediate_size": header.whole(f"{kind}.feed_forward_length"),
        "num_hidden_layers": header.whole(f"{kind}.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": header.whole(f"{kind}.context_length"),
        "rms_norm_eps": header.real(f"{kind}.attention.layer_norm_rms_epsilon"),
        "rope_theta": header.real(f"{kind}.rope.freq_base", 10000.0),
        "rope_scaling": _scaling(header, kind),
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "torch_dtype": "float32",
        **_token_ids(header),
    }
    if kind == "gemma2":
        config["hidden_act"] = config["hidden_activation"] = "gelu_pytorch_tanh"
        config["sliding_window"] = header.whole("gemma2.attention.sliding_window", 4096)
        config["attn_logit_softcapping"] = header.real("gemma2.attn_logit_softcapping", 50.0)
        config["final_logit_softcapping"] = header.real("gemma2.final_logit_softcapping", 30.0)
        # no key tells; llama.cpp goes by the depth too: of the three sizes only 27B divides by the width a head
        config["query_pre_attn_scalar"] = dim // heads if config["num_hidden_layers"] == 46 else head_dim
    return config


def _config_of_gpt2(header: Header) -> dict[str, Any]:
    return {
        "architectures": [FAMILIES["gpt2"][0]],
        "model_type": "gpt2",
        "vocab_size": _vocabulary(header, "gpt2"),
        "n_embd": header.whole("gpt2.embedding_length"),
        "n_inner": header.whole("gpt2.feed_forward_length"),
        "n_layer": header.whole("gpt2.block_count"),
        "n_head": header.whole("gpt2.attention.head_count"),
        "n_positions": header.whole("gpt2.context_length"),
        "activation_function": "gelu_new",
        "layer_norm_epsilon": header.real("gpt2.attention.layer_norm_epsilon"),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "torch_dtype": "float32",
        **_token_ids(header),
    }


def _vocabulary(header: Header, kind: str) -> int:
    if "token_embd.weight" not in header.tensors:
        raise CheckpointError(f"{header.path} lacks token_embd.weight")
    rows = header.tensors["token_embd.weight"].shape[0]
    tokens = header.values.get("tokenizer.ggml.tokens")
    claims = [header.whole(f"{kind}.vocab_size", rows), len(tokens) if isinstance(tokens, list) else rows]
    if claims[0] != rows or claims[1] > rows:
        raise CheckpointError(
            f"{header.path}: the embedding has {rows:,} rows, for {claims[0]:,} entries and {claims[1]:,} tokens"
        )
    return rows


def _token_ids(header: Header) -> dict[str, int]:
    names = {"bos": "bos", "eos": "eos", "pad": "padding"}
    ids = {f"{hf}_token_id": header.values.get(f"tokenizer.ggml.{gguf}_token_id") for hf, gguf in names.items()}
    return {name: found for name, found in ids.items() if isinstance(found, int)}


def _scaling(header: Header, kind: str) -> dict[str, Any] | None:
    """config.json's rope_scaling. Raises CheckpointError for a kind that cannot be said there exactly."""
    keys = {key.removeprefix(f"{kind}.rope.") for key in header.values if key.startswith(f"{kind}.rope.scal")}
    type = header.values.get(f"{kind}.rope.scaling.type", "none")
    known = {"scaling.type", "scaling.factor", "scaling.original_context_length", "scaling.finetuned"}
    if type not in ("none", "linear", "yarn") or not keys <= known:
        raise CheckpointError(f"{header.path}: rope scaling of type {type!r} with {few(keys)} is not read")
    if type == "none":
        return None
    scaling = {"rope_type": type, "factor": header.real(f"{kind}.rope.scaling.factor")}
    if type == "yarn":
        scaling["original_max_position_embeddings"] = header.whole(f"{kind}.rope.scaling.original_context_length")
    return scaling


def llama3_factors(config: Mapping[str, Any], scaling: Mapping[str, Any]) -> Tensor:
    """By what Llama 3.1 divides each of the D / 2 rotary frequencies: 1 for short waves, `factor` for long ones
    (Grattafiori et al. 2024, https://arxiv.org/abs/2407.21783; the rule is in Meta's and Hugging Face's code)."""
    steps = torch.arange(0, config["head_dim"], 2, dtype=torch.float64) / config["head_dim"]
    wave = 2 * math.pi * theta_of(config) ** steps
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = ((scaling["original_max_position_embeddings"] / wave - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / scaling["factor"] + smooth)).float()


def _llama3_scaling(header: Header, config: Mapping[str, Any]) -> dict[str, Any]:
    """The rope_scaling that a file's divisors come from: it has none of the four numbers, and three never differed."""
    found = header.read(ROPE_FREQS)
    scaling = {"rope_type": "llama3", "factor": round(found.max().item(), 4), "low_freq_factor": 1.0}
    scaling |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    expected = llama3_factors(config, scaling)
    if found.shape != expected.shape or not torch.allclose(found, expected, rtol=1e-5):
        raise CheckpointError(f"{header.path}: {ROPE_FREQS} are not Llama 3's divisors of the rotary frequencies")
    return scaling


def parts_of(config: Mapping[str, Any], most: int, origin: str) -> list[Part]:
    """Every tensor that a model of this config has. most: refuse more layers than this many tensors can fill."""
    family = config["model_type"]
    outer, block = (GPT2_OUTER if family == "gpt2" else OUTER), FAMILIES[family][1]
    if family == "gpt2":
        dim, layers, where = config["n_embd"], config["n_layer"], "transformer.h"
        sizes = {"V": config["vocab_size"], "C": dim, "F": config["n_inner"], "P": config["n_positions"], "T": 3 * dim}
    else:
        layers, where, width = config["num_hidden_layers"], "model.layers", config["head_dim"]
        sizes = {"V": config["vocab_size"], "C": config["hidden_size"], "F": config["intermediate_size"], "D": width}
        sizes |= {"Q": config["num_attention_heads"] * width, "K": config["num_key_value_heads"] * width}
    if layers * len(block) > most:
        raise CheckpointError(f"{origin} has {most:,} tensors; {layers:,} layers have {layers * len(block):,}")
    names = [(gguf, hf, shape) for gguf, (hf, shape) in outer.items()]
    for i in range(layers):
        names += [(f"blk.{i}.{gguf}", f"{where}.{i}.{hf}", shape) for gguf, (hf, shape) in block.items()]
    tied = config["tie_word_embeddings"]
    return [Part(g, h, tuple(sizes[c] for c in s)) for g, h, s in names if not (tied and g == "output.weight")]


def _agree(header: Header, parts: list[Part], free: set[str]) -> None:
    names = {p.gguf for p in parts}
    if told := difference(names, header.tensors.keys() - (free - names)):
        raise CheckpointError(f"{header.path} is of another architecture than it says: it {told}")
    for p in parts:
        if (found := header.tensors[p.gguf].shape) != p.shape:
            raise CheckpointError(f"{header.path}: {p.gguf} is {found}; by the file's own keys it would be {p.shape}")


def theta_of(config: Mapping[str, Any]) -> float:
    """rope_theta where transformers 4 writes it, or where transformers 5 does."""
    return float(config.get("rope_theta") or (config.get("rope_parameters") or {}).get("rope_theta") or 10000.0)
