"""`train/loss/NAME`: each name's share of the loss, against dense numbers put together document by document."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import run_through, tiny_llama

from trivium.data.cache import cached_table
from trivium.data.config import BPEConfig, SourceConfig
from trivium.data.datamodule import StepDataset
from trivium.data.packing import tokenise
from trivium.data.source import Source
from trivium.data.table import MOST_ORIGINS, TokenTable
from trivium.data.tokenizer import train_bpe
from trivium.objectives.config import NextTokenConfig
from trivium.objectives.next_token import NextToken
from trivium.training.objective_module import ObjectiveModule, StepSettings

VOCAB, NAMES = 61, ("a", "b", "c")
LENGTHS = (7, 3, 5, 6, 9, 2, 4, 8, 12, 3)
ORIGIN = (0, 1, 0, 2, 1, 1, 0, 2, 1, 0)


def table(named=True):
    draw = np.random.default_rng(0)
    tokens = draw.integers(4, VOCAB, sum(LENGTHS)).astype(np.int32)
    facts = {"origins": NAMES, "origin": np.array(ORIGIN)} if named else {}
    trained, ids = draw.random(len(tokens)) < 0.7, [str(i) for i in range(len(LENGTHS))]
    return TokenTable(tokens, trained, np.cumsum([0, *LENGTHS]), ids, **facts)


def dense(model, table):
    """Name -> (loss, tokens), each document scored by itself with all of its logits at once."""
    found = {name: [0.0, 0] for name in NAMES}
    for d, origin in enumerate(ORIGIN):
        ids, trained = (torch.from_numpy(x.copy()) for x in table.document(d))
        hidden = model(ids[None].long(), torch.arange(len(ids))[None])[0]
        losses = F.cross_entropy(model.head(hidden[:-1]), ids[1:].long(), reduction="none")
        entry = found[NAMES[origin]]
        entry[0] += losses[trained[1:]].sum().item()
        entry[1] += int(trained[1:].sum())
    return found


@pytest.mark.parametrize("length", [12, 16])
def test_each_name_has_the_loss_of_its_own_documents(length):
    """All rows at once: packed, padded, one document in a row or several."""
    model, packed = tiny_llama(VOCAB, dtype=torch.float64), table()
    steps = StepDataset(packed, size=1, micro_size=1, length=length, pad_id=0, seed=0)
    batch = steps.collated(np.arange(len(steps.rows)))
    with torch.no_grad():
        output = NextToken(NextTokenConfig())(model, batch)
        expected = dense(model, packed)
    for name, (total, count) in expected.items():
        found = output.metrics[f"loss/{name}"]
        assert found.count.item() == count
        assert found.total.item() == pytest.approx(total, rel=1e-12)
    assert sum(output.metrics[f"loss/{n}"].total.item() for n in NAMES) == pytest.approx(output.loss_sum.item(), 1e-12)


@pytest.mark.parametrize("micro_size", [1, 2, 4])
def test_rows_hold_means_over_the_step_however_it_is_cut(micro_size):
    """Smoothed, so that the loss is no mere likelihood: weighted by their tokens the names' means are the loss."""

    def module():
        objective = NextToken(NextTokenConfig(label_smoothing=0.2))
        settings = StepSettings(grad_clip=1.0, seed=0)
        make = lambda m: torch.optim.AdamW(m.parameters())  # noqa: E731
        return ObjectiveModule(tiny_llama(VOCAB, dtype=torch.float64), objective, make, lambda _: 1.0, settings)

    def step(named, micro_size):
        return StepDataset(table(named), size=4, micro_size=micro_size, length=16, pad_id=0, seed=0)[0]

    (row,) = run_through(module(), [step(True, micro_size)]).rows()
    (whole,) = run_through(module(), [step(True, 4)]).rows()
    (plain,) = run_through(module(), [step(False, micro_size)]).rows()
    counts = dict.fromkeys(NAMES, 0)
    for batch in step(True, 4):
        for r in range(len(batch.tokens)):
            for s in range(int(batch.segments[r].max())):
                here = (batch.segments[r] == s + 1) & (batch.labels[r] != -100)
                counts[NAMES[int(batch.origin[r, s])]] += int(here.sum())
    mean = sum(row[f"train/loss/{n}"] * c for n, c in counts.items()) / sum(counts.values())
    assert mean == pytest.approx(row["train/loss"], rel=1e-12)
    for name in NAMES:
        assert row[f"train/loss/{name}"] == pytest.approx(whole[f"train/loss/{name}"], rel=1e-12)
    assert row["train/loss"] == plain["train/loss"] and row["grad_norm"] == plain["grad_norm"], "names change nothing"
    assert not [key for key in plain if key.startswith("train/loss/")]


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(BPEConfig(vocab_size=300), ["it was the best of times"] * 3)


class Told(Source):
    """Documents whose name is the first word of their id."""

    phases = frozenset({"pretrain"})

    def __init__(self, names):
        super().__init__(SourceConfig())
        self.names = names

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        return {"id": f"{self.names[index]} {index}", "text": "It was the best of times. " * (index + 1)}

    def origin(self, example):
        return example["id"].split()[0]


def test_table_keeps_names_and_what_is_learned_does_not_change(tokenizer, tmp_path, monkeypatch):
    """A long text is cut into several documents, all of its name; in the cache as well."""
    monkeypatch.setenv("TRIVIUM_CACHE", str(tmp_path))
    source = Told(["books", "chats", "books", "chats"])
    for _ in range(2):
        found = cached_table(source, tokenizer, 32, form="text", train_on="all")
        assert found.origins == ("books", "chats")
        assert [source.origin({"id": i}) for i in found.ids] == [found.origins[o] for o in found.origin]
    assert len(found.ids) > 4
    examples = [source[i] for i in range(4)]
    assert tokenise(examples, tokenizer, 32).fingerprint == found.fingerprint
    assert tokenise(examples, tokenizer, 32).origins == ()


@pytest.mark.parametrize(("names", "kept"), [(["one"] * 3, 0), (range(MOST_ORIGINS), MOST_ORIGINS),
                                             (range(MOST_ORIGINS + 1), 0)])  # fmt: skip
def test_one_name_or_too_many_are_not_counted_apart(names, kept, tokenizer):
    assert len(tokenise(Told([f"n{n}" for n in names]), tokenizer, 64).origins) == kept


def test_run_on_two_files_tells_both(main, pretraining, corpus, tmp_path):
    (tmp_path / "data").mkdir()
    text = corpus.read_text()
    (tmp_path / "data/old.txt").write_text(text[: len(text) // 2])
    (tmp_path / "data/new.txt").write_text(text[len(text) // 2 :])
    run = main(*pretraining(tmp_path, "a", f"data.path={tmp_path / 'data'}", "trainer.max_steps=4"))
    assert run.code == 0, run.err
    rows = [json.loads(line) for line in (tmp_path / "a/metrics.jsonl").read_text().splitlines()]
    told = [{k for k in row if k.startswith("train/loss/")} for row in rows]
    assert set().union(*told) == {"train/loss/old.txt", "train/loss/new.txt"}
    for row in rows:
        parts = [row[k] for k in row if k.startswith("train/loss/")]
        assert min(parts) - 1e-9 <= row["train/loss"] <= max(parts) + 1e-9
