"""Blocks run otherwise and learn the same: activations forgotten and made again, and compiled."""

import shutil

import pytest
import torch
from helpers import run_through, tiny_llama
from torch.autograd.graph import saved_tensors_hooks

from trivium.inference.config import NativeConfig
from trivium.inference.native.engine import NativeBackend, collect
from trivium.objectives.config import NextTokenConfig
from trivium.objectives.next_token import NextToken
from trivium.training.config import AdamWConfig
from trivium.training.objective_module import ObjectiveModule, StepSettings
from trivium.training.optim import adamw
from trivium.training.precision import PRECISIONS
from trivium.types import Request, SamplingParams, TokenBatch

VOCAB, LENGTH, LAYERS = 61, 12, 4
OBJECTIVE = NextToken(NextTokenConfig())


def item(number, packed=True):
    """Two micro-batches of 4 rows; packed: two documents of 6 tokens in each."""
    found = []
    for tokens in torch.randint(VOCAB, (2, 4, LENGTH), generator=torch.Generator().manual_seed(number)):
        places = torch.arange(LENGTH).expand(4, -1)
        positions = places % 6 if packed else places
        labels = torch.where(positions == 0, -100, tokens)
        found.append(TokenBatch(tokens, labels, positions, 1 + places // 6 if packed else None))
    return found


def module_of(*, dropout=0.0, precision="fp32", recompute=0, compiled=False, seen=None):
    def make(model):
        optimizer = adamw(AdamWConfig(lr=1e-2), model)
        named = dict(model.named_parameters())
        if seen is not None:
            optimizer.register_step_pre_hook(lambda *_: seen.append({n: p.grad.clone() for n, p in named.items()}))
        return optimizer

    model = tiny_llama(VOCAB, layers=LAYERS, dropout=dropout)
    model.recompute = recompute
    if compiled:
        model.compile_blocks()
    settings = StepSettings(1.0, 0, PRECISIONS[precision])
    return ObjectiveModule(model, OBJECTIVE, make, lambda step: 1.0, settings)


def losses_of(module, items):
    run_through(module, items)
    return [row["train/loss"] for row in module.rows()]


# ---- recompute


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "plain"])
def test_recomputed_blocks_give_the_same_gradients(packed, precision):
    """Dropout 0.3, two micro-batches, every, every second and every third block: equal bit for bit at each of three."""
    items, kept = [item(i, packed) for i in range(3)], []
    plain = losses_of(module_of(dropout=0.3, precision=precision, seen=kept), items)
    for every in (1, 2, 3):
        seen = []
        assert losses_of(module_of(dropout=0.3, precision=precision, recompute=every, seen=seen), items) == plain
        for one, other in zip(kept, seen, strict=True):
            assert all(torch.equal(one[n], other[n]) for n in one)


def test_another_dropout_would_show():
    """The gradient is that of these very masks: with others it is 1,000 times fp32's rounding away."""
    one, other = [], []
    losses_of(module_of(dropout=0.3, seen=one), [item(0)])
    module = module_of(dropout=0.3, seen=other)
    module.seed_step = lambda: torch.manual_seed(1)
    losses_of(module, [item(0)])
    assert max((one[0][n] - other[0][n]).abs().max().item() for n in one[0]) > 1e-3


def kept_bytes(recompute):
    """Bytes that autograd keeps from forward to backward, each storage once, weights left out."""
    module, storages = module_of(dropout=0.1, recompute=recompute), {}
    weights = {p.untyped_storage().data_ptr() for p in module.model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address is used twice
        return tensor

    batch = item(0)[0]
    module.model.train()
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        module.model(batch.tokens, batch.positions, batch.segments)
    return sum(size for size, _ in storages.values())


def test_recomputed_blocks_keep_no_activations():
    """Of 4 blocks, every = 1 forgets 4, 2 forgets 0 and 2, 3 forgets 0 and 3, 4 forgets 0. What a block keeps beside
    its input is the same for each, so what is kept falls in a straight line, and by more than 90 % with all.
    (The input of a block, 4 x 12 x 16 x 4 = 3,072 bytes, stays and is no saved tensor.)"""
    whole, *others = (kept_bytes(n) for n in (0, 1, 2, 3, 4))
    block = (whole - others[0]) / LAYERS
    assert block > 10 * 3072
    assert others[0] < 0.1 * whole
    for left, forgotten in zip(others[1:], (2, 2, 1), strict=True):
        assert left == pytest.approx(whole - forgotten * block, abs=4 * 3072)


# ---- compile


compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="NO C++ COMPILER: torch.compile IS NOT TESTED HERE")


@compiler
@pytest.mark.slow
def test_compiled_blocks_learn_the_same_and_share_one_compilation():
    """20 steps of AdamW at 1e-2, packed and plain, also with every second block recomputed: losses within 1e-5.

    One graph for four blocks and both kinds of row each, one more for each in eval mode; and then the native backend,
    whose path with a cache is eager: not one graph more, and the tokens of an uncompiled model of the same weights.
    """
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()

    def graphs():
        return counters["stats"]["unique_graphs"], counters["frames"]["total"]

    for number, packed in enumerate((True, False), 1):
        items = [item(i, packed) for i in range(20)]
        plain = losses_of(module_of(), items)
        assert plain[0] - plain[-1] > 0.2
        for recompute in (0, 2):
            module = module_of(compiled=True, recompute=recompute)
            assert losses_of(module, items) == pytest.approx(plain, abs=1e-5)
        assert graphs() == (number, number)
    for _ in range(2):
        assert module.validation_loss(item(50)) == pytest.approx(eager_of(module).validation_loss(item(50)), abs=1e-5)
    assert graphs() == (3, 3)
    asked = [Request(f"r{i}", tuple(range(3 + i)), SamplingParams(max_tokens=8)) for i in range(3)]
    said = [
        [e.token_id for e in events]
        for m in (module, eager_of(module))
        for events in collect(NativeBackend(NativeConfig(), m.model.eval()), asked).values()
    ]
    assert said[:3] == said[3:] and graphs() == (3, 3)


def eager_of(module):
    """The same weights in a model that was never compiled."""
    other = module_of()
    with torch.no_grad():
        for p, q in zip(other.model.parameters(), module.model.parameters(), strict=True):
            p.copy_(q)
    return run_through(other, [])


@compiler
@pytest.mark.slow
def test_compiled_dropout_follows_from_the_seed():
    """Other masks than eager ones, but the same for the same step: two runs are equal bit for bit, so a resume is."""
    items = [item(i) for i in range(4)]
    one, other = (losses_of(module_of(dropout=0.3, compiled=True), items) for _ in range(2))
    assert one == other
    assert one != pytest.approx(losses_of(module_of(compiled=True), items), abs=1e-4)


def test_compiling_without_a_compiler_is_refused_with_one_sentence(main, pretraining, tmp_path, monkeypatch):
    """Before anything is read or written; CXX may name one, with arguments."""
    for name in ("", "no-such-compiler -m64"):
        monkeypatch.setenv("CXX", name)
        monkeypatch.setenv("PATH", str(tmp_path))
        how = ("trainer.compile=true", "trainer.accelerator=cpu")
        run = main(*pretraining(tmp_path / "runs", "compiled", *how))
        assert run.code == 2 and "Traceback" not in run.err
        said = " ".join(run.err.split())
        assert "error: trainer.compile=true needs a C++ compiler, and there is no" in said and (name or "g++") in said
        assert not (tmp_path / "runs/compiled/metrics.jsonl").exists()
