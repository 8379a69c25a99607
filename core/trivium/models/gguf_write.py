"""GGUF files out: config.json's keys, Hugging Face's tensors and a tokenizer's keys, as llama.cpp's converter has them
(https://github.com/ggml-org/llama.cpp, convert_hf_to_gguf.py). What a file cannot say is refused by name: llama.cpp
would compute something else and not complain.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trivium.disk import sync_file, sync_folder
from trivium.errors import CheckpointError, ConfigError
from trivium.models.gguf import FAMILIES, ROPE_FREQS, Part, by_pairs, llama3_factors, parts_of, theta_of
from trivium.models.names import difference

FILE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 7}
"""What general.file_type calls the types that are written."""
NEEDED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
          "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings")  # fmt: skip
NEEDED_OF_GPT2 = ("vocab_size", "n_embd", "n_layer", "n_head", "n_positions", "layer_norm_epsilon",
                  "tie_word_embeddings")  # fmt: skip
YARN = {"beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": 0.0}
"""What llama.cpp takes for granted of yarn."""


def write_gguf(
    path: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    tokenizer: Mapping[str, Any],
    dtype: str = "F32",
) -> None:
    """Write a model as llama.cpp reads it, whole or not at all; one tensor at a time is in memory.

    config and tensors in Hugging Face's words, tokenizer as `GGUF.tokenizer` has it (chat template included). dtype:
    F32, F16 or Q8_0, of the matrices: norms, biases and positions stay fp32, and a matrix whose rows Q8_0 cannot cut
    into blocks is F16. Raises ConfigError for what GGUF cannot say, CheckpointError for tensors that do not fit or are
    not finite.
    """
    from gguf import GGMLQuantizationType, GGUFWriter  # here: importing it takes 0.4 s
    from gguf.quants import quant_shape_to_byte_shape, quantize

    if dtype not in FILE_TYPES:
        raise ConfigError(f"dtype={dtype} cannot be written as GGUF; choose {', '.join(FILE_TYPES)}")
    config = _writable(config)
    parts, factors = parts_of(config, len(tensors), "the model to be written"), _factors(config)
    if told := difference({p.hf for p in parts}, tensors.keys()):
        raise CheckpointError(f"{path} is not written: the model {told}")
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    writer = GGUFWriter(temporary, config["model_type"])
    try:
        _write_keys(writer, config, FILE_TYPES[dtype])
        _write_tokenizer(writer, tokenizer, config["vocab_size"])
        kinds = {}
        for p in parts:
            kinds[p.gguf] = kind = GGMLQuantizationType[_kind(p, dtype)]
            raw = quant_shape_to_byte_shape(p.shape, kind) if kind.name == "Q8_0" else p.shape
            number = np.dtype({"F32": "float32", "F16": "float16", "Q8_0": "uint8"}[kind.name])
            writer.add_tensor_info(p.gguf, raw, number, math.prod(raw) * number.itemsize, raw_dtype=kind)
        if factors is not None:
            writer.add_tensor_info(ROPE_FREQS, tuple(factors.shape), np.dtype("float32"), 4 * factors.numel())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for p in parts:
            tensor = as_stored(p.gguf, tensors[p.hf].detach().float().cpu(), config)
            if tuple(tensor.shape) != p.shape:
                raise CheckpointError(
                    f"{path} is not written: {p.hf} is {tuple(tensor.shape)}, the config says {p.shape}"
                )
            if not _survives(tensor, kinds[p.gguf].name):
                raise CheckpointError(f"{path} is not written: {p.hf} holds values that are not finite in {dtype}")
            writer.write_tensor_data(quantize(tensor.contiguous().numpy(), kinds[p.gguf]))
        if factors is not None:
            writer.write_tensor_data(factors.numpy())
        writer.close()
        sync_file(temporary)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror or error}") from error
    except (ValueError, struct.error) as error:
        raise ConfigError(
            f"{path} is not written: a key of the model or its tokenizer has no form there ({error})"
        ) from error
    finally:
        writer.close()
        temporary.unlink(missing_ok=True)


def as_stored(name: str, tensor: Tensor, config: Mapping[str, Any]) -> Tensor:
    """A tensor of Hugging Face's as the file has it under `name`: what `read_gguf` undoes.

    The 1 that Gemma's norms get added is rounded to fp32, and so is what is read back: it differs by up to 6e-8.
    """
    kind, layer_part = config["model_type"], name.split(".")[2] if name.startswith("blk.") else ""
    if kind == "llama" and layer_part in ("attn_q", "attn_k"):
        return by_pairs(tensor, config[f"num_{'attention' if layer_part == 'attn_q' else 'key_value'}_heads"])
    if kind == "gemma2" and name.endswith("norm.weight"):
        return tensor + 1
    return tensor.T.contiguous() if kind == "gpt2" and tensor.dim() == 2 and layer_part else tensor


def _kind(part: Part, dtype: str) -> str:
    if len(part.shape) == 1 or part.gguf == "position_embd.weight":
        return "F32"
    return "F16" if dtype == "Q8_0" and part.shape[-1] % 32 else dtype


def _survives(tensor: Tensor, kind: str) -> bool:
    """Whether all values, or the fp16 scales of blocks, are finite in the file."""
    kept = tensor.half() if kind == "F16" else (tensor.abs().amax() / 127).half() if kind == "Q8_0" else tensor
    return bool(torch.isfinite(kept).all())


def _writable(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with what it leaves to Hugging Face's defaults, or ConfigError naming what GGUF cannot say of it."""
    kind = config.get("model_type")
    if kind not in FAMILIES and kind != "mistral":
        raise ConfigError(f"model_type={kind} cannot be written as GGUF; {', '.join(FAMILIES)} and mistral can")
    needed = NEEDED_OF_GPT2 if kind == "gpt2" else NEEDED
    if lacking := [key for key in needed if config.get(key) is None]:
        raise ConfigError(f"the config of the model to be written lacks {', '.join(lacking)}")
    if kind == "gpt2":
        return {**config, "n_inner": config.get("n_inner") or 4 * config["n_embd"]}
    heads, window = config["num_attention_heads"], config.get("sliding_window")
    width = config.get("head_dim") or config["hidden_size"] // heads
    extras: dict[str, Any] = {k: config[k] for k in ("attention_bias", "mlp_bias") if config.get(k)}
    if kind == "gemma2":
        extras |= _unsaid_of_gemma2(config, width)
    elif window and window < config["max_position_embeddings"]:  # llama.cpp's Llama sees everything before a token
        extras["sliding_window"] = window
    if extras:
        told = ", ".join(f"{key}={value}" for key, value in extras.items())
        raise ConfigError(f"model_type={kind} with {told} cannot be written as GGUF: no key says so")
    filled = {"num_key_value_heads": config.get("num_key_value_heads") or heads, "head_dim": width}
    return {**config, **filled, "model_type": "llama" if kind == "mistral" else kind}


