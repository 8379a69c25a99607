"""Experts: routing by hand, every way of computing against a dense one, and the load-balance loss by hand, against
transformers, and however a step is cut. Two processes are in tests/training/test_parallel.py."""

import shutil

import pytest
import torch
from helpers import run_through
from torch.nn.functional import cross_entropy

from trivium.errors import ConfigError, TriviumError
from trivium.models import adapters
from trivium.models.config import LlamaConfig, LoraConfig, MixtralConfig, Qwen3MoeConfig
from trivium.models.experts import Router, SparseFFN, loads, routings
from trivium.models.huggingface import Reader
from trivium.models.llama import Llama
from trivium.models.mixtral import Mixtral
from trivium.models.qwen3_moe import Qwen3Moe
from trivium.objectives.config import NextTokenConfig
from trivium.objectives.next_token import NextToken
from trivium.objectives.protocol import Objective
from trivium.training.balance import balance_sum, real_tokens
from trivium.training.objective_module import ObjectiveModule, StepSettings
from trivium.types import LossOutput, TokenBatch

ROWS, LENGTH, VOCAB = 8, 12, 61
SIZES = {"dim": 16, "layers": 2, "heads": 4, "kv_heads": 2, "ffn_dim": 24, "context": LENGTH, "init_std": 0.3}
BALANCE = 0.05


@pytest.mark.parametrize(("renormalise", "weights"), [(True, [5 / 7, 2 / 7]), (False, [5 / 8, 2 / 8])])
def test_routing_by_hand(renormalise, weights):
    """Logits log 1, log 2, log 5: probabilities 1/8, 2/8, 5/8; the two highest are experts 2 and 1."""
    router = Router(3, 3, 2, renormalise)
    router.weight.data = torch.eye(3)
    found = router(torch.tensor([[1.0, 2.0, 5.0]]).log())
    torch.testing.assert_close(found.probabilities, torch.tensor([[1 / 8, 2 / 8, 5 / 8]]))
    assert found.chosen.tolist() == [[2, 1]]
    torch.testing.assert_close(found.weights, torch.tensor([weights]))


def test_router_is_fp32_under_autocast():
    """Logits of 256 and 257 are one number in bf16; the router still tells them apart."""
    router = Router(1, 2, 1, True)
    router.weight.data = torch.tensor([[256.0], [257.0]])
    with torch.autocast("cpu", torch.bfloat16):
        assert router(torch.ones(1, 1)).chosen.item() == 1


def sparse_ffn(dtype, active=2, idle=False):
    """Four experts over a width of 16, and tokens for it. idle: none of them goes to expert 1."""
    generator = torch.Generator().manual_seed(5)
    ffn = SparseFFN(16, 24, 4, active).to(dtype)
    for parameter in ffn.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype) / 4
    x = torch.randn(3, 7, 16, generator=generator, dtype=torch.float64).to(dtype)
    if idle:
        x = x.abs()
        ffn.router.weight.data[1] = -9.0
    return ffn, x.requires_grad_()


def dense(ffn, x):
    """Every expert for every token, those that are not chosen with weight 0."""
    probabilities = (x @ ffn.router.weight.T).softmax(-1)
    kept = torch.where(probabilities >= probabilities.sort(-1).values[..., -ffn.router.active, None], probabilities, 0)
    weights = kept / kept.sum(-1, keepdim=True)
    said = torch.stack([e.down(torch.nn.functional.silu(e.gate(x)) * e.up(x)) for e in ffn.experts], -1)
    return (said * weights[..., None, :]).sum(-1)


PATHS = {"one by one": (torch.float64, 1e-12), "grouped": (torch.float32, 1e-5)}


