"""Where weights come from: a seed, whatever was drawn before, or a file whose every tensor is checked."""

import dataclasses

import pytest
import torch
from safetensors.torch import save_file

from trivium.errors import CheckpointError, ConfigError
from trivium.models.config import LlamaConfig
from trivium.models.llama import Llama
from trivium.models.weights import fill_weights, load_weights, read_tensors, weights_of

TIED = LlamaConfig(dim=16, layers=2, heads=2, kv_heads=1, ffn_dim=24, context=32)
UNTIED = LlamaConfig(dim=16, layers=2, heads=2, kv_heads=1, ffn_dim=24, context=32, tied=False)
VOCAB = 19


def initialised(config=TIED, seed=0):
    model = Llama(config, VOCAB)
    model.init_weights(seed)
    return model


def same(one, other):
    one, other = weights_of(one), weights_of(other)
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied"])
def test_init_weights_from_meta_equal_direct_ones(config):
    """`to_empty` gives the tied head a tensor of its own; `init_weights` must tie it again."""
    with torch.device("meta"):
        model = Llama(config, VOCAB)
    model.to_empty(device="cpu")
    model.init_weights(0)
    assert same(model, initialised(config))
    assert (model.head.weight is model.embed.weight) == config.tied
    tokens = torch.arange(10)[None]
    assert torch.equal(model.head(model(tokens, tokens)), (direct := initialised(config)).head(direct(tokens, tokens)))


def test_init_weights_depend_on_the_seed_alone():
    one = initialised(seed=7)
    torch.manual_seed(123)
    again = initialised(seed=7)
    other = initialised(seed=8)
    assert same(one, again)
    assert not same(one, other)
    again.init_weights(8)  # over trained weights as well as over fresh ones
    assert same(again, other)


def test_init_weights_draw_no_global_randomness():
    model = Llama(TIED, VOCAB)
    before = torch.get_rng_state()
    model.init_weights(7)
    assert torch.equal(before, torch.get_rng_state())


def test_init_weights_have_the_configured_spread():
    """std 0.02, and 0.02 / sqrt(2 * 8) = 0.005 on the two branches that end in the residual; norms are ones."""
    model = Llama(LlamaConfig(dim=64, layers=8, heads=4, kv_heads=4, ffn_dim=128, context=8), 200)
    model.init_weights(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert torch.equal(parameter, torch.ones(64))
        else:
            # at least 4096 draws: the standard error of a standard deviation is 1.1 %
            std = 0.005 if "attn.out" in name or "ffn.down" in name else 0.02
            assert parameter.std().item() == pytest.approx(std, rel=0.06), name


def test_flops_per_token_by_hand():
    """C = 8, H = 2, K = 1, D = 4, ffn 12, L = 2, V = 10. A block: q 64, k 32, v 32, out 64, ffn 3 * 96 = 288: 480.
    Two blocks and the head's 80: 1040 parameters in matrix products, 6 * 1040 = 6240; the embedding is a look-up.
    Attention over 16: 12 * L * C * 16 / 2 = 1536. Together 7776, tied or not."""
    for tied in (True, False):
        config = LlamaConfig(dim=8, layers=2, heads=2, kv_heads=1, ffn_dim=12, context=32, tied=tied)
        assert Llama(config, 10).flops_per_token(16) == 7776


def test_num_parameters_count_a_tied_head_once():
    """As above, 2 * 480 in blocks, 5 norms of 8, and 80 for the embedding: 1080; 80 more untied."""
    sizes = [
        Llama(LlamaConfig(dim=8, layers=2, heads=2, kv_heads=1, ffn_dim=12, tied=tied), 10).num_parameters
        for tied in (True, False)
    ]
    assert sizes == [1080, 1160]


# ---- load_weights


@pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied"])
def test_weights_survive_a_file(tmp_path, config):
    model, other = initialised(config, 1), initialised(config, 2)
    save_file(weights_of(model), tmp_path / "w.safetensors")
    load_weights(other, read_tensors(tmp_path / "w.safetensors"), "w")
    assert same(model, other)
    assert (other.head.weight is other.embed.weight) == config.tied


def broken(change):
    tensors = {name: t.clone() for name, t in weights_of(initialised(seed=1)).items()}
    change(tensors)
    return tensors


NAME = "blocks.1.attn.k.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(NAME), f"lacks {NAME}"),
        (lambda t: t.update({"extra.weight": torch.zeros(1)}), "has unknown extra.weight"),
        (lambda t: t.update({"head.weight": t["embed.weight"]}), "has unknown head.weight"),  # an untied model's file
        (lambda t: t.update({NAME: torch.zeros(16, 8)}), rf"{NAME} is \(16, 8\).*\(8, 16\)"),
        (lambda t: t[NAME].view(-1)[3].fill_(torch.nan), f"{NAME} holds values that are not finite"),
        (lambda t: t["norm.weight"][0].fill_(-torch.inf), "norm.weight holds values that are not finite"),
    ],
    ids=["missing", "unknown", "untied", "shape", "nan", "inf"],
)
def test_load_weights_refuses_by_name_and_changes_nothing(change, message):
    model = initialised()
    with pytest.raises(CheckpointError, match=f"old.safetensors.*{message}"):
        load_weights(model, broken(change), "old.safetensors")
    assert same(model, initialised())