def _unsaid_of_gemma2(config: Mapping[str, Any], width: int) -> dict[str, Any]:
    """What llama.cpp fixes of Gemma 2 and this config has otherwise."""
    deep = config["num_hidden_layers"] == 46  # by which it knows the size that divides by the width a head
    scalar = config["hidden_size"] // config["num_attention_heads"] if deep else width
    fixed = {"query_pre_attn_scalar": scalar, "tie_word_embeddings": True}
    found = {k: config.get(k) for k, only in fixed.items() if config.get(k) != only}
    caps = ("attn_logit_softcapping", "final_logit_softcapping")
    return found | {k: config.get(k) for k in caps if not config.get(k)}


def _scaling_written(config: Mapping[str, Any]) -> dict[str, Any]:
    scaling = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    type = scaling.get("rope_type") or scaling.get("type") or "default"
    if type not in ("default", "linear", "yarn", "llama3"):
        raise ConfigError(f"rope scaling of type {type} cannot be written as GGUF; linear, yarn and llama3 can")
    if type == "yarn":
        scaling = {key: value for key, value in scaling.items() if key not in YARN or value != YARN[key]}
    extras = scaling.keys() - {"rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings"}
    if extras and type != "llama3":
        raise ConfigError(f"rope scaling with {', '.join(sorted(extras))} cannot be written as GGUF")
    if type == "llama3" and config["model_type"] != "llama":
        raise ConfigError(f"rope scaling of type llama3 cannot be written as GGUF for {config['model_type']}")
    return {**scaling, "rope_type": type}


def _factors(config: Mapping[str, Any]) -> Tensor | None:
    if config["model_type"] == "gpt2":
        return None
    scaling = _scaling_written(config)
    return llama3_factors(config, scaling) if scaling["rope_type"] == "llama3" else None


def _write_keys(writer: Any, config: Mapping[str, Any], file_type: int) -> None:
    """Keys as llama.cpp's converter writes them; the architecture is there already."""
    kind = config["model_type"]
    writer.add_file_type(file_type)
    writer.add_quantization_version(2)
    writer.add_vocab_size(config["vocab_size"])
    if kind == "gpt2":
        writer.add_context_length(config["n_positions"])
        writer.add_embedding_length(config["n_embd"])
        writer.add_block_count(config["n_layer"])
        writer.add_feed_forward_length(config["n_inner"])
        writer.add_head_count(config["n_head"])
        writer.add_layer_norm_eps(config["layer_norm_epsilon"])
        return
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(theta_of(config))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if kind == "gemma2":
        writer.add_sliding_window(config["sliding_window"])
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    scaling = _scaling_written(config)
    if scaling["rope_type"] in ("linear", "yarn"):
        writer.add_string(f"{kind}.rope.scaling.type", scaling["rope_type"])
        writer.add_rope_scaling_factor(scaling["factor"])
    if scaling["rope_type"] == "yarn":
        length = scaling.get("original_max_position_embeddings") or config["max_position_embeddings"]
        writer.add_rope_scaling_orig_ctx_len(length)


def _write_tokenizer(writer: Any, tokenizer: Mapping[str, Any], vocab_size: int) -> None:
    adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
              list: writer.add_array}  # fmt: skip
    tokens = tokenizer.get("tokenizer.ggml.tokens", ())
    if len(tokens) > vocab_size:
        raise ConfigError(f"the tokenizer has {len(tokens):,} tokens, and the model's embedding {vocab_size:,} rows")
    for key, value in tokenizer.items():
        if type(value) not in adders:
            raise ConfigError(f"the tokenizer's {key} is a {type(value).__name__}, which GGUF has no type for")
        adders[type(value)](key, value)
