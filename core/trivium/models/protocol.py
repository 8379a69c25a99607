"""What every language model is here: tokens to hidden states, and a head apart from them.

`hidden` and `head` are apart so that losses can choose which positions (and how many at once) meet the vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trivium.errors import CheckpointError
from trivium.models.cache import KVCache
from trivium.models.huggingface import Reader


class CausalLM(nn.Module, ABC):
    """Built as `cls(config, vocab_size)`; building allocates but does not initialise (`init_weights` does).

    embed: the token embedding. head: hidden -> logits, a module of its own. score: hidden -> (..., 1), of a reward
    model; None in a language model.
    """

    supports_packing: ClassVar[bool] = False
    """Whether `segments` is honoured; packing is refused where it is not."""

    tensor_plan: ClassVar[Mapping[str, str]] = {}
    """How several processes compute one block together: the linear layers of a block by name, each "columns" (its
    outputs are shared out) or "rows" (its inputs are, and the outputs summed). Where the module that holds a layer has
    a `width`, cuts fall on multiples of it: heads stay whole. Without a plan they cannot."""

    mixes: ClassVar[bool] = False
    """Whether linear layers may give bf16 while what blocks add to is fp32: copies for inference are like that then."""

    untrainable: str = ""
    """Why it cannot be trained, where it cannot."""

    hf_prefix: ClassVar[str] = ""
    """Of Hugging Face's names; files that leave it out are read too."""
    hf_buffers: ClassVar[tuple[str, ...]] = ("rotary_emb.inv_freq",)
    """Ends of names that files hold and that are no weights."""
    hf_transposed: ClassVar[tuple[str, ...]] = ()
    """Ends of our names whose tensors are the transposes of Hugging Face's."""

    embed: nn.Embedding
    head: nn.Linear
    score: nn.Linear | None
    blocks: nn.ModuleList

    def __init__(self, config: Any, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = vocab_size
        self.score = None
        self.adapters: Any = None  # what models.adapters has put on it
        self.recompute = 0
        self._compiled: tuple[Any, ...] = ()
        self.token: Callable[..., Tensor] | None = None  # what models.compiled has made of its blocks

    def add_score_head(self) -> None:
        """Make a reward model of it. The head starts at zero: no answer is better than another yet."""
        weight = self.embed.weight
        self.score = nn.Linear(weight.shape[1], 1, bias=False, device=weight.device, dtype=weight.dtype)
        nn.init.zeros_(self.score.weight)

    def compile_blocks(self) -> None:
        """From now on, blocks run through torch.compile where no cache is used. They share one compilation."""
        self._compiled = tuple(torch.compile(block) for block in self.blocks)  # a tuple: no second submodules

    def block(self, layer: int, *args: Any, cache: KVCache | None = None) -> Tensor:
        """Run block `layer`: what `forward` calls, so that training can compile blocks and forget their activations.

        recompute = n: every n-th keeps none for the backward pass (Chen et al. 2016, https://arxiv.org/abs/1604.06174).
        """
        if cache is not None:
            if self.token is not None and args[0].dim() == 2 and type(cache) is KVCache:
                x, angles, *more = args
                return self.token(self.blocks[layer], x, *angles, *more, *cache.layer(layer))
            return self.blocks[layer](*args, layer, cache)
        run = self._compiled[layer] if self._compiled else self.blocks[layer]
        if self.recompute and layer % self.recompute == 0 and torch.is_grad_enabled():
            return checkpoint(run, *args, use_reentrant=False)  # type: ignore[return-value]
        return run(*args)

    @abstractmethod
    def forward(
        self, tokens: Tensor, positions: Tensor, segments: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """(B, T) token ids at (B, T) positions -> (B, T, C) hidden states, after the last norm.

        segments: (B, T) document numbers of packed rows; attention never crosses them.
        cache: keys and values of earlier positions; the call writes its own at `positions`. None in training.
        """

    @abstractmethod
    def init_weights(self, seed: int) -> None:
        """Fill every parameter from `seed`, the same on every device and whatever was drawn before."""

    @abstractmethod
    def flops_per_token(self, context: int) -> float:
        """Training FLOPs a token: 6 x parameters in matrix products + 12 L C context/2 for causal attention."""

    @abstractmethod
    def new_cache(self, rows: int, length: int) -> KVCache:
        """An empty cache for `rows` sequences of up to `length` tokens, on the model's device."""

    def tie(self) -> None:
        """Let head and embedding be one where the settings say `tied`: after construction, and again after `to_empty`
        on the meta device has given each its own."""
        if getattr(self.config, "tied", False):
            self.head.weight = self.embed.weight

    @abstractmethod
    def hf_names(self) -> dict[str, str]:
        """Our parameter names -> the names of the same tensors in a Hugging Face checkpoint of this family."""

    @classmethod
    def settings_from_hf(cls, config: Reader) -> dict[str, Any]:
        """The settings of this family that a Hugging Face config.json states; CheckpointError where it cannot be."""
        raise CheckpointError(f"{config.origin}: {cls.__name__} cannot be read from Hugging Face's form")

    def hf_config(self) -> dict[str, Any]:
        """The inverse: what config.json says of this model, without model_type."""
        raise CheckpointError(f"{type(self).__name__} has no Hugging Face form")

    def confirm(self) -> None:  # noqa: B027
        """Called once the weights are there: refuse a model that cannot be run right. Raises CheckpointError."""

    @property
    def context(self) -> int:
        """Longest sequence, in tokens."""
        return self.config.context

    @property
    def num_parameters(self) -> int:
        """Parameters, a tied one counted once, quantised ones by what they stand for."""
        return sum(p.numel() for p in self.parameters()) + sum(getattr(m, "held", 0) for m in self.modules())

    @property
    def width_times_depth(self) -> int:
        """C x L, for estimates of memory; 0 for a family that names them otherwise."""
        return getattr(self.config, "dim", 0) * getattr(self.config, "layers", 0)