@pytest.mark.parametrize("idle", [False, True], ids=["all busy", "one idle"])
@pytest.mark.parametrize("active", [1, 2, 4])
@pytest.mark.parametrize("path", PATHS)
def test_every_path_is_the_dense_sum(path, active, idle, monkeypatch):
    """Values, and the gradients of tokens, router and experts; an idle expert's are zeros, not missing."""
    if idle and active == 4:
        pytest.skip("all are chosen")
    dtype, tolerance = PATHS[path]
    monkeypatch.setattr(SparseFFN, "_groups", lambda *_: path == "grouped")
    ffn, x = sparse_ffn(dtype, active, idle)
    (expected := dense(ffn, x)).square().sum().backward()
    wanted = {name: p.grad for name, p in [("x", x), *ffn.named_parameters()]}
    x.grad = None
    ffn.zero_grad()
    (found := ffn(x)).square().sum().backward()
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
    for name, p in [("x", x), *ffn.named_parameters()]:
        torch.testing.assert_close(p.grad, wanted[name], rtol=0, atol=tolerance * wanted[name].abs().max().clamp(min=1))
    assert ffn.experts[0].up.weight.grad.abs().max() > 0.1
    assert (ffn.experts[1].up.weight.grad.abs().max() == 0) == idle
    with torch.no_grad():
        torch.testing.assert_close(ffn(x[:1, :1]), expected[:1, :1], rtol=0, atol=tolerance)  # most have no token


def test_grouped_is_in_autocasts_precision(monkeypatch):
    """bf16 keeps 8 bits, and four products and sums round: 2 % of the largest."""
    ffn, x = sparse_ffn(torch.float32)
    expected = dense(ffn, x)
    monkeypatch.setattr(SparseFFN, "_groups", lambda *_: True)
    with torch.autocast("cpu", torch.bfloat16):
        found = ffn(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=0.02 * expected.abs().max().item())
    found.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in ffn.parameters())


@pytest.mark.gpu
def test_a_gpu_groups_in_training():
    """bf16: grouped where gradients are wanted, one by one where not or where an adapter stands; 2 % of the largest."""
    ffn, x = sparse_ffn(torch.float32)
    expected = dense(ffn, x).detach()
    ffn.cuda()
    with torch.autocast("cuda", torch.bfloat16):
        assert ffn._groups(x.cuda())
        found = ffn(x.cuda())
        with torch.no_grad():
            assert not ffn._groups(x.cuda())
            alone = ffn(x.cuda())
        handle = ffn.experts[3].up.register_forward_hook(lambda *_: None)
        assert not ffn._groups(x.cuda())
        handle.remove()
    for said in (found, alone):
        torch.testing.assert_close(said.float().cpu(), expected, rtol=0, atol=0.02 * expected.abs().max().item())
    found.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in ffn.parameters())


def test_adapters_on_experts_are_heard_and_merged():
    """An adapter of every linear layer stands on experts and not on routers; merged, the answers stay."""
    model = sparse_model(torch.float64)
    adapters.attach(LoraConfig(rank=2), model)
    model.to(torch.float64)
    stands = {name for name, _ in adapters.adapted(model)}
    assert "blocks.1.ffn.experts.3.down" in stands and not any("router" in name for name in stands)
    for name, parameter in model.named_parameters():
        if ".b." in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
    batch = cut(1, 8)[0]
    before = model(batch.tokens, batch.positions)
    adapters.merge(model)
    torch.testing.assert_close(model(batch.tokens, batch.positions), before, rtol=0, atol=1e-5)  # merged in fp32


# ---- the load-balance loss


def test_balance_by_hand():
    """Two experts, one a token, one layer, three tokens and a fourth of padding.

    Probabilities of expert 0: 0.9, 0.6, 0.2 (and 0.1). f = (2/3, 1/3); P = (1.7/3, 1.3/3).
    2 * (2/3 * 1.7/3 + 1/3 * 1.3/3) = 2 * 4.7/9. The sum over tokens is three times that.
    """
    first = torch.tensor([0.9, 0.6, 0.2, 0.1], dtype=torch.float64)
    router = Router(2, 2, 1, True).double()
    router.weight.data = torch.eye(2, dtype=torch.float64)
    routed = [router(torch.stack([first, 1 - first], 1).log())]
    real = torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    load = loads(routed, real)
    assert load.tolist() == [[2.0, 1.0]]
    found = balance_sum(routed, real, load, torch.tensor(3))
    assert found.item() == pytest.approx(3 * 2 * 4.7 / 9, rel=1e-12)


