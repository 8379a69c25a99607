"""Single tokens through compiled blocks: the answers of the same weights uncompiled, and nothing compiled later."""

import dataclasses
import gc
import re
import shutil

import pytest
import torch
from tests.inference.test_packed import SIZES, VOCAB, model_of
from torch._dynamo.utils import counters

from trivium.errors import BackendError, ConfigError
from trivium.inference.config import NativeConfig
from trivium.inference.native.engine import NativeBackend, collect
from trivium.models import attention, compiled
from trivium.models.config import LlamaConfig, MistralConfig
from trivium.models.llama import Llama
from trivium.models.mistral import Mistral
from trivium.models.packed import packed
from trivium.types import Request, SamplingParams

compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="NO C++ COMPILER: torch.compile IS NOT TESTED HERE")
PROMPTS = [tuple(range(3, 9)), tuple(range(40, 45)), (7,)]
LONG = 600
"""Slots, several times what a slab begins with."""


def long_model(name="llama"):
    if name == "mistral":
        model = Mistral(MistralConfig(**SIZES, window=8), VOCAB)
        model.init_weights(seed=3)
        model.eval()
    else:
        model = model_of(name)
    model.config = dataclasses.replace(model.config, context=LONG)
    return model


def answer(backend, prompt, new):
    params = SamplingParams(max_tokens=new, min_tokens=new)
    return collect(backend, [Request("a", prompt, params)])["a"]


@compiler
@pytest.mark.parametrize(
    ("name", "kind", "within"),
    [
        ("llama", "fp32", 1e-4), ("qwen2", "fp32", 1e-4), ("qwen3", "fp32", 1e-4), ("gemma2", "fp32", 1e-4),
        ("mistral", "fp32", 1e-4),
        ("llama", "bf16", 0.4), ("llama", "int8", 0.4), ("llama", "int4", 0.4), ("gemma2", "int8", 0.4),
    ],
)  # fmt: skip
def test_the_same_weights_say_the_same(name, kind, within):
    """Each token's log-probability is that of reading the whole answer without compiled blocks; fp32 gives the very
    tokens besides. The slab of keys grows from 64 slots to 600 meanwhile, and nothing is compiled after the start."""
    model = long_model(name)
    plain, fast = (NativeBackend(NativeConfig(weights=kind, compile=c), model) for c in (False, True))
    assert fast._copy is not None, "compiled before anybody asks"
    assert fast.reader.token is not None and plain.reader.token is None
    counters.clear()
    for prompt, new in zip(PROMPTS, (20, 80, LONG - 10), strict=True):
        found = answer(fast, prompt, new)
        scored = plain.score([*prompt, *(e.token_id for e in found)])[len(prompt) - 1 :]
        off = [abs(e.logprob - other) for e, other in zip(found, scored, strict=True)]
        assert max(off) < within and sum(off) / len(off) < within / 10
        if kind == "fp32":
            assert [e.token_id for e in found] == [e.token_id for e in answer(plain, prompt, new)]
    assert not counters["stats"]["unique_graphs"]


@compiler
@pytest.mark.parametrize(
    ("name", "kind"), [("llama", "fp32"), ("qwen3", "fp32"), ("gemma2", "fp32"), ("llama", "int8")]
)
def test_neighbours_come_and_go(name, kind):
    """Rows begin and end apart, up to twelve at once: each says what it says uncompiled, nothing is compiled anew."""
    plain, fast = (NativeBackend(NativeConfig(weights=kind, compile=c), long_model(name)) for c in (False, True))
    counters.clear()
    ways = []
    for backend in (plain, fast):
        requests = [
            Request(str(n), PROMPTS[n % 3], SamplingParams(max_tokens=5 * n + 1, temperature=1.0, seed=n))
            for n in range(12)
        ]
        ways.append(collect(backend, requests))
    slow, quick = ({i: [e.token_id for e in events] for i, events in way.items()} for way in ways)
    assert [len(quick[str(n)]) for n in range(12)] == [5 * n + 1 for n in range(12)]
    if kind == "fp32":
        assert quick == slow
        off = [abs(a.logprob - b.logprob) for i in quick for a, b in zip(*(way[i] for way in ways), strict=True)]
        assert max(off) < 1e-4
    else:
        prompts = {str(n): PROMPTS[n % 3] for n in range(12)}
        for i, events in ways[1].items():
            scored = plain.score([*prompts[i], *(e.token_id for e in events)])[len(prompts[i]) - 1 :]
            assert max(abs(e.logprob - other) for e, other in zip(events, scored, strict=True)) < 0.4
    assert not counters["stats"]["unique_graphs"]


@compiler
def test_a_layer_that_is_gone_takes_its_number_along():
    """Layers are found by number from compiled code, which must not keep a model that nobody uses any more."""
    numbered = compiled._numbered
    gc.collect()
    before = len(numbered)
    model = packed(model_of(), "fp32", compiled=True)
    assert len(numbered) == before + 4 * len(model.blocks)
    del model
    gc.collect()
    assert len(numbered) == before


@compiler
def test_guesses_of_its_own_are_compiled_too():
    settings = {"weights": "fp32", "speculate": "self", "draft_weights": "int8"}
    plain, fast = (NativeBackend(NativeConfig(**settings, compile=c), long_model()) for c in (False, True))
    assert fast._guesser.model.token is not None
    assert [e.token_id for e in answer(fast, PROMPTS[0], 40)] == [e.token_id for e in answer(plain, PROMPTS[0], 40)]
    assert fast.stats().accepted_tokens > 0


