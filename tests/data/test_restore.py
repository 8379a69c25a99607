"""Grain's own test of a data pipeline (https://github.com/google/grain): before every element the state is saved, then
each state is restored and the rest compared with the rest of the first reading. The state here is one number, the step.

Through whole rows and batches: raw, mapped and filtered (cleaned), shuffled, packed, a mixture of three; over several
epochs; on any number of ranks, with workers or without.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import Listed

from trivium.data.cleaning import Cleaned
from trivium.data.config import BPEConfig, MixtureConfig
from trivium.data.datamodule import PromptDataset, StepDataset
from trivium.data.loader import StepLoader
from trivium.data.mixture import Mixture, document_ends
from trivium.data.packing import tokenise
from trivium.data.tokenizer import train_bpe

LENGTH = 24
WORDS = "is odd yes no heron river stone"


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(BPEConfig(vocab_size=300), [WORDS] * 3)


def texts(count, longest, start=0):
    drawn = np.random.default_rng(count).integers(1, longest, count)
    return Listed(
        [{"id": str(start + i), "text": " ".join(WORDS.split()[: 1 + n % 7] * 2)} for i, n in enumerate(drawn)]
    )


def talks(count):
    ask = {"role": "user", "content": "is it odd"}
    said = [[ask, {"role": "assistant", "content": "yes " * (1 + i % 4)}] for i in range(count)]
    return Listed([{"id": str(i), "messages": m} for i, m in enumerate(said)])


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRIVIUM_CACHE", str(tmp_path))


def made(kind, tokenizer, **more):
    sizes = {"size": 6, "micro_size": 2, "length": LENGTH, "pad_id": tokenizer.pad_id, "seed": 5, **more}
    if kind == "mixture":
        parts = {"a": texts(30, 9), "b": texts(17, 20), "c": texts(5, 6)}
        shares = {"a": {"weight": 2}, "b": {"weight": {0: 0, 9: 3}}, "c": {"weight": 1, "epochs": 4}}
        source = Mixture(MixtureConfig(parts=shares), parts)
        table = tokenise(source, tokenizer, LENGTH)
        table.ends = document_ends(source, table)
        return StepDataset(table, shares=source.config, **sizes)
    if kind == "cleaned":  # each text with an address is changed, each that comes again left out
        rows = [{**e, "text": f"{e['text']} me@example.org {i % 25}"} for i, e in enumerate(texts(40, 30).examples)]
        listed = Listed([*rows, *({**e, "id": f"{e['id']} again"} for e in rows)])
        listed.config = replace(listed.config, clean=["pii", "exact"])
        source = Cleaned(listed)
        assert len(source) == len({e["text"] for e in rows}) < 80 and "<EMAIL>" in source[0]["text"]
        return StepDataset(tokenise(source, tokenizer, LENGTH), **sizes)
    source, form = {"text": (texts(40, 30), "text"), "chat": (talks(23), "chat")}[kind]
    return StepDataset(tokenise(source, tokenizer, LENGTH, form=form), **sizes)


def same(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        for name in ("tokens", "labels", "positions", "segments", "origin"):
            x, y = getattr(a, name), getattr(b, name)
            assert (x is None and y is None) or torch.equal(x, y), name


@pytest.mark.parametrize("kind", ["text", "chat", "cleaned", "mixture"])
def test_every_step_restores_the_rest(kind, tokenizer):
    steps = made(kind, tokenizer)
    epochs = 3
    count = epochs * len(steps.rows) // 6 + 2
    whole = [steps[k] for k in range(count)]
    ids = [steps.sample_id(k) for k in range(count)]
    for start in range(count):
        again = made(kind, tokenizer)
        for k in range(start, count):
            assert again.sample_id(k) == ids[k]
            same(again[k], whole[k])
    read = np.concatenate([steps.order.rows(k * 6, 6) for k in range(count)])
    assert set(read.tolist()) == set(range(len(steps.rows))), "every row was read"
    if kind != "mixture":  # each epoch is every row once
        for epoch in range(epochs):
            here = read[epoch * len(steps.rows) : (epoch + 1) * len(steps.rows)]
            assert sorted(here.tolist()) == list(range(len(steps.rows)))


@pytest.mark.parametrize("kind", ["text", "mixture"])
@pytest.mark.parametrize("world", [1, 3])
def test_ranks_together_read_the_same_step(kind, world, tokenizer):
    """Taken up at any step, whatever the number of ranks before."""
    whole = made(kind, tokenizer)
    ranks = [made(kind, tokenizer, rank=r, world=world) for r in range(world)]
    for k in (0, 4, 11):
        found = [None] * 3
        for r, rank in enumerate(ranks):
            found[r::world] = rank[k]
        same(found, whole[k])


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_make_the_same_steps_from_any_start(workers, tokenizer):
    steps = made("mixture", tokenizer)
    whole = [steps[k] for k in range(9)]
    for start in (0, 5):
        loader = StepLoader(steps, range(start, 9), workers=workers)
        try:
            for k, item in enumerate(loader, start=start):
                same(item, whole[k])
        finally:
            loader.close()
        assert k == 8


def test_prompts_restore_at_every_step(tokenizer):
    """Two updates a rollout, over epochs; a mixture asks its parts in their shares."""
    ask = [{"role": "user", "content": "is it odd"}, {"role": "assistant", "content": "yes"}]
    some = [{"id": str(i), "messages": ask, "answer": "yes", "task": "t"} for i in range(7)]
    mixture = Mixture(
        MixtureConfig(parts={"a": {"weight": 3}, "b": {"weight": 1}}), {"a": Listed(some), "b": Listed(some[:2])}
    )
    for source in (Listed(some), mixture):
        steps = PromptDataset(source, tokenizer, size=4, updates=2, seed=1)
        whole = [[p.example["id"] for p in steps[k]] for k in range(24)]
        assert all(whole[k] == whole[k + 1] for k in range(0, 24, 2)) and whole[0] != whole[2]
        for start in range(24):
            again = PromptDataset(source, tokenizer, size=4, updates=2, seed=1)
            assert [[p.example["id"] for p in again[k]] for k in range(start, 24)] == whole[start:]
    kinds = [sorted(name[0] for name in ids) for ids in whole]
    assert kinds == [["a", "a", "a", "b"]] * 24