def test_balance_is_not_rounded_by_autocast():
    """1 + 1/512 is 1 in bf16."""
    routed = [Router(2, 2, 1, True)(torch.zeros(512, 2))]
    real = torch.ones(512, dtype=torch.float64)
    load = torch.tensor([[257.0, 255.0]])
    routed = [routed[0]._replace(probabilities=torch.tensor([[257 / 512, 255 / 512]]).expand(512, 2))]
    with torch.autocast("cpu", torch.bfloat16):
        found = balance_sum(routed, real, load, torch.tensor(512))
    assert found.item() == pytest.approx(2 * (257**2 + 255**2) / 512, rel=1e-6)


def test_even_loads_cost_k():
    """The least: with two of four experts a token, 2."""
    routed = [Router(4, 4, 2, True)(torch.zeros(6, 4))]
    routed = [routed[0]._replace(chosen=torch.tensor([[0, 1], [2, 3]] * 3))]
    real = torch.ones(6, dtype=torch.float64)
    assert balance_sum(routed, real, loads(routed, real), torch.tensor(6)).item() == pytest.approx(2 * 6, rel=1e-6)


def sparse_model(dtype, family=Mixtral, **changes):
    kind = MixtralConfig if family is Mixtral else Qwen3MoeConfig
    model = family(kind(**SIZES, experts=4, **{"active": 2, "balance": BALANCE} | changes), VOCAB)
    model.init_weights(seed=3)
    return model.to(dtype)


def cut(step, size):
    """A step of 8 padded rows as micro-batches of `size` rows: 1 to 12 real tokens each."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(VOCAB, (ROWS, LENGTH), generator=generator)
    lengths = torch.tensor([12, 3, 2, 9, 1, 12, 6, 4])[torch.randperm(ROWS, generator=generator)]
    segments = (torch.arange(LENGTH) < lengths[:, None]).long()
    labels = tokens.masked_fill(segments == 0, -100)
    labels[:, 0] = -100
    positions = torch.arange(LENGTH).expand(ROWS, -1) * segments
    parts = [slice(i, i + size) for i in range(0, ROWS, size)]
    return [TokenBatch(tokens[p], labels[p], positions[p], segments[p]) for p in parts]


@pytest.mark.parametrize("family", [Mixtral, Qwen3Moe])
def test_balance_equals_transformers(family):
    """Its own function, on the logits of our routers (log p is a logit), with its mask for our padding."""
    hf = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    model, batch = sparse_model(torch.float32, family), cut(1, 8)[0]
    with routings(model) as routed:
        model(batch.tokens, batch.positions, batch.segments)
    logits = tuple(r.probabilities.log() for r in routed)
    real = real_tokens(batch)
    found = balance_sum(routed, real, loads(routed, real), real.sum()) / (len(logits) * real.sum())
    expected = hf.load_balancing_loss_func(logits, 4, 2, attention_mask=batch.segments)
    assert found.item() == pytest.approx(expected.item(), abs=1e-6)
    assert abs(found.item() - hf.load_balancing_loss_func(logits, 4, 2).item()) > 1e-3  # padding would be seen


class Squares(Objective):
    """Another objective: the squares of hidden states, averaged over rows."""

    def __init__(self):
        super().__init__(None)

    def count(self, batch):
        return torch.tensor(len(batch.tokens))

    def __call__(self, forward, batch):
        hidden = forward(batch.tokens, batch.positions, batch.segments)
        return LossOutput((hidden * batch.segments[..., None]).square().sum() / 100)


OBJECTIVES = {"next_token": lambda: NextToken(NextTokenConfig()), "squares": Squares}


def step_of(model, batches, objective="next_token"):
    """The gradients that the optimizer sees, the figures, and the module. batches: or how many rows each has."""
    found = {}

    def make(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        optimizer.register_step_pre_hook(
            lambda *_: found.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        )
        return optimizer

    made = OBJECTIVES[objective]() if isinstance(objective, str) else objective
    module = ObjectiveModule(model, made, make, lambda step: 1.0, StepSettings(0.0, 0))
    run_through(module, [cut(1, batches) if isinstance(batches, int) else batches])
    (row,) = module.rows()
    return found, row, module


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_step_is_the_whole_batchs_mean_and_transformers_balance(objective):
    """Loss and gradients of a step in micro-batches of two rows, against a mean over all rows plus the coefficient
    times transformers' function of all of them. Rounding in its fp32: 1e-6."""
    hf = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    model, batch = sparse_model(torch.float64), cut(1, 8)[0]
    with routings(model) as routed:
        hidden = model(batch.tokens, batch.positions, batch.segments)
    if objective == "squares":
        loss = (hidden * batch.segments[..., None]).square().sum() / 100 / ROWS
    else:
        loss = cross_entropy(model.head(hidden)[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten())
    balance = hf.load_balancing_loss_func(tuple(r.probabilities.log() for r in routed), 4, 2, batch.segments)
    (loss + BALANCE * balance).backward()
    expected = {n: p.grad for n, p in model.named_parameters()}
    found, row, _ = step_of(sparse_model(torch.float64), 2, objective)
    assert row["train/balance"] == pytest.approx(balance.item(), abs=1e-6)
    assert row["train/loss"] == pytest.approx((loss + BALANCE * balance).item(), abs=1e-6)
    assert found.keys() == {n for n, gradient in expected.items() if gradient is not None}
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-6, msg=name)
    off, _, _ = step_of(sparse_model(torch.float64, balance=0.0), 2, objective)
    assert (off["blocks.0.ffn.router.weight"] - found["blocks.0.ffn.router.weight"]).abs().max() > 1e-4


