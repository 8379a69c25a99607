"""LoRA, rsLoRA and DoRA by hand on two-by-two layers, and what must hold of every adapter on a whole model."""

import copy
import math

import pytest
import torch
from torch import nn

from trivium.errors import CheckpointError, ConfigError
from trivium.models import adapters
from trivium.models.adapters import attach, dequantise, detach, merge, parts, quantise, unmerge, use, without
from trivium.models.config import DoraConfig, LlamaConfig, LoraConfig, QLoraConfig, RsLoraConfig
from trivium.models.llama import Llama
from trivium.models.quantised import quantiser

SIZES = {"dim": 16, "layers": 2, "heads": 4, "kv_heads": 2, "ffn_dim": 24, "context": 32}
KINDS = {"lora": LoraConfig, "rslora": RsLoraConfig, "dora": DoraConfig, "qlora": QLoraConfig}


def small(tied=True, **more):
    model = Llama(LlamaConfig(**SIZES, tied=tied), 61)
    model.init_weights(0)
    return model


def said(model, tokens=None):
    tokens = torch.arange(20).reshape(2, 10) if tokens is None else tokens
    return model.head(model(tokens, torch.arange(tokens.shape[1]).expand(len(tokens), -1)))


def stirred(model, seed=1):
    """The adapter in use with random values, as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parts(model).values():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def layer_of_two(config):
    """W = [[1, 2], [3, 4]], A = [[1, -1]], B = [[2], [1]]: B A = [[2, -2], [1, -1]]."""
    layer = nn.Linear(2, 2)
    layer.weight.data = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    layer.bias.data = torch.tensor([10.0, 20.0])
    lora = adapters.Lora(layer, config, torch.Generator().manual_seed(0))
    lora.a.weight.data, lora.b.weight.data = torch.tensor([[1.0, -1.0]]), torch.tensor([[2.0], [1.0]])
    x = torch.tensor([[3.0, 1.0]])
    return lora(x, layer(x), layer).tolist()[0], lora


def test_lora_by_hand():
    """W x + b = (15, 33); A x = 2, B A x = (4, 2); alpha 6 at rank 1 scales by 6."""
    found, _ = layer_of_two(LoraConfig(rank=1, alpha=6.0))
    assert found == [15 + 24, 33 + 12]


def test_scales_by_hand():
    """alpha / rank, and alpha / sqrt(rank)."""
    assert LoraConfig(rank=16, alpha=32.0).scaling == 2
    assert RsLoraConfig(rank=16, alpha=32.0).scaling == 8


def test_dora_by_hand():
    """W + B A = [[3, 0], [4, 3]] with row norms 3 and 5; the magnitude stays W's own norms, sqrt 5 and 5."""
    found, lora = layer_of_two(DoraConfig(rank=1, alpha=1.0))
    assert lora.magnitude.tolist() == pytest.approx([math.sqrt(5), 5.0])
    assert found == pytest.approx([10 + math.sqrt(5) / 3 * 9, 20 + 5 / 5 * 15], rel=1e-6)


def test_update_is_in_fp32_under_autocast():
    """The norms of DoRA in training are those that a merge takes."""
    _, lora = layer_of_two(DoraConfig(rank=1, alpha=1.0))
    with torch.autocast("cpu", torch.bfloat16):
        assert lora.update.dtype == torch.float32


def test_gradient_of_dora_takes_the_norm_as_fixed():
    """With y = m / c (W + B A) x and c fixed: dy/dB = m / c A x; of the first row that is sqrt 5 / 3 * 2."""
    layer = nn.Linear(2, 2, bias=False)
    layer.weight.data = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    lora = adapters.Lora(layer, DoraConfig(rank=1, alpha=1.0), None)
    lora.a.weight.data, lora.b.weight.data = torch.tensor([[1.0, -1.0]]), torch.tensor([[2.0], [1.0]])
    x = torch.tensor([[3.0, 1.0]])
    lora(x, layer(x), layer).sum().backward()
    torch.testing.assert_close(lora.b.weight.grad, torch.tensor([[math.sqrt(5) / 3 * 2], [2.0]]))
    torch.testing.assert_close(lora.magnitude.grad, torch.tensor([9 / 3, 15 / 5]))


