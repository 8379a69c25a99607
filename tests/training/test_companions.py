"""Frozen companions: what the reference says is kept and never mixed up, and what is frozen stays as it was."""

import copy
import hashlib

import numpy as np
import pytest
import torch
from helpers import dense_logprobs, run_through, tiny_llama

from trivium.data.chat import Encoded
from trivium.data.datamodule import StepDataset
from trivium.data.packing import table_of
from trivium.models.adapters import attach, parts
from trivium.models.config import LoraConfig
from trivium.models.weights import weights_of
from trivium.objectives.config import DistillConfig, PreferenceConfig, UnpairedConfig
from trivium.objectives.distill import Distill
from trivium.objectives.preference import Preference
from trivium.objectives.unpaired import KTO
from trivium.training.companions import COLUMN, AdapterOff, note_reference
from trivium.training.objective_module import ObjectiveModule, StepSettings
from trivium.training.optim import optimizer_tensors
from trivium.training.precision import PRECISIONS
from trivium.types import PreferenceBatch

VOCAB, PAD, PAIRS = 43, 0, 9
CPU = torch.device("cpu")
OBJECTIVE = Preference(PreferenceConfig())


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache."""
    monkeypatch.setenv("TRIVIUM_CACHE", str(tmp_path))
    return tmp_path / COLUMN


def small_llama(seed=1, dropout=0.0):
    return tiny_llama(VOCAB, seed, dropout=dropout)


def documents():
    """Nine pairs with names: pair k is documents 2k and 2k+1."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for n in torch.randint(1, 6, (2 * PAIRS,), generator=generator).tolist():
        ids = torch.randint(1, VOCAB, (2 + n,), generator=generator).tolist()
        found.append(Encoded(ids, [i >= 2 for i in range(len(ids))]))
    return found


def steps_of(order=range(PAIRS), seed=0, length=24, micro_size=2, change=None):
    """The pairs, in an order, as a data set of packed rows."""
    docs = documents()
    if change is not None:
        docs[change].ids[-1] = 1 + docs[change].ids[-1] % (VOCAB - 1)
    picked = [2 * p + side for p in order for side in (0, 1)]
    table = table_of([docs[d] for d in picked], [f"pair {d // 2}" for d in picked], group=2)
    return StepDataset(
        table, size=2, micro_size=micro_size, length=length, pad_id=PAD, seed=seed, batch=PreferenceBatch
    )


def note(steps, model=None, sha256="a", rows=None, precision="fp32", objective=OBJECTIVE):
    """Returns (whether it was in the cache, the column); a model of None must not be loaded."""

    def load():
        assert model is not None, "the reference was asked, though its values are known"
        return model

    rows = np.arange(len(steps.rows)) if rows is None else rows
    found = note_reference(objective, load, sha256, steps, rows, PRECISIONS[precision], CPU)
    return found, steps.table.columns[COLUMN]


def expected(model, docs=None):
    return [dense_logprobs(model, d).sum().item() for d in docs or documents()]


def test_noted_values_are_those_of_each_document_alone():
    """fp32, sums of up to 5 log-probabilities: 1e-5."""
    model = small_llama()
    found, values = note(steps_of(), model)
    assert not found and values.dtype == np.float32
    np.testing.assert_allclose(values, expected(model), rtol=0, atol=1e-5)


def test_values_from_the_cache_are_the_same_bytes_and_the_model_is_not_loaded(cache):
    _, first = note(steps_of(), small_llama())
    found, second = note(steps_of())
    assert found and first.tobytes() == second.tobytes()
    assert len(list(cache.iterdir())) == 1  # nothing temporary is left


def test_values_follow_their_documents():
    """The data in another order, and packed in another order: a pair has its own values wherever it lies."""
    model = small_llama()
    right = {f"pair {p}": expected(model)[2 * p : 2 * p + 2] for p in range(PAIRS)}
    order = [4, 8, 0, 2, 6, 1, 7, 3, 5]
    for steps in (steps_of(order), steps_of(seed=3), steps_of(order, seed=7, length=40, micro_size=1)):
        _, values = note(steps, model)
        for p, name in enumerate(steps.table.ids[::2]):
            np.testing.assert_allclose(values[2 * p : 2 * p + 2], right[name], rtol=0, atol=1e-5)


def test_batches_bring_the_values_of_their_own_documents():
    """What training reads equals what the reference would say of that very batch; it is not asked again."""
    model, steps = small_llama(), steps_of(seed=5)
    bare = [copy.deepcopy(b) for step in range(4) for b in steps[step]]
    note(steps, model)
    batches = [b for step in range(4) for b in steps[step]]
    assert all(b.reference is None for b in bare)
    for one, other in zip(bare, batches, strict=True):
        with torch.no_grad():
            OBJECTIVE.consult(one, {COLUMN: model})
        torch.testing.assert_close(other.reference, one.reference, rtol=0, atol=1e-5)
        OBJECTIVE.consult(other, {})  # no reference at hand, none needed