@pytest.mark.parametrize("recompute", [0, 1])
@pytest.mark.parametrize("size", [8, 4, 2, 1])
def test_a_step_is_the_same_however_it_is_cut(size, recompute):
    """fp64, 1e-12: gradients, loss, balance and load; 8 rows at once take no pass of their own, 4 and fewer do. With
    activations made anew nothing counts twice."""
    expected, whole, _ = step_of(sparse_model(torch.float64), 8)
    model = sparse_model(torch.float64)
    model.recompute = recompute
    found, row, _ = step_of(model, size)
    for key in ("train/loss", "train/balance", "train/expert_load", "grad_norm"):
        assert row[key] == pytest.approx(whole[key], rel=1e-12), key
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-12, msg=name)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="NO C++ COMPILER: torch.compile IS NOT TESTED HERE")
@pytest.mark.parametrize("recompute", [0, 1])
def test_compiled_blocks_have_the_same_step(recompute):
    """Attention and norms are compiled, experts run as they are between them; balance is still seen."""
    expected, whole, _ = step_of(sparse_model(torch.float32), 2)
    model = sparse_model(torch.float32)
    model.recompute = recompute
    model.compile_blocks()
    found, row, _ = step_of(model, 2)
    for key in ("train/loss", "train/balance", "train/expert_load"):
        assert row[key] == pytest.approx(whole[key], rel=1e-5), key
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-5, msg=name)


def test_expert_load_by_hand():
    """All 49 tokens go to the same two of four experts in both layers: the busiest has twice its even share."""
    model = sparse_model(torch.float64)
    for block in model.blocks:
        block.ffn_norm.weight.data.zero_()  # the router reads zeros: a tie, which the same experts always win
    _, row, _ = step_of(model, 2)
    assert row["train/expert_load"] == pytest.approx(2.0, rel=1e-12)
    assert row["train/balance"] == pytest.approx(2.0, rel=1e-12)  # 4 * (1/4 + 1/4): the router itself prefers none


def test_padding_does_not_count():
    """Other tokens in the padding: the same step."""
    expected, whole, _ = step_of(sparse_model(torch.float64), 4)
    batches = cut(1, 4)
    for batch in batches:
        batch.tokens[batch.segments == 0] = 7
    found, row, _ = step_of(sparse_model(torch.float64), batches)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-12, msg=name)
    for key in ("train/balance", "train/expert_load", "grad_norm"):
        assert row[key] == pytest.approx(whole[key], rel=1e-12), key


