"""Weights of 16, 8 and 4 bits: what they are rounded to, that both ways of multiplying them agree, what it costs."""

import json

import pytest
import torch

from trivium.errors import BackendError
from trivium.inference.config import NativeConfig
from trivium.inference.native.engine import NativeBackend, collect
from trivium.models import adapters
from trivium.models.config import (
    Gemma2Config,
    GPT2Config,
    HFConfig,
    LlamaConfig,
    LoraConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen3Config,
)
from trivium.models.gemma2 import Gemma2
from trivium.models.gpt2 import GPT2
from trivium.models.hf import HuggingFace
from trivium.models.llama import Llama
from trivium.models.mixtral import Mixtral
from trivium.models.packed import FEW, GROUP, Packed, _unhalved, packed, rounded
from trivium.models.qwen2 import Qwen2
from trivium.models.qwen3 import Qwen3
from trivium.types import Request, SamplingParams

SIZES = {"dim": 64, "layers": 2, "heads": 4, "kv_heads": 2, "ffn_dim": 128, "context": 64, "init_std": 0.2}
VOCAB = 96
FAMILIES = {
    "llama": (Llama, LlamaConfig(**SIZES)),
    "qwen2": (Qwen2, Qwen2Config(**SIZES)),
    "qwen3": (Qwen3, Qwen3Config(**SIZES)),
    "gemma2": (Gemma2, Gemma2Config(**SIZES)),
    "mixtral": (Mixtral, MixtralConfig(**SIZES, experts=4, active=2)),
    "gpt2": (GPT2, GPT2Config(dim=64, layers=2, heads=4, context=64, init_std=0.2)),
}


def model_of(name="llama"):
    kind, config = FAMILIES[name]
    model = kind(config, VOCAB)
    model.init_weights(seed=3)
    return model.eval()


@torch.no_grad()
def logits_of(model, tokens):
    positions = torch.arange(tokens.shape[1]).expand(tokens.shape)
    return model.head(model(tokens, positions)).float()


def test_rounded_by_hand():
    """4 bits: from -1.5 to 1.5 in steps of 3 / 15 = 0.2, in bf16 0.2002; code 0 is at -1.5 + 8 * 0.2002 = 0.1016, and a
    code is round((w - 0.1016) / 0.2002). 8 bits: the largest is 1.5, steps are 1.5 / 127.5 = 0.01176."""
    weight = torch.zeros(1, GROUP["int8"])
    weight[0, :4] = torch.tensor([1.5, -1.5, 0.31, 0.09])
    codes, scales, zeros = rounded(weight[:, : GROUP["int4"]], "int4")
    assert codes[0, :5].tolist() == [7, -8, 1, 0, -1]
    assert scales.item() == pytest.approx(0.2, rel=2**-8)
    assert zeros.item() == pytest.approx(0.1016, rel=2**-8)
    codes, scales, zeros = rounded(weight, "int8")
    assert codes[0, :5].tolist() == [127, -127, 26, 8, 0]
    assert zeros is None
    for kind in GROUP:
        codes, scales, _ = rounded(torch.zeros(1, 64), kind)
        assert scales.abs().sum() == 0


def test_four_bits_of_gguf_are_kept():
    """Weights that lie on the grid of Q4_1, a step and a smallest weight for each 32, come back to bf16's rounding."""
    generator = torch.Generator().manual_seed(5)
    step = torch.rand(64, 6, 1, generator=generator).half().float() + 0.1
    least = torch.randn(64, 6, 1, generator=generator).half().float()
    grid = torch.randint(0, 16, (64, 6, 32), generator=generator)
    grid[..., 0], grid[..., 1] = 0, 15
    weight = (grid * step + least).view(64, 192)
    layer = Packed(weight, None, "int4")
    assert (layer.restored().float() - weight).abs().max().item() < 2**-6 * weight.abs().max().item()
    assert torch.equal(_unhalved(layer.codes).view(64, 6, 32) + 8, grid.to(torch.int8))


