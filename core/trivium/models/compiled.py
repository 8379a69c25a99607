"""What torch.compile does for models: whether it can work here, and a token of each row as a few pieces of C++.

Decoding on a CPU waits for memory, and for the some thirty operations of a block, each of which finds its caches cold.
torch.compile makes one loop of several. Products of a single row are written as sums there (`Packed.streamed`): its
loops read weights faster than the kernels of libraries do for one row; those of several rows are oneDNN's (LOG.md).
Blocks that are alike share two compilations, one for a single row. Each is compared with itself as it runs without:
what a compiler makes is not taken on trust.
"""

from __future__ import annotations

import itertools
import os
import shlex
import shutil
import sys
import types
import weakref
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from trivium.errors import BackendError, ConfigError
from trivium.models.cache import KVCache
from trivium.models.experts import SparseFFN
from trivium.models.packed import Packed
from trivium.models.protocol import CausalLM

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}
"""Of what a block adds, relative to its size. Rounding makes up to 1e-6, and 0.03 where activations are bf16."""


def check_compiler(device: torch.device, option: str) -> None:
    """Refuse `option` where compiled code could not be built: C++ for a CPU, Triton for a GPU. Raises ConfigError."""
    if device.type == "cuda" and find_spec("triton") is None:
        raise ConfigError(f"{option} needs the package triton on a GPU; install it, or leave it false")
    named = os.environ.get("CXX") or {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")  # as inductor does
    try:
        program = shlex.split(named)[0]
    except (IndexError, ValueError):  # a quotation that does not end
        program = named
    if device.type == "cpu" and shutil.which(program) is None:
        raise ConfigError(
            f"{option} needs a C++ compiler, and there is no {named}; install one, name it in the environment variable "
            "CXX, or leave it false"
        )


_numbers = itertools.count()
_numbered: weakref.WeakValueDictionary[int, Packed] = weakref.WeakValueDictionary()


def _product(x: Tensor, number: Tensor, dtype: torch.dtype, outputs: int) -> Tensor:
    """A layer's product, for compiled code: what it is compiled from knows no weights in a kernel's own order."""
    return _numbered[int(number)](x)


_library = torch.library.Library("trivium", "DEF")
_library.define("packed(Tensor x, Tensor number, ScalarType dtype, int outputs) -> Tensor")
_library.impl("packed", _product, "CPU")  # custom_op's checks would take as long as a product of few rows


@torch.library.register_fake("trivium::packed")
def _(x: Tensor, number: Tensor, dtype: torch.dtype, outputs: int) -> Tensor:
    return x.new_empty(x.shape[0], outputs, dtype=dtype)


class Slots:
    """A layer's part of a KVCache, for a token of each row."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values, self.dtype = keys, values, keys.dtype

    def update(self, layer: int, keys: Tensor, values: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """As KVCache's."""
        for slots, new in ((self.keys, keys.to(self.dtype)), (self.values, values.to(self.dtype))):
            if positions.shape[0] == 1:
                slots.index_copy_(2, positions[0], new)
            else:
                rows = torch.arange(positions.shape[0], device=positions.device)
                slots[rows, :, positions[:, 0]] = new[:, :, 0]
        return self.keys, self.values


def _token(
    block: nn.Module,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    mask: Tensor,
    positions: Tensor,
    keys: Tensor,
    values: Tensor,
) -> Tensor:
    return block(x, (cos, sin), mask, positions, 0, Slots(keys, values))


@torch.no_grad()
def compile_tokens(model: CausalLM) -> None:
    """From now on a token of each row runs through compiled blocks. The model must not change any more.

    Takes seconds. Raises BackendError for a model that cannot be, and where a compiled block computes something else,
    ConfigError where there is no compiler.
    """
    if not getattr(model.blocks[0], "flat", False) or type(model).block is not CausalLM.block:
        raise BackendError(f"inference.compile=true is for the Llama family, not for {type(model).__name__}")
    if any(isinstance(module, SparseFFN) for module in model.blocks.modules()):
        raise BackendError("inference.compile=true is not for models with experts: which of them compute is not fixed")
    check_compiler(model.embed.weight.device, "inference.compile=true")
    for layer in [m for m in model.blocks.modules() if isinstance(m, Packed)]:
        layer.plain = layer.weight.to_dense() if layer.kind in ("fp32", "bf16") else None
        layer.number = torch.tensor(next(_numbers))
        _numbered[int(layer.number)] = layer
    one, several = (torch.compile(_own(name), fullgraph=True) for name in ("token", "tokens"))
    try:
        for length in (48, 80):
            for rows, run in ((1, one), (2, several), (5, several)):
                _prove(model, run, model.new_cache(rows, length), length - 9)
    except (RuntimeError, torch._dynamo.exc.TorchDynamoException) as error:  # type: ignore[reportAttributeAccessIssue]
        told = str(error).strip().splitlines()
        raise BackendError(
            f"inference.compile=true: blocks of {type(model).__name__} cannot be compiled "
            f"({told[0] if told else type(error).__name__}); set inference.compile=false"
        ) from error
    model.token = lambda block, x, *more: (one if len(x) == 1 else several)(block, x, *more)


def _own(name: str) -> Callable[..., Tensor]:
    """`_token` with a count of compilations of its own."""
    return types.FunctionType(_token.__code__.replace(co_name=name), globals())


def _prove(model: CausalLM, run: Callable[..., Tensor], cache: KVCache, length: int) -> None:
    """Every block on random numbers, compiled and as it is."""
    generator = torch.Generator().manual_seed(length)
    for held in (cache.keys, cache.values):
        held.copy_(torch.randn(held.shape, generator=generator))
    rows = cache.keys.shape[1]
    given = torch.randn(rows, model.embed.weight.shape[1], generator=generator)
    inputs: list[tuple[Tensor, ...]] = []

    def noted(block: nn.Module, x: Tensor, *more: Tensor) -> Tensor:
        inputs.append(more)
        return x

    place = torch.arange(length // 2, length // 2 + rows)[:, None]  # what lies in later slots must not be seen
    part = cache.part(slice(0, rows), length)
    model.token = noted
    dtype = model(torch.zeros_like(place), place, cache=part).dtype
    model.token = None
    if len(inputs) != len(model.blocks):
        raise BackendError(f"inference.compile=true: {type(model).__name__} does not run single tokens block by block")
    given, limit = given.to(dtype), TOLERANCE[cache.dtype]
    for more in inputs:
        _, _, mask, _, keys, values = more
        for tensor, dim in ((mask, 3), (keys, 2), (values, 2)):  # of any length, 1 too: nothing is compiled again
            torch._dynamo.decorators.mark_unbacked(tensor, dim)
        for tensor in (given, *more) if rows > 1 else ():
            torch._dynamo.decorators.mark_dynamic(tensor, 0)
    for number, (block, more) in enumerate(zip(model.blocks, inputs, strict=True)):
        found = run(block, given, *more).float() - given.float()  # first: it must not find what the other wrote
        cos, sin, mask, positions, *_ = more
        wanted = block(given, (cos, sin), mask, positions, number, part).float() - given.float()
        if not wanted.isfinite().all():
            raise BackendError(f"block {number} gives values that are not finite: its weights are not sound")
        size = wanted.norm().item() or 1.0  # a block that adds nothing
        off = (found - wanted).norm().item() / size
        if not off <= limit:
            raise BackendError(
                f"inference.compile=true: block {number} computes something else when it is compiled, off by {off:.2g} "
                f"of its size where rounding explains {limit:g}; set inference.compile=false"
            )