def test_other_weights_data_or_precision_are_never_reused():
    """Each is asked anew, and none takes the place of another: all are found again."""
    cases = {
        "first": {"steps": steps_of()},
        "other reference": {"steps": steps_of(), "sha256": "b"},
        "one token of the data": {"steps": steps_of(change=5)},
        "order of the data": {"steps": steps_of([1, 0, *range(2, PAIRS)])},
        "length of rows": {"steps": steps_of(length=40)},
        "precision": {"steps": steps_of(), "precision": "bf16"},
        "rows": {"steps": steps_of(), "rows": np.array([0, 2])},
    }
    said = {}
    for number, (name, how) in enumerate(cases.items()):
        found, said[name] = note(model=small_llama(seed=number), **how)
        assert not found, name
    for name, how in cases.items():
        found, values = note(**how)
        assert found and values.tobytes() == said[name].tobytes(), name
    assert len({v.tobytes() for v in said.values()}) == len(cases)


@pytest.mark.parametrize("byte", [0, 31, 32, 40, -1])
def test_a_flipped_byte_is_never_read(cache, byte):
    """In the digest, at the first value, further on, and in the last: the reference is asked again, the file mended."""
    _, right = note(steps_of(), small_llama())
    (path,) = cache.iterdir()
    data = bytearray(path.read_bytes())
    data[byte] ^= 1
    path.write_bytes(data)
    found, values = note(steps_of(), small_llama())
    assert not found and values.tobytes() == right.tobytes()
    assert note(steps_of())[0]


@pytest.mark.parametrize("change", [lambda d: d[:-4], lambda d: d + bytes(4), lambda d: d[:32], lambda d: b""],
                         ids=["shorter", "longer", "no values", "empty"])  # fmt: skip
def test_a_file_of_another_length_is_never_read(cache, change):
    _, right = note(steps_of(), small_llama())
    (path,) = cache.iterdir()
    path.write_bytes(change(path.read_bytes()))
    found, values = note(steps_of(), small_llama())
    assert not found and values.tobytes() == right.tobytes()


def test_a_whole_file_of_other_values_is_not_read_for_this_data(cache):
    """A digest that fits, but two values too few: the count is of the data, not of the file."""
    _, right = note(steps_of(), small_llama())
    (path,) = cache.iterdir()
    data = right[:-2].tobytes()
    path.write_bytes(hashlib.sha256(data).digest() + data)
    found, values = note(steps_of(), small_llama())
    assert not found and values.tobytes() == right.tobytes()


def test_only_rows_that_will_be_read_are_asked():
    """Two steps of two rows: their documents have values, all others NaN; a row that was not foreseen has no loss."""
    model, steps, asked = small_llama(), steps_of(seed=2, length=16), []

    class Counting(Preference):
        def consult(self, batch, models):
            asked.append(len(batch.tokens))
            super().consult(batch, models)

    rows = steps.first_rows(4)
    read = steps.order.rows(0, 4)
    assert sorted(set(read.tolist())) == rows.tolist() and len(steps.rows) > 5
    _, values = note(steps, model, rows=rows, objective=Counting(PreferenceConfig()))
    assert sum(asked) == len(rows)
    foreseen = sorted(d for r in rows for d in steps.rows[r])
    assert np.flatnonzero(~np.isnan(values)).tolist() == foreseen
    np.testing.assert_allclose(values[foreseen], np.array(expected(model))[foreseen], rtol=0, atol=1e-5)
    for step in range(2):
        for batch in steps[step]:
            assert torch.isfinite(OBJECTIVE(model, batch).loss_sum)
    unforeseen = next(r for r in range(len(steps.rows)) if r not in rows)
    assert torch.isnan(OBJECTIVE(model, steps.collated(np.array([unforeseen]))).loss_sum)


def test_first_rows_of_more_than_an_epoch_are_all_rows():
    steps = steps_of()
    assert steps.first_rows(10**6).tolist() == list(range(len(steps.rows)))


def test_rows_of_another_packing_are_never_reused():
    """Another seed packs other documents into rows of the same numbers; what was asked of row 0 is no answer there.

    The story: the key named the rows by number alone, so a run with another seed found a file, read NaN for the
    documents that it trains on, and stopped with a loss of NaN that blamed the learning rate.
    """
    rows = np.array([0, 2])
    one, other = steps_of(seed=0), steps_of(seed=3)
    wanted = [d for r in rows for d in other.rows[r]]
    assert sorted(wanted) != sorted(d for r in rows for d in one.rows[r])
    note(one, small_llama(), rows=rows)
    _, values = note(other, small_llama(), rows=rows)
    assert not np.isnan(values[wanted]).any()