@pytest.mark.parametrize(("kind", "most"), [("int8", 127.5), ("int4", 15)])
def test_every_weight_is_within_half_a_scale(kind, most):
    torch.manual_seed(0)
    weight = torch.randn(64, 192).to(torch.bfloat16)
    layer = Packed(weight, None, kind)
    groups = weight.float().view(64, -1, GROUP[kind])
    size = groups.abs().amax(-1) if kind == "int8" else groups.amax(-1) - groups.amin(-1)
    scales = (size / most).repeat_interleave(GROUP[kind], 1)
    zeros = torch.zeros(64, 3) if layer.zeros is None else layer.zeros.float()  # in bf16, too
    rounding = 2**-8 * (weight.float().abs() + zeros.abs().repeat_interleave(192 // zeros.shape[1], 1))
    restored = layer.restored().float()
    assert ((restored - weight.float()).abs() <= 0.52 * scales + rounding).all()


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("bias", [False, True])
def test_few_rows_and_many_rows_multiply_the_same_weights(kind, bias):
    """A kernel for few bits and a product with restored weights, each against fp64, to bf16's rounding."""
    torch.manual_seed(1)
    weight = torch.randn(96, 192).to(torch.bfloat16)
    layer = Packed(weight, torch.randn(96).to(torch.bfloat16) if bias else None, kind)
    x = torch.randn(2 * FEW[kind], 192).to(torch.bfloat16)
    codes, scales, zeros = rounded(weight.float(), kind)
    exact = codes.double().view(96, -1, GROUP[kind]) * scales.double()[..., None]
    exact = (exact if zeros is None else exact + zeros.double()[..., None]).view(96, -1)
    wanted = x.double() @ exact.T + (layer.bias.double() if bias else 0)
    for part, expected in ((x[: FEW[kind]], wanted[: FEW[kind]]), (x, wanted)):
        off = (layer(part).double() - expected).abs().max().item()
        assert off < 2**-7 * expected.abs().max().item()


@pytest.mark.parametrize("name", FAMILIES)
def test_bf16_is_the_model_in_bf16(name):
    model = model_of(name)
    tokens = torch.randint(0, VOCAB, (2, 12), generator=torch.Generator().manual_seed(0))
    wanted, found = logits_of(model, tokens), logits_of(packed(model, "bf16"), tokens)
    plain = logits_of(model_of(name).to(torch.bfloat16), tokens)
    size = wanted.abs().max().item()
    assert (found - wanted).abs().max().item() < max(2 * (plain - wanted).abs().max().item(), 0.02 * size)
    assert next(model.parameters()).dtype == torch.float32  # the model itself is as it was


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("kind", "close"), [("int8", 0.05), ("int4", 0.5)])
def test_few_bits_are_close_to_the_model(name, kind, close):
    """Mean KL of the next token's distribution, in nats; weights of 8 bits cost a hundredth of those of 4."""
    model = model_of(name)
    tokens = torch.randint(0, VOCAB, (4, 12), generator=torch.Generator().manual_seed(0))
    wanted, found = (logits_of(m, tokens).log_softmax(-1) for m in (model, packed(model, kind)))
    assert (wanted.exp() * (wanted - found)).sum(-1).mean().item() < close


@pytest.mark.parametrize("kind", ["bf16", "int8", "int4"])
def test_engine_scores_what_it_decodes(kind):
    """Log-probabilities of drawn tokens are those of `score`, through another kernel, to bf16's rounding."""
    model = model_of()
    backend = NativeBackend(NativeConfig(weights=kind), model)
    prompt = tuple(range(1, 20))
    events = collect(backend, [Request("a", prompt, SamplingParams(max_tokens=10, temperature=1.0))])["a"]
    scored = backend.score([*prompt, *(e.token_id for e in events)])[len(prompt) - 1 :]
    assert [e.logprob for e in events] == pytest.approx(scored, abs=0.15)
    assert not backend.capabilities().shares_weights
    with torch.no_grad():
        model.embed.weight.mul_(2.0)
    again = NativeBackend(NativeConfig(weights=kind), model)
    asked = [Request("a", prompt, SamplingParams(max_tokens=10))]
    assert [e.token_id for e in collect(backend, asked)["a"]] == [e.token_id for e in collect(again, asked)["a"]]


def test_adapters_are_merged_into_the_copy():
    model = model_of()
    adapters.attach(LoraConfig(rank=4), model)
    with torch.no_grad():
        for parameter in adapters.parts(model).values():
            parameter.normal_(0, 0.1)
    tokens = torch.randint(0, VOCAB, (2, 12), generator=torch.Generator().manual_seed(0))
    wanted = logits_of(model, tokens)
    found = logits_of(packed(model, "bf16"), tokens)
    assert (found - wanted).abs().mean() < 0.03 * wanted.std()  # bf16 and nothing else
    with adapters.without(model):
        assert (logits_of(model, tokens) - wanted).abs().mean() > 0.2 * wanted.std()
    assert adapters.has_adapter(model)


def test_widths_that_no_group_fills_are_refused():
    model = Llama(LlamaConfig(dim=36, layers=1, heads=2, kv_heads=2, ffn_dim=40, context=8), 50)
    model.init_weights(seed=0)
    with pytest.raises(BackendError, match="can be held as int4: inputs must be multiples of 32, outputs of 32"):
        packed(model, "int4")
    with pytest.raises(BackendError, match="'int3' are not known; there are fp32, bf16, int8, int4"):
        packed(model, "int3")


@pytest.mark.parametrize("kind", ["bf16", "int8", "int4"])
def test_models_that_do_not_mix_precisions_are_bf16_throughout(kind):
    """transformers' own layers turn queries in fp32 beside values in bf16 if what they get is fp32, and fail."""
    transformers = pytest.importorskip("transformers")
    settings = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2, architectures=["LlamaForCausalLM"],
    ).to_dict()  # fmt: skip
    model = HuggingFace(HFConfig(settings=json.dumps(settings)), VOCAB)
    model.init_weights(seed=1)
    tokens = torch.randint(0, VOCAB, (2, 12), generator=torch.Generator().manual_seed(0))
    wanted, found = (logits_of(m.eval(), tokens).log_softmax(-1) for m in (model, packed(model, kind)))
    assert (wanted.exp() * (wanted - found)).sum(-1).mean().item() < {"bf16": 0.01, "int8": 0.05, "int4": 0.5}[kind]
    backend = NativeBackend(NativeConfig(weights=kind), model)
    events = collect(backend, [Request("a", (1, 2, 3), SamplingParams(max_tokens=5))])["a"]
    assert [e.finish_reason for e in events] == [None] * 4 + ["length"]