@pytest.mark.parametrize("kind", KINDS)
def test_at_first_nothing_changes(kind):
    """B is zero: the very same logits, at any rank, and of a quantised base those of that base."""
    model = small()
    if kind == "qlora":
        quantise(model, quantiser("nf4", True))
    before = said(model)
    attach(KINDS[kind](rank=4), model)
    assert (said(model) - before).abs().max() <= (2e-6 if kind == "dora" else 0)  # m / c is 1 to rounding


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_adapter_is_trained(kind):
    """Every layer's A, B (and magnitude) gets a gradient once B is not zero, and nothing else does."""
    model = small()
    if kind == "qlora":
        quantise(model, quantiser("int8", True))
    attach(KINDS[kind](rank=4), model)
    stirred(model)
    said(model).logsumexp(-1).sum().backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == set(parts(model)) and all(".lora.default." in name for name in trained)
    assert len(trained) == 2 * 7 * (3 if kind == "dora" else 2)
    assert all(model.get_parameter(name).grad.abs().max() > 1e-6 for name in trained)
    assert all(p.grad is None for name, p in model.named_parameters() if name not in trained)


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
def test_merged_says_the_same_and_comes_apart_again(kind):
    """To 1e-5 in fp32, both ways; the weights themselves come back to 1e-5 too."""
    model = stirred(adapted(kind))
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    wanted = said(model)
    merge(model)
    assert not model.adapters.heard
    assert (said(model) - wanted).abs().max() <= 1e-5
    assert (model.blocks[0].attn.q.weight - weights["blocks.0.attn.q.weight"]).abs().max() > 1e-2
    unmerge(model)
    assert (said(model) - wanted).abs().max() <= 1e-5
    assert max((p - weights[n]).abs().max() for n, p in model.named_parameters()) <= 1e-5
    merge(model)
    detach(model)
    assert (said(model) - wanted).abs().max() <= 1e-5
    assert list(parts(model)) == list(small().state_dict())[:-1]  # an ordinary model again


def adapted(kind, **more):
    model = small(**more)
    attach(KINDS[kind](rank=4), model)
    return model


def test_several_adapters_by_name():
    """Each by itself, both at once (their sum), and neither: the model itself, bit for bit."""
    model = small()
    alone = said(model)
    attach(LoraConfig(rank=2), model, seed=1, name="law")
    stirred(model, seed=2)
    law = said(model)
    attach(LoraConfig(rank=4, targets=["*.attn.*"]), model, seed=3, name="medicine")
    stirred(model, seed=4)
    medicine = said(model)
    use(model, "law")
    assert said(model).equal(law)
    use(model, "medicine")
    assert said(model).equal(medicine)
    use(model)
    assert said(model).equal(alone)
    use(model, "law", "medicine")
    both = said(model)
    merge(model)
    assert (said(model) - both).abs().max() <= 1e-5
    assert (both - law).abs().max() > 1e-2
    with pytest.raises(ConfigError, match="merged into the weights"):
        use(model, "law")
    unmerge(model)
    with pytest.raises(ConfigError, match="no adapter is called laww"):
        use(model, "laww")
    with pytest.raises(ConfigError, match="called law already"):
        attach(LoraConfig(), model, name="law")


@pytest.mark.parametrize("tied", [True, False])
def test_modules_trained_whole_are_left_with_the_adapter(tied):
    """The embedding (and the head that shares it) is trained beside; without the adapter it is what it was."""
    model = small(tied)
    alone = said(model)
    attach(LoraConfig(rank=2, also=["embed"]), model)
    assert "embed.weight" in parts(model) and "head.weight" not in parts(model)
    stirred(model)
    trained, embedding = said(model), model.embed.weight.detach().clone()
    assert (trained - alone).abs().max() > 1e-2
    with without(model):
        assert said(model).equal(alone)
    assert said(model).equal(trained) and model.embed.weight.equal(embedding)
    assert (model.head.weight is model.embed.weight) == tied