def test_a_reference_is_asked_without_dropout_and_without_gradient():
    """dropout 0.5 in its config: the same values as without, at every call."""
    noisy, plain = small_llama(dropout=0.5), small_llama()
    noisy.train()
    _, values = note(steps_of(), noisy)
    np.testing.assert_array_equal(values, note(steps_of(), plain, sha256="b")[1])
    np.testing.assert_array_equal(values, note(steps_of(), noisy.train(), sha256="c")[1])
    assert all(p.grad is None for p in noisy.parameters())


# ---- beside a model that trains


def train(objective, companions, steps, model=None, watch=None):
    """One real fit; watch(module): called after each loss."""
    model = model or small_llama(dropout=0.2)
    if watch:
        plain = type(objective).__call__

        class Watched(type(objective)):
            def __call__(self, forward, batch):
                watch(module)
                return plain(self, forward, batch)

        objective = Watched(objective.config)
    settings = StepSettings(grad_clip=1.0, seed=0)
    module = ObjectiveModule(
        model, objective, lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2), lambda step: 1.0, settings, companions
    )
    run_through(module, steps)
    return module


@pytest.mark.parametrize("name", ["reference", "teacher"])
def test_companions_stay_frozen_in_eval_mode_and_are_never_saved(name):
    """While the model trains (its own dropout on): no gradient, no parameter, no byte of a checkpoint is theirs."""
    companion = small_llama(seed=2, dropout=0.5).train()
    before = {n: p.detach().clone() for n, p in companion.named_parameters()}
    objective = OBJECTIVE if name == "reference" else Distill(DistillConfig())
    modes = []
    data = steps_of()
    data.batch = objective.batch
    module = train(
        objective, {name: companion}, [data[i] for i in range(3)],
        watch=lambda m: modes.append((m.model.training, companion.training)),
    )  # fmt: skip
    assert module.step == 3 and set(modes) == {(True, False)}
    assert all(p.grad is None and not p.requires_grad for p in companion.parameters())
    assert all(torch.equal(p, before[n]) for n, p in companion.named_parameters())
    ours = {id(p) for p in module.parameters()}
    assert ours == {id(p) for p in module.model.parameters()}
    assert not ours & {id(p) for p in companion.parameters()}
    assert len(module.state_dict()) == len(module.model.state_dict())
    assert sum(t.numel() for t in weights_of(module.model).values()) == module.model.num_parameters
    count = len(list(module.model.parameters()))
    assert {n.split(".")[0] for n in optimizer_tensors(module.optimizer)} == {str(i) for i in range(count)}


@pytest.mark.parametrize("objective", [OBJECTIVE, KTO(UnpairedConfig())], ids=["dpo", "kto"])
def test_a_reference_with_dropout_says_the_same_twice(objective):
    """Asked in the midst of training, at two different steps, by the module itself."""
    reference, said = small_llama(seed=2, dropout=0.5), []
    data = steps_of()
    data.batch = objective.batch
    data.table.columns["desirable"] = np.ones(2 * PAIRS, np.float32)
    if objective is OBJECTIVE:
        del data.table.columns["desirable"]

    class Noting(type(objective)):
        def consult(self, batch, models):
            super().consult(batch, models)
            said.append(batch.reference.clone())

    train(Noting(objective.config), {"reference": reference}, [data[0], data[0]])
    half = len(said) // 2
    assert half >= 1 and all(torch.equal(a, b) for a, b in zip(said[:half], said[half:], strict=True))


def test_asking_leaves_the_model_in_the_mode_it_was_in():
    """In eval mode and without gradient within, as before after; also when the question fails."""
    model = small_llama(dropout=0.5).train()
    settings = StepSettings(grad_clip=1.0, seed=0)
    module = ObjectiveModule(
        model, OBJECTIVE, lambda m: torch.optim.SGD(m.parameters(), lr=1.0), lambda s: 1.0, settings,
        {"reference": small_llama(seed=2)},
    )  # fmt: skip
    with module.asking() as models:
        assert models.keys() == {"reference", "policy"} and models["policy"] is model
        assert not model.training and not torch.is_grad_enabled()
    assert model.training and torch.is_grad_enabled()
    with pytest.raises(RuntimeError), module.asking():
        raise RuntimeError
    assert model.training and torch.is_grad_enabled()


def test_a_model_with_its_adapter_off_is_what_it_stands_on():
    """Bit for bit, whatever the adapter says; nothing of it is frozen, moved or counted twice."""
    model = tiny_llama(VOCAB)
    tokens, places = torch.arange(12).reshape(2, 6), torch.arange(6).expand(2, -1)
    hidden = model(tokens, places)
    logits = model.head(hidden)
    attach(LoraConfig(rank=2, also=["head"]), model)
    with torch.no_grad():
        for parameter in parts(model).values():
            parameter.add_(0.3)
    off = AdapterOff(model).eval().requires_grad_(False).to(torch.float32)
    assert off(tokens, places).equal(hidden) and off.head(hidden).equal(logits)
    assert not model(tokens, places).equal(hidden) and not model.head(hidden).equal(logits)
    assert all(p.requires_grad for p in parts(model).values()) and off.num_parameters == 0
