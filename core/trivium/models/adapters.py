"""Low-rank adapters as functions over any model: a few small matrices are trained, its own weights stay as they are.

LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685), rsLoRA (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732)
and DoRA (Liu et al. 2024, https://arxiv.org/abs/2402.09353). An adapter is a submodule of the linear layer it stands on
(`blocks.0.attn.q.lora.NAME.a.weight`) and is heard through a forward hook, so no layer changes its class or its name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from trivium.errors import CheckpointError, ConfigError
from trivium.models.config import LoraConfig
from trivium.models.names import few
from trivium.models.protocol import CausalLM
from trivium.models.weights import copy_weights

DEFAULT = "default"


class Lora(nn.Module):
    """One adapter of one linear layer: scaling * B A x beside its W x. B starts at zero, so at first nothing changes.

    With a magnitude m (DoRA), the sum W + scaling B A is normed by rows and scaled by m, which starts at W's own norms.
    """

    def __init__(self, layer: Any, config: LoraConfig, generator: torch.Generator | None) -> None:
        """layer: a linear one, of (out, in) weights. generator: A is drawn from it, U(-1/sqrt(in), 1/sqrt(in))."""
        super().__init__()
        out, into, device = layer.out_features, layer.in_features, _device_of(layer)
        self.a = nn.Linear(into, config.rank, bias=False, device="meta")
        self.b = nn.Linear(config.rank, out, bias=False, device="meta")
        drawn = torch.empty(config.rank, into).uniform_(-(into**-0.5), into**-0.5, generator=generator)
        self.a.weight = nn.Parameter(drawn.to(device))
        self.b.weight = nn.Parameter(torch.zeros(out, config.rank, device=device))
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.scaling = config.scaling
        norms = _norms(weight_of(layer)) if config.magnitude else None
        self.magnitude = nn.Parameter(norms) if norms is not None else None

    @property
    def update(self) -> Tensor:
        """(out, in): scaling * B A, in fp32."""
        with torch.autocast(self.a.weight.device.type, enabled=False):
            return self.scaling * (self.b.weight.float() @ self.a.weight.float())

    def forward(self, x: Tensor, output: Tensor, layer: Any) -> Tensor:
        """What the layer says with this adapter. x: (..., in). output: (..., out), what it said without."""
        update = self.b(self.a(self.dropout(x))) * self.scaling
        if self.magnitude is None:
            return output + update.to(output.dtype)
        with torch.no_grad():  # no gradient through the norm (section 4.3 of DoRA)
            norms = _norms(weight_of(layer) + self.update)
        plain = output if layer.bias is None else output - layer.bias
        scaled = (self.magnitude / norms).to(output.dtype) * (plain + update.to(output.dtype))
        return scaled if layer.bias is None else scaled + layer.bias


class Adapters(nn.ModuleDict):
    """The adapters of one layer by name. heard: the names that are in use, one list for the whole model."""

    hook: RemovableHandle

    def __init__(self, heard: list[str]) -> None:
        super().__init__()
        self.heard = heard


@dataclass
class Standing:
    """What stands on a model. heard: the adapters in use. whole: of modules that are trained whole beside an adapter,
    its own values and the model's by parameter name. merged: those whose update is in the weights."""

    heard: list[str] = field(default_factory=list)
    configs: dict[str, LoraConfig] = field(default_factory=dict)
    whole: dict[str, dict[str, tuple[Tensor, Tensor]]] = field(default_factory=dict)
    merged: dict[str, dict[str, Tensor]] = field(default_factory=dict)


