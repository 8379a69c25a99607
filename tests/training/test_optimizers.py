"""What every registered optimizer must do: leave a bad step no trace, save and restore every bit, obey groups."""

import copy

import pytest
import torch
from safetensors.torch import load, save
from torch.utils._python_dispatch import TorchDispatchMode

from trivium.build import build_optimizer
from trivium.compose import Component
from trivium.errors import CheckpointError, ConfigError
from trivium.models.config import LlamaConfig
from trivium.models.llama import Llama
from trivium.plugin import discover
from trivium.registry import extra
from trivium.training.config import AdamWConfig, GroupConfig
from trivium.training.groups import parameter_groups
from trivium.training.optim import guarded_step, load_optimizer, optimizer_tensors, set_rates

discover()
NAMES = list(extra("optimizers"))
HERE = [n for n in NAMES if not n.startswith("paged") or torch.cuda.is_available()]
"""All but those that need a CUDA device, where there is none; that they say so is a test of their own below."""
GROUPS = [
    GroupConfig("blocks.0.ffn.down*", freeze=True),
    GroupConfig("blocks.0.*", lr=0.5),
    GroupConfig("norm*", weight_decay=0.3),
]
GOOD, BAD = torch.tensor(0.0), torch.tensor(1.0)
EVERY = pytest.mark.parametrize("name", HERE)


def small_llama(seed=0, dtype=torch.float32, tied=True):
    """Embeddings of 96 x 64, which is more than the 4,096 elements below which moments stay in 32 bits."""
    config = LlamaConfig(dim=64, layers=2, heads=2, kv_heads=1, ffn_dim=48, context=16, tied=tied)
    model = Llama(config, 96)
    model.init_weights(seed)
    return model.to(dtype)


def optimizer_of(name, model, **settings):
    return build_optimizer(Component(name, extra("optimizers").config(name)(**settings)), model)


def step(optimizer, model, number, bad=GOOD, value=None):
    """One step on gradients that depend on its number alone."""
    generator = torch.Generator().manual_seed(number)
    for parameter in model.parameters():
        if parameter.requires_grad:
            drawn = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            parameter.grad = drawn if value is None else torch.full_like(parameter, value)
    set_rates(optimizer, 1 / (1 + number))
    guarded_step(optimizer, bad)
    optimizer.zero_grad(set_to_none=True)


def bits(tensors):
    """Bytes by name: NaN equals NaN, and 0.0 does not equal -0.0."""
    return {name: (t.dtype, t.contiguous().view(-1).view(torch.uint8).numpy().tobytes()) for name, t in tensors.items()}


def everything(optimizer, model):
    """Every bit of the weights, of the optimizer's state and of what it gives to others."""
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    given = dict(zip(map(str, range(99)), getattr(optimizer, "weights", dict)().values(), strict=False))
    return bits(weights), bits(optimizer_tensors(optimizer)), bits(given)


def test_the_registry_is_not_empty():
    assert len(NAMES) >= 8 and set(NAMES) - set(HERE) <= {"paged_adamw8bit"}


# ---- a bad step


@EVERY
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_bad_step_changes_no_bit(name, value):
    """Negative zeros too, in weights and state: adding a zero to one would make it positive."""
    model = small_llama()
    optimizer = optimizer_of(name, model)
    for number in range(2):
        step(optimizer, model, number)
    for parameter in model.parameters():
        for tensor in (parameter.data, *optimizer.state[parameter].values()):
            if isinstance(tensor, torch.Tensor) and tensor.shape == parameter.shape and tensor.dtype == torch.float32:
                tensor.view(-1)[0] = -0.0
    before = everything(optimizer, model)
    step(optimizer, model, 2, BAD, value)
    assert everything(optimizer, model) == before
    step(optimizer, model, 2)
    assert everything(optimizer, model) != before, "a good step must move them, or nothing was tested"