def test_validation_is_the_objectives_loss_alone():
    batches = cut(1, 4)
    _, _, weighed = step_of(sparse_model(torch.float64, balance=10.0), 8)
    _, _, plain = step_of(sparse_model(torch.float64, balance=0.0), 8)
    assert weighed.validation_loss(batches) == plain.validation_loss(batches)


@pytest.mark.parametrize(("balance", "size", "passes"), [(0.0, 4, 2), (0.1, 8, 1), (0.1, 4, 4)])
def test_only_a_cut_step_is_read_twice(balance, size, passes):
    model, calls = sparse_model(torch.float64, balance=balance), []
    model.register_forward_hook(lambda *_: calls.append(1))
    _, row, _ = step_of(model, size)
    assert len(calls) == passes
    assert ("train/balance" in row) == bool(balance)


def test_nothing_stays_on_the_model():
    model = sparse_model(torch.float32)
    with pytest.raises(ZeroDivisionError), routings(model):
        raise ZeroDivisionError
    assert not any(module._forward_hooks for module in model.modules())


class Twice(NextToken):
    """Runs the model a second time."""

    def __call__(self, forward, batch):
        super().__call__(forward, batch)
        return super().__call__(forward, batch)


def test_an_objective_that_runs_the_model_twice_is_refused():
    with pytest.raises(TriviumError, match="model.balance=0.05 needs an objective that runs the model once a batch"):
        step_of(sparse_model(torch.float64), 8, Twice(NextTokenConfig()))


def test_an_llama_has_no_balance():
    model = Llama(LlamaConfig(**SIZES), VOCAB)
    model.init_weights(0)
    assert "train/balance" not in step_of(model.double(), 4)[1]


# ---- settings


@pytest.mark.parametrize("kind", [MixtralConfig, Qwen3MoeConfig])
@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"experts": 0}, "model.experts=0 must be greater than 0"),
        ({"active": 0}, "model.active=0 must be at least 1 and at most model.experts=4"),
        ({"active": 5}, "model.active=5 must be at least 1 and at most model.experts=4"),
        ({"balance": -0.1}, "model.balance=-0.1 must not be negative"),
    ],
)
def test_wrong_settings_are_refused(kind, changes, sentence):
    with pytest.raises(ConfigError, match=sentence):
        kind(**SIZES, **{"experts": 4, "active": 2} | changes)


@pytest.mark.parametrize(
    ("family", "changes", "sentence"),
    [
        (Qwen3Moe, {"mlp_only_layers": [1]}, "mlp_only_layers=.1. is not supported"),
        (Qwen3Moe, {"decoder_sparse_step": 2}, "decoder_sparse_step=2 is not supported"),
        (Qwen3Moe, {"num_experts": 0}, "num_experts=0 is not a whole number above 0"),
        (Mixtral, {"router_jitter_noise": 0.1}, "router_jitter_noise=0.1 is not supported"),
        (Mixtral, {"num_experts_per_tok": None}, "has no num_experts_per_tok"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(family, changes, sentence):
    raw = sparse_model(torch.float32, family).hf_config()
    family.settings_from_hf(Reader(raw, "config.json"))
    with pytest.raises(TriviumError, match=sentence):
        family.settings_from_hf(Reader(raw | changes, "config.json"))


def test_only_active_experts_cost_operations():
    """A layer: attention 16*16 + 2*16*8 + 16*16 = 768, router 4*16 = 64, two experts of 3*16*24 = 1152; head 61*16.

    6 (2 (768 + 64 + 2304) + 976), and attention 12 * 16 * 2 layers * 12/2 tokens.
    """
    model = sparse_model(torch.float32)
    assert model.flops_per_token(12) == pytest.approx(6 * (2 * (768 + 64 + 2304) + 976) + 12 * 16 * 2 * 6)