def _hear(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    adapters: Any = layer.lora
    for name in adapters.heard:
        if name in adapters:
            output = adapters[name](args[0], output, layer)
    return output


def attach(config: LoraConfig, model: CausalLM, seed: int = 0, name: str = DEFAULT) -> None:
    """Put an adapter on every linear layer that a pattern of `config.targets` matches, and use it alone.

    Everything else stops being trained, except what `config.also` names (which gets no adapter) and a reward model's
    head. Raises ConfigError for a pattern that matches no linear layer, and for the head.
    """
    standing = standing_on(model)
    if name in standing.configs:
        raise ConfigError(f"there is an adapter called {name} already: {few(standing.configs)}")
    extra = _whole(model, config)
    layers = {n: layer for n, layer in _targets(model, config).items() if f"{n}.weight" not in extra}
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for layer in layers.values():
        if not isinstance(getattr(layer, "lora", None), Adapters):
            layer.lora = Adapters(standing.heard)
            layer.lora.hook = layer.register_forward_hook(_hear)
        layer.lora[name] = Lora(layer, config, generator)
    standing.configs[name] = config
    standing.whole[name] = {n: (p.data, p.detach().clone()) for n, p in extra.items()}
    use(model, name)


def use(model: CausalLM, *names: str) -> None:
    """Hear these adapters and no others (none: the model itself), and let the last one be trained.

    What two of them add is summed. Raises ConfigError for an unknown name, and for what cannot be summed.
    """
    standing = standing_on(model)
    for name in names:
        if name not in standing.configs:
            raise ConfigError(f"no adapter is called {name}; there are {few(standing.configs) or 'none'}")
    if len(names) > 1 and any(standing.configs[n].magnitude or standing.whole[n] for n in names):
        raise ConfigError(f"{', '.join(names)} cannot be used together: DoRA and whole modules do not add up")
    if standing.merged:
        raise ConfigError(f"{few(standing.merged)} is merged into the weights; take it out first")
    _swap(model, names)
    standing.heard[:] = names
    trained = _parts(model, names[-1]) if names else {}
    for n, p in model.named_parameters():
        p.requires_grad_(n in trained)


@contextmanager
def without(model: CausalLM) -> Iterator[CausalLM]:
    """The model as it was before any adapter, while the block lasts: what a reference is asked as."""
    standing = standing_on(model)
    heard = list(standing.heard)
    if standing.merged:
        raise ConfigError(f"{few(standing.merged)} is merged into the weights; the model alone is not to be had")
    _swap(model, ())
    standing.heard.clear()
    try:
        yield model
    finally:
        _swap(model, heard)
        standing.heard[:] = heard


def standing_on(model: CausalLM) -> Standing:
    """The adapters of a model; made when first asked for."""
    if model.adapters is None:
        model.adapters = Standing()
    return model.adapters


def parts(model: CausalLM) -> dict[str, nn.Parameter]:
    """What a checkpoint of this model holds: of one with an adapter in use what belongs to that, else everything."""
    if not has_adapter(model):
        return dict(model.named_parameters())
    return _parts(model, standing_on(model).heard[-1])


def has_adapter(model: CausalLM) -> bool:
    """Whether an adapter is in use."""
    return model.adapters is not None and bool(model.adapters.heard)


def _parts(model: CausalLM, name: str) -> dict[str, nn.Parameter]:
    whole = standing_on(model).whole[name]
    return {n: p for n, p in model.named_parameters() if f".lora.{name}." in n or n in whole or n.startswith("score.")}


def load_parts(model: CausalLM, tensors: Mapping[str, Tensor], origin: str) -> None:
    """Put a checkpoint's tensors into what it holds of this model, with the checks of `copy_weights`."""
    copy_weights(parts(model), tensors, origin)


@torch.no_grad()
def merge(model: CausalLM) -> None:
    """Add the adapters in use to the weights they stand on, in fp32: the same answers without their work.

    Raises CheckpointError for weights that are quantised: what is merged would be rounded anew. `dequantise` first.
    """
    standing = standing_on(model)
    for layer_name, layer in adapted(model):
        if not isinstance(layer, nn.Linear):
            raise CheckpointError(f"{layer_name} is quantised, and an adapter is merged into whole weights only")
        adapters: Any = layer.lora
        for name in standing.heard:
            if name not in adapters:
                continue
            lora: Any = adapters[name]
            weight, dtype = layer.weight.float() + lora.update, layer.weight.dtype
            if lora.magnitude is not None:
                factor = lora.magnitude.float() / _norms(weight)
                standing.merged.setdefault(name, {})[layer_name] = factor
                weight *= factor[:, None]
            layer.weight.copy_(weight.to(dtype))
    for name in standing.heard:
        standing.merged.setdefault(name, {})
    standing.heard.clear()


@torch.no_grad()
def unmerge(model: CausalLM) -> None:
    """Take merged adapters out of the weights again, and hear them as before."""
    standing = standing_on(model)
    for layer_name, layer in adapted(model):
        for name in reversed(standing.merged):
            if name not in layer.lora:
                continue
            weight, factor = layer.weight.float(), standing.merged[name].get(layer_name)
            weight = weight if factor is None else weight / factor[:, None]
            layer.weight.copy_((weight - layer.lora[name].update).to(layer.weight.dtype))
    standing.heard[:] = list(standing.merged)
    standing.merged.clear()


def detach(model: CausalLM) -> None:
    """Forget every adapter: what is merged stays in the weights, what is not is lost. All parameters may be trained."""
    for _, layer in adapted(model):
        layer.lora.hook.remove()
        del layer.lora
    model.adapters = None
    model.requires_grad_(True)


def dequantise(model: CausalLM) -> None:
    """Give quantised layers whole weights again: the values that they compute with, not those they once had."""
    found: list[tuple[str, Any]] = [(n, m) for n, m in model.named_modules() if hasattr(m, "restored")]
    for name, layer in found:
        whole: Any = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        whole.weight, whole.bias = nn.Parameter(layer.restored().float(), requires_grad=False), layer.bias
        if isinstance(getattr(layer, "lora", None), Adapters):
            whole.lora = layer.lora
            whole.lora.hook = whole.register_forward_hook(_hear)
        model.set_submodule(name, whole)


def quantise(model: CausalLM, quantiser: Any) -> None:
    """Replace the weights of the linear layers in blocks. quantiser: a linear layer -> its quantised stand-in."""
    for name, layer in list(model.named_modules()):
        if name.startswith("blocks.") and isinstance(layer, nn.Linear):
            model.set_submodule(name, quantiser(layer))


def adapted(model: CausalLM) -> Iterator[tuple[str, Any]]:
    """The layers that adapters stand on, by name."""
    for name, layer in model.named_modules():
        if isinstance(getattr(layer, "lora", None), Adapters):
            yield name, layer


def weight_of(layer: Any) -> Tensor:
    """(out, in), as the layer computes with it, in fp32."""
    return (layer.restored() if hasattr(layer, "restored") else layer.weight.detach()).float()


def _norms(weight: Tensor) -> Tensor:
    return torch.linalg.vector_norm(weight, dim=1)


def _device_of(layer: Any) -> torch.device:
    return layer.device if hasattr(layer, "restored") else layer.weight.device


def _targets(model: CausalLM, config: LoraConfig) -> dict[str, Any]:
    linear = {
        name: layer
        for name, layer in model.named_modules()
        if ".lora." not in name and (isinstance(layer, nn.Linear) or hasattr(layer, "restored")) and name != "score"
    }
    found = {}
    for pattern in config.targets:
        matched = {name: layer for name, layer in linear.items() if fnmatchcase(name, pattern)}
        if not matched:
            raise ConfigError(f"adapter.targets: {pattern!r} matches no linear layer; there are {few(linear)}")
        found |= matched
    if "head" in found:  # losses meet it chunk by chunk, with a backward pass of their own (objectives.logprobs)
        raise ConfigError("adapter.targets: no adapter can stand on the head; adapter.also=[head] trains it whole")
    return found


def _whole(model: CausalLM, config: LoraConfig) -> dict[str, nn.Parameter]:
    names = dict(model.named_parameters(remove_duplicate=False))
    first = {p: n for n, p in model.named_parameters()}
    found = {}
    for pattern in config.also:
        matched = [
            n for n in names if ".lora." not in n and (fnmatchcase(n, pattern) or fnmatchcase(n, f"{pattern}.*"))
        ]
        if not matched:
            raise ConfigError(f"adapter.also: {pattern!r} matches no module; there are {few(names)}")
        found |= {first[names[n]]: names[n] for n in matched}  # a tied one under its first name
    return found


@torch.no_grad()
def _swap(model: CausalLM, names: Any) -> None:
    """Give modules that are trained whole the values they have under these adapters; keep those they have now."""
    standing = standing_on(model)
    if not any(standing.whole.values()):  # a reference asks often
        return
    parameters = dict(model.named_parameters())
    for label, held in standing.whole.items():
        was, will = label in standing.heard, label in names
        for name, (original, own) in held.items():
            if was and not will:
                held[name] = original, parameters[name].data
                parameters[name].data = original.to(parameters[name])  # the model may have moved since
            elif will and not was:
                parameters[name].data = own.to(parameters[name])
            else:
                continue
            torch.clear_autocast_cache()  # it may hold the values from before, cast