@EVERY
def test_bad_steps_leave_no_trace_later(name):
    """The very first step is bad, and a later one; what follows is bit for bit as if they had not been."""
    ends = []
    for bad_before in ((), (0, 2)):
        model = small_llama()
        optimizer = optimizer_of(name, model)
        for number in range(4):
            if number in bad_before:
                step(optimizer, model, number, BAD, float("nan"))
            step(optimizer, model, number)
        ends.append(everything(optimizer, model))
    assert ends[0] == ends[1]


class NoReading(TorchDispatchMode):
    """Refuses `.item()`, `bool()` and their like: on a GPU the host would wait for the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "the host reads a tensor"
        return func(*args, **(kwargs or {}))


def test_flag_is_not_read_by_the_host():
    """Of all but Adafactor and bitsandbytes', which wait for the device many times a step by themselves."""
    without = set()
    for name in HERE:
        model = small_llama()
        optimizer = optimizer_of(name, model)
        step(optimizer, model, 0)
        try:
            with NoReading():
                step(optimizer, model, 1)
                step(optimizer, model, 2, BAD, float("nan"))
            without.add(name)
        except AssertionError as error:
            assert "the host reads" in str(error)
    assert without == set(HERE) - {"adafactor", "adamw8bit", "paged_adamw8bit"}


# ---- save and restore


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16_true"])
@pytest.mark.parametrize("groups", [[], GROUPS], ids=["plain", "groups"])
def test_restored_goes_on_bit_for_bit(name, dtype, groups):
    """3 steps, through the bytes of a file into a new model and optimizer, 3 more: as 6 steps unbroken."""
    model = small_llama(dtype=dtype)
    unbroken = optimizer_of(name, model, groups=groups)
    for number in range(3):
        step(unbroken, model, number)
    weights, state = copy.deepcopy(model.state_dict()), save(optimizer_tensors(unbroken))
    for number in range(3, 6):
        step(unbroken, model, number)

    other = small_llama(seed=1, dtype=dtype)
    other.load_state_dict(weights)
    restored = optimizer_of(name, other, groups=groups)
    load_optimizer(restored, load(state), "a test")
    assert save(optimizer_tensors(restored)) == state
    for number in range(3, 6):
        step(restored, other, number)
    assert everything(restored, other) == everything(unbroken, model)


@EVERY
def test_restored_over_a_state_of_later_steps(name):
    """As when a run rolls back: nothing of the later steps is left."""
    model = small_llama()
    optimizer, ends = optimizer_of(name, model), []
    step(optimizer, model, 0)
    weights, state = copy.deepcopy(model.state_dict()), save(optimizer_tensors(optimizer))
    for _ in range(2):
        for number in range(1, 4):
            step(optimizer, model, number)
        ends.append(everything(optimizer, model))
        model.load_state_dict(weights)
        load_optimizer(optimizer, load(state), "a test")
    assert ends[0] == ends[1]


@EVERY
def test_saved_before_any_step_is_restored(name):
    """All steps so far were bad: there is no state, and that is known, not missing."""
    model = small_llama()
    optimizer = optimizer_of(name, model)
    state = load(save(optimizer_tensors(optimizer)))
    assert {key.rpartition(".")[0] for key in state} == {n for n, _ in model.named_parameters()}
    load_optimizer(optimizer, state, "a test")
    step(optimizer, model, 0)
    other = small_llama()
    fresh = optimizer_of(name, other)
    step(fresh, other, 0)
    assert everything(optimizer, model) == everything(fresh, other)


def test_state_is_named_by_parameter_however_it_is_grouped():
    """With one grouping saved, with another restored: each parameter has its own moments back."""
    model = small_llama()
    optimizer = optimizer_of("adamw", model)
    for number in range(3):
        step(optimizer, model, number)
    regrouped = optimizer_of("adamw", model, groups=GROUPS[1:])
    assert [g["param_names"] for g in regrouped.param_groups] != [g["param_names"] for g in optimizer.param_groups]
    load_optimizer(regrouped, optimizer_tensors(optimizer), "a test")
    for parameter in model.parameters():
        assert torch.equal(regrouped.state[parameter]["exp_avg"], optimizer.state[parameter]["exp_avg"])