def test_read_tensors_names_a_damaged_file(tmp_path):
    (tmp_path / "w.safetensors").write_bytes(b"not a safetensors file")
    with pytest.raises(CheckpointError, match="w.safetensors cannot be read"):
        read_tensors(tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match="none.safetensors cannot be read"):
        read_tensors(tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dim": 30, "heads": 4}, "model.dim=30"),
        ({"heads": 4, "kv_heads": 3}, "model.kv_heads=3"),
        ({"layers": 0}, "model.layers=0"),
    ],
)
def test_llama_config_refuses_what_cannot_be_built(settings, message):
    with pytest.raises(ConfigError, match=message):
        LlamaConfig(**settings)


# ---- models that are built without memory


class Own(Llama):
    """As a plugin may write one: a buffer that the constructor makes, and a weight that has two names of its own."""

    def __init__(self, config, vocab_size):
        super().__init__(config, vocab_size)
        self.register_buffer("table", torch.arange(3.0), persistent=False)


def test_a_parameter_of_two_names_stays_one():
    """Whoever ties them, and by whatever setting."""
    with torch.device("meta"):
        model = Llama(UNTIED, VOCAB)
        model.head.weight = model.embed.weight
    fill_weights(model, weights_of(initialised(TIED, 1)), "w")
    assert model.head.weight is model.embed.weight and not model.embed.weight.is_meta
    assert same(model, initialised(TIED, 1))


def test_a_buffer_is_what_the_constructor_makes(monkeypatch):
    from trivium.build import model_of
    from trivium.plugin import discover
    from trivium.registry import MODELS

    discover()
    monkeypatch.setattr(MODELS, "load", lambda name: Own)
    record = {"name": "llama", "config": dataclasses.asdict(TIED), "vocab_size": VOCAB}
    model = model_of(record, weights_of(initialised(TIED, 1)))
    assert model.table.tolist() == [0.0, 1.0, 2.0]
    assert same(model, initialised(TIED, 1))


@pytest.mark.parametrize("name", ["gemma2", "gpt2", "mixtral", "qwen2", "qwen3_moe"])
def test_other_families_start_as_they_should(name):
    """Norms multiply by one (Gemma keeps the difference), biases are zero, branches start at 0.02 / sqrt(16)."""
    from trivium.plugin import discover
    from trivium.registry import MODELS

    discover()
    sizes = {"dim": 64, "layers": 8, "heads": 4}
    model = MODELS.load(name)(MODELS.config(name)(**sizes), 200)
    model.init_weights(0)
    for key, parameter in model.named_parameters():
        if parameter.dim() == 1:
            one = 0.0 if name == "gemma2" or key.endswith("bias") else 1.0
            assert torch.equal(parameter, torch.full_like(parameter, one)), key
        else:
            small = key.endswith(("out.weight", "down.weight"))
            assert parameter.std().item() == pytest.approx(0.005 if small else 0.02, rel=0.06), key