@compiler
def test_weights_that_change_are_compiled_anew():
    model = long_model()
    fast = NativeBackend(NativeConfig(weights="fp32", compile=True), model)
    before = answer(fast, PROMPTS[0], 20)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.3)
    after = answer(fast, PROMPTS[0], 20)
    fresh = answer(NativeBackend(NativeConfig(weights="fp32"), model), PROMPTS[0], 20)
    assert fast.reader.token is not None and after != before
    assert [e.token_id for e in after] == [e.token_id for e in fresh]
    assert [e.logprob for e in after] == pytest.approx([e.logprob for e in fresh], abs=1e-4)


@compiler
def test_a_block_with_constants_of_its_own_keeps_them():
    """Blocks share a compilation only where they are alike: here the second one's norm is another."""
    model = Llama(dataclasses.replace(LlamaConfig(**SIZES), layers=3), VOCAB)
    model.init_weights(seed=3)
    model.eval().blocks[1].attn_norm.eps = 10.0
    counters.clear()
    fast = NativeBackend(NativeConfig(weights="fp32", compile=True), model)
    assert counters["stats"]["unique_graphs"] == 2 + 2, "for one row and for several"
    found = answer(fast, PROMPTS[0], 20)
    scored = NativeBackend(NativeConfig(), model).score([*PROMPTS[0], *(e.token_id for e in found)])[5:]
    assert [e.logprob for e in found] == pytest.approx(scored, abs=1e-4)


@compiler
def test_a_compiled_block_that_is_wrong_is_found(monkeypatch):
    """Here the compiled form of attention sees slots that it must not."""
    right = attention.attend_one
    monkeypatch.setattr(attention, "attend_one", lambda q, k, v, mask, *rest: right(q, k, v, mask.clamp(min=0), *rest))
    with pytest.raises(
        BackendError, match=r"block 0 computes something else when it is compiled, off by [\d.]+ of its"
    ):
        packed(model_of(), "fp32", compiled=True)


@compiler
def test_keys_of_several_rows_in_wrong_slots_are_found(monkeypatch):
    right = compiled.Slots.update

    def update(self, layer, keys, values, positions):
        return right(self, layer, keys, values, positions if positions.shape[0] == 1 else positions.flip(0))

    monkeypatch.setattr(compiled.Slots, "update", update)
    with pytest.raises(BackendError, match="block 0 computes something else when it is compiled, off by "):
        packed(model_of(), "fp32", compiled=True)


class Own(Llama):
    """A family whose forward takes its precision from elsewhere: it hands on three dimensions always."""

    def forward(self, tokens, positions, segments=None, cache=None):
        with torch.autocast("cpu"):
            return super().forward(tokens, positions, segments, cache).float()


def small(kind):
    model = kind(LlamaConfig(**SIZES), VOCAB)
    model.init_weights(seed=3)
    return model.eval()


@compiler
def test_what_cannot_be_compiled_says_so():
    with pytest.raises(BackendError, match=r"inference\.compile=true is for the Llama family, not for GPT2"):
        packed(model_of("gpt2"), "bf16", compiled=True)
    with pytest.raises(BackendError, match=r"inference\.compile=true is not for models with experts"):
        packed(model_of("mixtral"), "bf16", compiled=True)
    with pytest.raises(BackendError, match="Own does not run single tokens block by block"):
        packed(small(Own), "fp32", compiled=True)


@compiler
def test_blocks_that_add_nothing_are_compiled_and_unsound_ones_are_named():
    """As blocks that are put between trained ones begin (Wu et al. 2024, https://arxiv.org/abs/2401.02415)."""
    model = small(Llama)
    with torch.no_grad():
        for layer in (model.blocks[1].attn.out, model.blocks[1].ffn.down):
            layer.weight.zero_()
    assert packed(model, "fp32", compiled=True).token is not None
    with torch.no_grad():
        model.blocks[1].ffn.up.weight.fill_(torch.nan)
    with pytest.raises(BackendError, match="block 1 gives values that are not finite: its weights are not sound"):
        packed(model, "fp32", compiled=True)


@pytest.mark.parametrize("named", ["no-such-compiler", "g++ '", " "])
def test_without_a_compiler(monkeypatch, named):
    monkeypatch.setenv("CXX", named)
    with pytest.raises(ConfigError, match=r"inference\.compile=true needs a C\+\+ compiler, and there is no "):
        packed(model_of(), "fp32", compiled=True)


def test_a_family_may_call_its_blocks_as_it_likes():
    """With a cache, and without angles or a mask."""
    model = model_of()
    model.blocks[0].forward = lambda x, layer, cache: x + layer
    x = torch.zeros(1, 2, 4)
    assert torch.equal(model.block(0, x, cache=model.new_cache(1, 4)), x)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({}, "true is of a copy: set inference.weights=fp32, bf16, int8 or int4"),
        ({"weights": "bf16", "cache": "int8"}, "true is for keys in a slab, as they are: inference.cache=int8 and "),
        ({"weights": "bf16", "memory": "paged"}, "inference.memory=paged must be same, and auto or slab"),
    ],
)
def test_what_does_not_go_together(settings, why):
    with pytest.raises(ConfigError, match=re.escape(why)):
        NativeConfig(compile=True, **settings)
