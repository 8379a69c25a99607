"""Mixtures of experts: a router sends each token through a few of many feed-forward layers.

Shazeer et al. 2017 (https://arxiv.org/abs/1701.06538), without noise and without a limit of tokens an expert: none is
ever dropped. Each expert is a layer as any other (`ffn.experts.3.up`), so checkpoints name it as published ones do, and
adapters, few bits and optimizers treat it as they treat every layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trivium.models.huggingface import Reader
from trivium.models.layers import GatedFFN, Linear
from trivium.models.llama import Llama


class Routing(NamedTuple):
    """Where the tokens of one layer go. probabilities: (N, E), of all experts. weights, chosen: (N, k), the most likely
    experts of each token and how loudly each is heard."""

    probabilities: Tensor
    weights: Tensor
    chosen: Tensor


class Router(nn.Module):
    """The k most likely of E experts for each token.

    Computed in fp32 whatever else is (Fedus et al. 2021, https://arxiv.org/abs/2101.03961, section 2.4). Not a linear
    layer: no adapter stands on it and it is never put into few bits.
    """

    def __init__(self, dim: int, experts: int, active: int, renormalise: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(experts, dim))
        self.active, self.renormalise = active, renormalise

    def forward(self, x: Tensor) -> Routing:
        """x: (N, C)."""
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            probabilities = F.linear(x.to(wide), self.weight.to(wide)).softmax(-1)
        weights, chosen = probabilities.topk(self.active, -1)
        if self.renormalise:
            weights = weights / weights.sum(-1, keepdim=True)
        return Routing(probabilities, weights, chosen)


class SparseFFN(nn.Module):
    """The weighted sum of what a token's experts say."""

    def __init__(self, dim: int, hidden: int, experts: int, active: int, renormalise: bool = True) -> None:
        super().__init__()
        self.router = Router(dim, experts, active, renormalise)
        self.experts = nn.ModuleList(GatedFFN(dim, hidden) for _ in range(experts))

    @torch.compiler.disable  # how many tokens an expert gets is known from their values only
    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        tokens = x.reshape(-1, x.shape[-1])
        routing: Routing = self.router(tokens)
        sent, order = routing.chosen.flatten().sort(stable=True)  # all that goes to one expert stands together
        ends = torch.searchsorted(sent, torch.arange(len(self.experts), device=x.device), right=True)
        sorted_tokens = tokens[order // self.router.active]
        compute = self.grouped if self._groups(tokens) else self.one_by_one
        said = compute(sorted_tokens, ends)[order.argsort()].view(*routing.chosen.shape, -1)
        return (said * routing.weights.to(said.dtype)[..., None]).sum(1).view(x.shape)

    def one_by_one(self, x: Tensor, ends: Tensor) -> Tensor:
        """(M, C) sorted by expert -> (M, C). ends: (E,), where each expert's tokens end.

        In training, experts without a token run too: every weight has a gradient, on every process.
        """
        sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()
        everyone = torch.is_grad_enabled()
        parts = zip(self.experts, x.split(sizes), strict=True)
        return torch.cat([expert(part) for expert, part in parts if everyone or len(part)])

    def grouped(self, x: Tensor, ends: Tensor) -> Tensor:
        """The same as three products, each over all experts: their number costs no launches, and nothing waits for the
        host. The copy that stacks them is the one that autocast would make of each."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        ends = ends.to(torch.int32)

        def product(x: Tensor, name: str) -> Tensor:
            weights = torch.stack([getattr(expert, name).weight for expert in self.experts]).to(dtype)
            return F.grouped_mm(x.to(dtype), weights.transpose(-2, -1), offs=ends)

        act: Any = self.experts[0].act
        return product(act(product(x, "gate")) * product(x, "up"), "down")

    def _groups(self, x: Tensor) -> bool:
        """Whether `grouped` can be, and pays: in training, on a GPU, in bf16 with rows of whole 16 bytes.

        Elsewhere few experts are met at once and stacking would copy all of them, or there is no fast kernel (LOG.md).
        """
        if x.device.type != "cuda" or not torch.is_grad_enabled():
            return False
        dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
        if dtype != torch.bfloat16 or torch.cuda.get_device_capability(x.device) < (8, 0):
            return False
        layers = [layer for expert in self.experts for layer in expert.children()]
        if any(type(layer) is not Linear or layer._forward_hooks for layer in layers):  # few bits, or an adapter
            return False
        first: Any = layers[0]
        return first.in_features % 8 == first.out_features % 8 == 0


@contextmanager
def routings(model: nn.Module) -> Iterator[list[Routing]]:
    """Lists each layer's routing of the calls that are made inside, in order; afterwards the model is as before.

    Activations that are made anew in the backward pass (`recompute`) come after, so nothing is listed twice.
    """
    found: list[Routing] = []

    def note(_router: nn.Module, _args: Any, routing: Routing) -> None:
        found.append(routing)

    handles = [module.register_forward_hook(note) for module in model.modules() if isinstance(module, Router)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def loads(routed: list[Routing], real: Tensor) -> Tensor:
    """(L, E): how many tokens each layer sent to each expert. real: (N,), 1 where a token counts and 0 where not."""
    counted = []
    for routing in routed:
        experts, active = routing.probabilities.shape[1], routing.chosen.shape[1]
        sent = real.repeat_interleave(active)
        counted.append(real.new_zeros(experts).index_add(0, routing.chosen.flatten(), sent))
    return torch.stack(counted)


class Sparse(Llama):
    """What families with experts have in common; a family is `class Mixtral(Sparse, Mistral)`."""

    tensor_plan: ClassVar[Mapping[str, str]] = {}  # experts are not shared out yet
    hf_expert: ClassVar[Mapping[str, str]] = {}
    """Names within a block of an expert's layers: ours -> Hugging Face's, with {} for the expert's number."""
    hf_experts: ClassVar[str] = "num_experts"
    """What config.json calls their number."""
    config: Any
    """A Llama's with `experts`, `active` and `balance` besides."""

    def hf_names(self) -> dict[str, str]:
        names = super().hf_names()
        for layer in range(self.config.layers):
            for number in range(self.config.experts):
                ours, theirs = f"blocks.{layer}.ffn.experts.{number}", f"model.layers.{layer}"
                names |= {
                    f"{ours}.{part}.weight": f"{theirs}.{name.format(number)}" for part, name in self.hf_expert.items()
                }
        return names

    def flops_per_token(self, context: int) -> float:
        idle = 1 - self.config.active / self.config.experts
        experts = [p for name, p in self.blocks.named_parameters() if ".experts." in name and p.dim() > 1]
        return super().flops_per_token(context) - 6 * idle * sum(p.numel() for p in experts)

    @classmethod
    def settings_from_hf(cls, config: Reader) -> dict[str, Any]:
        either = next((key for key in ("num_experts", "num_local_experts") if key in config.raw), cls.hf_experts)
        return {
            **super().settings_from_hf(config),
            "experts": config.count(either),
            "active": config.count("num_experts_per_tok"),
            "balance": config.get("router_aux_loss_coef", 0.001),
        }

    def hf_config(self) -> dict[str, Any]:
        c = self.config
        return {
            **super().hf_config(),
            self.hf_experts: c.experts,
            "num_experts_per_tok": c.active,
            "router_aux_loss_coef": c.balance,
        }
