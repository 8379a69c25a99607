"""Adapters in the form of Hugging Face's peft: adapter_config.json beside adapter_model.safetensors.

Of that form's many options those are read that change nothing but which layers an adapter stands on and how loudly it
is heard; a file that uses another is refused by its name, never read as something else.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from trivium.errors import CheckpointError
from trivium.models.adapters import parts, standing_on
from trivium.models.huggingface import read_json
from trivium.models.names import few
from trivium.models.protocol import CausalLM
from trivium.models.weights import read_tensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
ENDS = {"a.weight": "lora_A.weight", "b.weight": "lora_B.weight", "magnitude": "lora_magnitude_vector"}

READ = ("peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "modules_to_save")
"""What decides the adapter. `target_modules` is not among them: the tensors say which layers it stands on."""
ASIDE = (
    *("auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "target_modules"),
    *("peft_version", "runtime_config", "fan_in_fan_out", "layers_pattern", "ensure_weight_tying", "exclude_modules"),
    *("layers_to_transform", "megatron_core", "qalora_group_size", "eva_config"),
)
"""What changes no number of a causal language model's adapter, or what the tensors say better."""
HARMLESS: dict[str, tuple[Any, ...]] = {"bias": ("none",), "init_lora_weights": (True, "gaussian", "eva", "orthogonal")}
"""Options and the values that leave an adapter plain: other starts (PiSSA, OLoRA, CorDA, LoftQ) change the base."""


def peft_names(model: CausalLM) -> dict[str, str]:
    """Our names of what an adapter's checkpoint holds -> peft's. A family without Hugging Face names keeps ours."""
    theirs = _hf_names(model)
    found = {}
    for name in parts(model):
        layer, _, end = name.partition(f".lora.{standing_on(model).heard[-1]}.")
        if end:
            module = theirs.get(f"{layer}.weight", f"{layer}.weight").removesuffix(".weight")
            found[name] = f"{PREFIX}{module}.{ENDS[end]}"
        else:
            found[name] = PREFIX + theirs.get(name, name)
    return found


def _hf_names(model: CausalLM) -> dict[str, str]:
    """None for a family, of a plugin perhaps, that has no Hugging Face form."""
    try:
        return model.hf_names()
    except (CheckpointError, NotImplementedError):
        return {}


def to_peft(model: CausalLM, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under peft's names. A whole embedding that the head shares is said twice: peft ties neither."""
    names = peft_names(model)
    found = {names[name]: _turned(model, name, tensor) for name, tensor in tensors.items()}
    head = f"{PREFIX}lm_head.weight"
    if model.head.weight is model.embed.weight and "embed.weight" in tensors and head not in found:
        found[head] = tensors["embed.weight"].clone()
    return found


def from_peft(model: CausalLM, tensors: Mapping[str, Tensor], origin: str) -> dict[str, Tensor]:
    """The inverse; names that this model's adapter does not have are kept, to be refused by name."""
    ours = {theirs: name for name, theirs in peft_names(model).items()}
    tied, head = model.head.weight is model.embed.weight, f"{PREFIX}lm_head.weight"
    found = {}
    for name, tensor in tensors.items():
        if tied and name == head and "embed.weight" in ours.values():
            embedding = tensors.get(next(t for t, o in ours.items() if o == "embed.weight"))
            if embedding is None or (type(embedding) is type(tensor) and not embedding.equal(tensor)):
                raise CheckpointError(f"{origin}: its head differs from its embedding, which this model shares")
            continue
        found[ours.get(name, name)] = _turned(model, ours.get(name, name), tensor)
    return found


def _turned(model: CausalLM, name: str, tensor: Tensor) -> Tensor:
    """A weight that is trained whole, as the other side holds it: of some families transposed."""
    whole = ".lora." not in name and name.endswith(model.hf_transposed or ("\0",))
    return tensor.t().contiguous() if whole and tensor.dim() == 2 else tensor


def peft_config(model: CausalLM, base: str) -> dict[str, Any]:
    """adapter_config.json of the adapter in use. base: where the model is that it stands on."""
    standing, names = standing_on(model), peft_names(model)
    label = standing.heard[-1]
    config = standing.configs[label]
    layers = [n.removeprefix(PREFIX).removesuffix(".lora_A.weight") for n in names.values() if ".lora_A" in n]
    # peft joins the adapters of a layer's experts, which changes the rank: a scale by its root would become another
    root = config.root and not any(".experts." in n for n in names)
    whole = [n.removeprefix(PREFIX).removesuffix(".weight") for n in names.values() if ".lora_" not in n]
    if model.head.weight is model.embed.weight and "embed.weight" in names:
        whole.append("lm_head")
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if model.score is None else "SEQ_CLS",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": config.alpha if root == config.root else config.scaling * config.rank,
        "lora_dropout": config.dropout,
        "use_rslora": root,
        "use_dora": config.magnitude,
        "target_modules": sorted(layers),
        "modules_to_save": sorted(whole) or None,
        "bias": "none",
        "fan_in_fan_out": any(n.endswith(".weight") for n in model.hf_transposed),
        "inference_mode": True,
    }


def read_peft(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The settings and tensors of a peft adapter. Raises CheckpointError for an option that is not known here."""
    path = folder / CONFIG
    said = read_json(path)
    if said.get("peft_type") != "LORA":
        raise CheckpointError(f"{path}: peft_type={said.get('peft_type')!r}; only LORA is known here")
    odd = [
        f"{key}={value!r}"
        for key, value in said.items()
        if key not in (*READ, *ASIDE) and value not in (None, False, {}, [], 0, *HARMLESS.get(key, ()))
    ]
    if odd:
        raise CheckpointError(f"{path} uses what is not known here: {few(odd)}")
    tensors = read_tensors(folder / WEIGHTS)
    if not any(name.endswith("lora_A.weight") for name in tensors):
        raise CheckpointError(f"{folder / WEIGHTS} holds no adapter: none of its tensors ends in lora_A.weight")
    return said, tensors


def settings_of(said: Mapping[str, Any], tensors: Mapping[str, Tensor], model: CausalLM, origin: str) -> dict[str, Any]:
    """{name, ...}: the adapter group's settings that fit a file; `model` is the one it is to stand on."""
    theirs = _hf_names(model)
    ours = {t.removesuffix(".weight"): o.removesuffix(".weight") for o, t in theirs.items()}

    def here(name: str) -> str:
        module = name.removeprefix(PREFIX)
        return ours.get(module, module)

    layers = sorted({here(n.rpartition(".lora_")[0]) for n in tensors if ".lora_" in n})
    whole = sorted({here(n.removesuffix(".weight")) for n in tensors if ".lora_" not in n})
    if model.head.weight is model.embed.weight:
        whole = [n for n in whole if n not in ("lm_head", "head")]
    kind = "dora" if said.get("use_dora") else "rslora" if said.get("use_rslora") else "lora"
    if said.get("use_dora") and said.get("use_rslora"):
        raise CheckpointError(f"{origin}: use_dora and use_rslora together are not known here")
    numbers = {"rank": said.get("r"), "alpha": said.get("lora_alpha"), "dropout": said.get("lora_dropout", 0.0)}
    for key, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise CheckpointError(f"{origin}: {key} is {value!r}, not a number")
    return {"name": kind, **numbers, "targets": layers, "also": whole}