def test_casts_of_autocast_do_not_outlive_a_swap():
    """Under autocast a cast of the trained embedding is kept; the reference must not be asked with it."""
    model = small(tied=False)
    attach(LoraConfig(rank=2, also=["head"]), model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), without(model):
        alone = said(model)
    stirred(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        trained = said(model)
        with without(model):
            assert said(model).equal(alone)
        assert said(model).equal(trained)


@pytest.mark.parametrize("base", ["nf4", "fp4", "int8"])
def test_merging_takes_a_dequantised_base(base):
    """A merge into few bits is refused; into restored weights it says what the quantised base and adapter said."""
    model = small()
    quantise(model, quantiser(base, True))
    attach(QLoraConfig(rank=4, quant_type=base), model)
    stirred(model)
    wanted = said(model)
    with pytest.raises(CheckpointError, match=r"blocks\.0\.attn\.q is quantised, and an adapter is merged into whole"):
        merge(model)
    dequantise(model)
    assert (said(model) - wanted).abs().max() <= 1e-5
    merge(model)
    detach(model)
    assert (said(model) - wanted).abs().max() <= 1e-5
    assert list(parts(model)) == list(small().state_dict())[:-1]


def test_dropout_is_of_what_a_reads_and_of_training_only():
    """In eval mode none; in training the base's own part of the output is never dropped."""
    model = small()
    attach(LoraConfig(rank=4, dropout=0.5), model)
    before = said(model.train())
    assert before.equal(said(small()))  # B is still zero
    stirred(model)
    torch.manual_seed(0)
    first, second = said(model), said(model)
    assert (first - second).abs().max() > 1e-2
    model.eval()
    assert said(model).equal(said(model))


@pytest.mark.parametrize(
    ("made", "settings", "told"),
    [
        (small, {"targets": ["*.attn.query"]}, r"'\*\.attn\.query' matches no linear layer; there are blocks\.0\.attn"),
        (small, {"targets": ["*"]}, "no adapter can stand on the head; adapter.also="),
        (small, {"also": ["lm_head"]}, "adapter.also: 'lm_head' matches no module"),
        (lambda: small(tied=False), {"targets": ["head"]}, "no adapter can stand on the head"),
    ],
)
def test_what_cannot_be_is_refused(made, settings, told):
    with pytest.raises(ConfigError, match=told):
        attach(LoraConfig(**settings), made())


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"rank": 0}, "adapter.rank=0 must be greater than 0"),
        ({"alpha": -1.0}, "adapter.alpha=-1.0 must be greater than 0"),
        ({"alpha": float("nan")}, "adapter.alpha=nan must be greater than 0, and a number"),
        ({"alpha": float("inf")}, "adapter.alpha=inf must be greater than 0, and a number"),
        ({"dropout": 1.0}, "adapter.dropout=1.0 must be at least 0 and less than 1"),
        ({"targets": []}, r"adapter.targets=\[\] leaves"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, told):
    with pytest.raises(ConfigError, match=told):
        LoraConfig(**settings)


def test_other_kinds_of_bits_are_refused():
    with pytest.raises(ConfigError, match="adapter.quant_type='int4' is not one of nf4, fp4, int8"):
        QLoraConfig(quant_type="int4")


def test_a_copy_of_a_model_has_adapters_of_its_own():
    model = stirred(adapted("lora"))
    wanted = said(model)
    other = copy.deepcopy(model)
    use(other)
    assert said(model).equal(wanted) and not said(other).equal(wanted)


def test_a_draw_follows_from_its_seed():
    """A ~ U(-1/sqrt(in), 1/sqrt(in)), the same for the same seed whatever was drawn before."""
    first, second = small(), small()
    attach(LoraConfig(rank=8), first, seed=5)
    torch.manual_seed(1)
    attach(LoraConfig(rank=8), second, seed=5)
    a = first.blocks[0].attn.q.lora["default"].a.weight
    assert a.equal(second.blocks[0].attn.q.lora["default"].a.weight)
    assert 0.2 < a.abs().max() <= 0.25 and abs(a.mean()) < 0.05
