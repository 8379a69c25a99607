"""A tokenised data set comes from the cache only where the same text would be tokenised in the same way."""

import numpy as np
import pytest
from helpers import Listed

from trivium.data import cache
from trivium.data.cache import cached_table
from trivium.data.config import BPEConfig
from trivium.data.packing import tokenise
from trivium.data.tokenizer import train_bpe
from trivium.disk import keep, kept


def labelled(answer="yes"):
    return Listed(
        [{"id": str(i), "prompt": f"is {i} odd", "completion": answer, "label": i % 2 == 1} for i in range(6)]
    )


@pytest.fixture(scope="module")
def tokenizers():
    return [train_bpe(BPEConfig(vocab_size=300), [text] * 3) for text in ("is odd yes no", "no heron is here")]


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """How often text was really tokenised."""
    monkeypatch.setenv("TRIVIUM_CACHE", str(tmp_path))
    made = []

    def counted(*args, **how):
        made.append(how)
        return tokenise(*args, **how)

    monkeypatch.setattr(cache, "tokenise", counted)
    return made


def test_cached_table_is_the_table(calls, tokenizers):
    """Every array, id and count, and the fingerprint that a resume compares; verdicts are a column."""
    how = {"form": "labels", "train_on": "all"}
    first, second = (cached_table(labelled(), tokenizers[0], 64, **how) for _ in range(2))
    assert len(calls) == 1
    for table in (first, second):
        plain = tokenise(labelled(), tokenizers[0], 64, **how)
        assert (table.ids, table.group, table.truncated, table.fingerprint) == (
            plain.ids, plain.group, plain.truncated, plain.fingerprint,
        )  # fmt: skip
        for name in ("tokens", "trained", "offsets"):
            assert np.array_equal(getattr(table, name), getattr(plain, name))
            assert getattr(table, name).dtype == getattr(plain, name).dtype
        assert table.columns["desirable"].tolist() == [0, 0, 1, 1] * 3


def test_anything_else_is_tokenised_anew(calls, tokenizers):
    """Other text, tokenizer, length, form or mask."""
    base = {"form": "labels", "train_on": "all"}
    cached_table(labelled(), tokenizers[0], 64, **base)
    cached_table(labelled("no"), tokenizers[0], 64, **base)
    cached_table(labelled(), tokenizers[1], 64, **base)
    cached_table(labelled(), tokenizers[0], 62, **base)
    cached_table(labelled(), tokenizers[0], 64, form="labels", train_on="assistant")
    plain = Listed([{"id": e["id"], "prompt": e["prompt"], "completion": e["completion"]} for e in labelled().examples])
    cached_table(plain, tokenizers[0], 64, form="chat", train_on="all")
    assert len(calls) == 6


def test_one_flipped_bit_in_the_cache_is_noticed(calls, tokenizers, tmp_path):
    how = {"form": "labels", "train_on": "all"}
    good = cached_table(labelled(), tokenizers[0], 64, **how)
    [path] = (tmp_path / "tables").glob("*.bin")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    again = cached_table(labelled(), tokenizers[0], 64, **how)
    assert len(calls) == 2 and again.fingerprint == good.fingerprint
    assert cached_table(labelled(), tokenizers[0], 64, **how).fingerprint == good.fingerprint and len(calls) == 2


def test_kept_bytes_come_back_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a/b.bin"
    assert kept(path) is None
    keep(path, b"heron")
    assert kept(path) == b"heron"
    path.write_bytes(path.read_bytes()[:-1])
    assert kept(path) is None
    path.write_bytes(b"")
    assert kept(path) is None