def test_state_of_other_parameters_is_refused():
    model = small_llama()
    optimizer = optimizer_of("lion", model)
    step(optimizer, model, 0)
    frozen = optimizer_of("lion", small_llama(), groups=GROUPS)
    with pytest.raises(CheckpointError, match="of 20 parameters, 19 are trained; .* has is blocks.0.ffn.down.weight"):
        load_optimizer(frozen, optimizer_tensors(optimizer), "runs/x")


# ---- groups


@EVERY
def test_matrices_decay_and_nothing_else(name):
    """With gradients of zero, a rate of 0.01 and a decay of 0.5 only matrices move: towards zero, by 0.5 %."""
    model = small_llama()
    before = copy.deepcopy(model)
    optimizer = optimizer_of(name, model, lr=0.01, weight_decay=0.5)
    step(optimizer, model, 0, value=0.0)
    for (key, now), then in zip(model.named_parameters(), before.parameters(), strict=True):
        if then.dim() == 1:
            assert torch.equal(now, then), key
        elif name == "schedule_free":  # the first average is z itself
            torch.testing.assert_close(optimizer.weights()[now], then * 0.995)
        else:
            torch.testing.assert_close(now, then * 0.995, msg=key)


@EVERY
def test_pattern_sets_decay_and_rate_and_freezes(name):
    """As above: norm.weight decays by 0.3 at 0.01; blocks.0 at half the rate; what is frozen has no state at all."""
    model = small_llama()
    before = copy.deepcopy(model)
    optimizer = optimizer_of(name, model, lr=0.01, weight_decay=0.5, groups=GROUPS)
    step(optimizer, model, 0, value=0.0)
    now, then = (dict(m.named_parameters()) for m in (model, before))
    frozen = now["blocks.0.ffn.down.weight"]
    assert not frozen.requires_grad and frozen not in optimizer.state
    assert torch.equal(frozen, then["blocks.0.ffn.down.weight"])
    assert not any(key.startswith("blocks.0.ffn.down") for key in optimizer_tensors(optimizer))
    assert torch.equal(now["blocks.0.attn_norm.weight"], then["blocks.0.attn_norm.weight"])
    for key, factor in (("norm.weight", 0.997), ("blocks.0.attn.q.weight", 0.9975), ("embed.weight", 0.995)):
        torch.testing.assert_close(now[key], then[key] * factor, msg=key)


def test_rate_that_is_shown_is_that_of_the_rest():
    """Whatever pattern comes first; groups keep their factor through the schedule."""
    model = small_llama()
    optimizer = optimizer_of("muon", model, lr=0.02, groups=[GroupConfig("embed*", lr=0.1)])
    assert set_rates(optimizer, 0.5) == 0.01
    assert set_rates(optimizer, 0.25) == 0.005
    rates = {n: g["lr"] for g in optimizer.param_groups for n in g["param_names"]}
    assert rates["embed.weight"] == pytest.approx(0.0005) and rates["blocks.0.attn.q.weight"] == 0.005


def test_first_match_counts_and_names_match_in_full():
    groups = [GroupConfig("blocks.*.attn.*", lr=2.0), GroupConfig("*.weight", lr=3.0), GroupConfig("embed*", lr=4.0)]
    found = parameter_groups(AdamWConfig(lr=1.0, groups=groups), small_llama())
    rates = {name: group["lr"] for group in found for name, _ in group["params"]}
    assert (rates["blocks.1.attn.k.weight"], rates["blocks.1.attn_norm.weight"], rates["embed.weight"]) == (2, 3, 3)
    with pytest.raises(ConfigError, match="'embed' matches no parameter"):
        parameter_groups(AdamWConfig(groups=[GroupConfig("embed")]), small_llama())


@pytest.mark.parametrize(
    ("groups", "sentence"),
    [
        ([GroupConfig("embd*")], "'embd*' matches no parameter; there are embed.weight, blocks.0.attn_norm.weight, "),
        ([GroupConfig("head*")], "'head*' matches head.weight only, which is embed.weight itself"),
        ([GroupConfig("*", freeze=True)], "nothing is left to train, every parameter is frozen"),
    ],
)
def test_pattern_that_cannot_be_is_told(groups, sentence):
    with pytest.raises(ConfigError) as told:
        parameter_groups(AdamWConfig(groups=groups), small_llama())
    assert sentence in str(told.value) and len(str(told.value)) < 400


def test_muon_takes_the_matrices_of_blocks_only():
    model = small_llama(tied=False)
    optimizer = optimizer_of("muon", model)
    kinds = {n: g["kind"] for g in optimizer.param_groups for n in g["param_names"]}
    assert {n for n, kind in kinds.items() if kind == "muon"} == {
        n for n, p in model.named_parameters() if n.startswith("blocks.") and p.dim() == 2
    }
    assert kinds["embed.weight"] == kinds["head.weight"] == kinds["blocks.0.attn_norm.weight"] == "adamw"
    step(optimizer, model, 0)
    assert len(optimizer.state) == len(list(model.parameters())) == len(optimizer.state_dict()["state"])
    assert sorted(optimizer.state[model.blocks[0].attn.q.weight]) == ["momentum_buffer"]
    with pytest.raises(ConfigError, match="optim=muon: no matrix of a block is trained"):
        optimizer_of("muon", small_llama(), groups=[GroupConfig("blocks.*", freeze=True)])


def test_muon_takes_torchs_own_state_dict_too():
    """state_dict of torch, into another one: the two parts find their state and groups again."""
    ends = []
    for through in (False, True):
        model = small_llama()
        optimizer = optimizer_of("muon", model)
        for number in range(2):
            step(optimizer, model, number)
        if through:
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = optimizer_of("muon", model)
            optimizer.load_state_dict(state)
        step(optimizer, model, 2)
        ends.append(everything(optimizer, model))
    assert ends[0] == ends[1]


# ---- what cannot be


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_paged_moments_need_cuda():
    """bitsandbytes itself would warn and go on without pages."""
    with pytest.raises(ConfigError, match="pages the memory of a CUDA device, and there is none here; choose"):
        optimizer_of("paged_adamw8bit", small_llama())


@pytest.mark.parametrize("weights", ["blocks.0.attn.q.weight", "norm.weight"])
def test_reading_the_average_changes_nothing(weights):
    """weights() at every step and twice, against never: the same run, bit for bit."""
    ends = []
    for reads in (0, 2):
        model = small_llama()
        optimizer = optimizer_of("schedule_free", model)
        assert optimizer.weights() == {}
        for number in range(4):
            step(optimizer, model, number)
            for _ in range(reads):
                assert len(optimizer.weights()) == len(list(model.parameters()))
        ends.append(everything(optimizer, model))
        shown = optimizer.weights()[dict(model.named_parameters())[weights]]
        assert not torch.equal(shown, dict(model.named_parameters())[weights])
    assert ends[0] == ends[1]


SIZES = {"adamw": 8, "adamw8bit": 2, "adafactor": 0, "lion": 4, "muon": 4, "schedule_free": 12, "sgd": 4}


@EVERY
def test_state_is_as_large_as_the_docs_say(name):
    """docs/training.md: bytes for each weight of a matrix, here one of 64 x 96; what is small besides stays below 0.6:
    32 bits a block of 256 in 8 bits, twice; a row and a column."""
    model = torch.nn.Module()
    model.blocks = torch.nn.ModuleList([torch.nn.Linear(64, 96, bias=False)])
    optimizer = optimizer_of(name, model)
    step(optimizer, model, 0)
    held = sum(t.numel() * t.element_size() for t in optimizer_tensors(optimizer).values()) / (64 * 96)
    assert SIZES[name.removeprefix("paged_")] <= held < SIZES[name.removeprefix("paged_")] + 0.6
