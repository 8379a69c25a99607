"""A tokenised data set comes from the cache only where the same text would be tokenised in the same way."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from helpers import Listed

from trivium.build import build_source
from trivium.compose import component
from trivium.data import cache, packing
from trivium.data.cache import cached_plan, cached_table
from trivium.data.config import BPEConfig
from trivium.data.datamodule import StepDataset
from trivium.data.loader import StepLoader
from trivium.data.packing import plan, tokenise
from trivium.data.tokenizer import train_bpe
from trivium.data.transfer import LEAST, share, shared_value
from trivium.disk import keep, kept
from trivium.errors import DataError


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

    def counted(*args):
        made.append(args)
        return write(*args)

    write = cache._write_table
    monkeypatch.setattr(cache, "_write_table", counted)
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


def test_one_flipped_bit_in_any_file_is_noticed(calls, tokenizers, tmp_path):
    how = {"form": "labels", "train_on": "all"}
    good = cached_table(labelled(), tokenizers[0], 64, **how)
    content = {name: np.array(getattr(good, name)) for name in ("tokens", "trained", "offsets")}
    [folder] = (tmp_path / "tables").iterdir()
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["desirable.bin", "example.bin", "facts.bin", "id_ends.bin", "ids.bin", "offsets.bin",
                     "tokens.bin", "trained.bin"]  # fmt: skip
    for count, name in enumerate(names, start=2):
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 2] ^= 1
        (folder / name).write_bytes(data)
        again = cached_table(labelled(), tokenizers[0], 64, **how)
        assert len(calls) == count and again.fingerprint == good.fingerprint, name
        assert all(np.array_equal(getattr(again, key), values) for key, values in content.items())
    cached_table(labelled(), tokenizers[0], 64, **how)
    (folder / "ids.bin").unlink()
    assert list(cached_table(labelled(), tokenizers[0], 64, **how).ids) == [str(i // 2) for i in range(12)]
    assert len(calls) == 2 + len(names) and [p.name for p in (tmp_path / "tables").iterdir()] == [folder.name]


def test_a_plan_is_made_once_and_a_damaged_one_anew(calls, tokenizers, tmp_path):
    table = cached_table(texts(700), tokenizers[0], 16, form="text", train_on="all")
    mapped, first = cached_plan(table, 16, seed=3), plan(table, 16, seed=3)
    assert mapped == first and first != plan(table, 16, seed=4)
    [folder] = (tmp_path / "plans").iterdir()
    before = (folder / "documents.bin").stat().st_mtime_ns
    assert cached_plan(table, 16, seed=3) == first and (folder / "documents.bin").stat().st_mtime_ns == before
    data = bytearray((folder / "documents.bin").read_bytes())
    data[8] ^= 1
    (folder / "documents.bin").write_bytes(data)
    assert cached_plan(table, 16, seed=3) == first
    assert isinstance(mapped.documents, np.memmap) and isinstance(table.tokens, np.memmap)


def texts(count, start=0):
    """Texts of 1 to 40 letters in three kinds, one of which has no name."""
    kinds = ("", "odd", "even")
    rows = [{"id": f"n{i}", "text": "is odd yes no "[i % 5 :] * (i % 3), "source": kinds[i % 3]} for i in range(count)]
    return Listed([row for row in rows if row["text"]][start:])


@pytest.mark.parametrize("workers", [1, 2])
def test_parts_make_the_whole_whoever_makes_them(calls, tokenizers, tmp_path, monkeypatch, workers):
    """Three chunks, the last ones by two other processes: as if all had been tokenised at once."""
    monkeypatch.setattr(cache, "ALONE", -1.0)
    monkeypatch.setattr(packing, "CHUNK", 200)
    source = texts(900)
    assert len(source) == 600
    started = []
    monkeypatch.setattr(cache, "StepLoader", lambda *a, **k: started.append(k) or StepLoader(*a, **k))
    found = cached_table(source, tokenizers[0], 8, form="text", train_on="all", workers=workers)
    assert len(started) == workers - 1
    monkeypatch.setattr(packing, "CHUNK", 10**6)
    whole = tokenise(source, tokenizers[0], 8)
    for name in ("tokens", "trained", "offsets", "origin"):
        assert np.array_equal(getattr(found, name), getattr(whole, name)), name
    for name in ("ids", "origins", "num_bytes", "fingerprint", "talks", "group"):
        assert getattr(found, name) == getattr(whole, name), name
    assert found.num_bytes == sum(len(e["text"]) for e in source.examples) and found.origins == ("even", "odd")
    assert len(found.ids) > 600 and set(found.ids) == {e["id"] for e in source.examples}


def test_what_is_wrong_in_a_later_part_is_found_and_nothing_is_kept(calls, tokenizers, tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "CHUNK", 100)
    good = texts(300).examples
    cases = {
        "two examples have the id 'n1'": [*good, {**good[0]}],
        "example x has prompt, completion": [*good, {"id": "x", "prompt": "a", "completion": "b"}],
        "no token of 150 examples would be trained on": [
            {"id": str(i), "prompt": "is odd " * 9, "completion": "yes"} for i in range(150)
        ],
    }
    for sentence, examples in cases.items():
        form = "text" if "text" in examples[0] else "chat"
        with pytest.raises(DataError, match=sentence):
            cached_table(Listed(examples), tokenizers[0], 8, form=form, train_on="assistant")
        assert list((tmp_path / "tables").iterdir()) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_what_is_wrong_is_said_alike_whoever_finds_it(calls, tokenizers, monkeypatch, workers):
    """In the 150th conversation of 200, which another process reads where there are two: one sentence, one rule."""
    monkeypatch.setattr(cache, "ALONE", -1.0)
    monkeypatch.setattr(packing, "CHUNK", 100)
    started = []
    monkeypatch.setattr(cache, "StepLoader", lambda *a, **k: started.append(k) or StepLoader(*a, **k))
    ask = [{"role": "user", "content": "is odd"}, {"role": "assistant", "content": "yes"}]
    examples = [{"id": f"n{i}", "messages": ask} for i in range(200)]
    examples[150]["messages"] = [ask[0], {"role": "assistant", "content": " "}]
    with pytest.raises(DataError) as caught:
        cached_table(Listed(examples), tokenizers[0], 64, form="chat", train_on="assistant", workers=workers)
    assert (str(caught.value), caught.value.rule) == ("example n150: an assistant turn is empty", "empty_turn")
    assert len(started) == workers - 1


def test_a_cache_that_is_emptied_under_a_run_is_not_missed(calls, tokenizers, tmp_path):
    """Workers that start after it is gone get what the run still has; one that was just told where it lay says so."""
    table = cached_table(texts(9000), tokenizers[0], 16, form="text", train_on="all")
    rows = cached_plan(table, 16, seed=0)
    assert isinstance(table.tokens, np.memmap) and table.tokens.nbytes > LEAST < rows.documents.nbytes
    steps = StepDataset(table, size=4, micro_size=2, length=16, pad_id=0, seed=0, rows=rows)
    here = [[batch.tokens.tolist() for batch in steps[i]] for i in range(6)]
    with open(tmp_path / "shared", "w+b") as shared:
        told = share(steps, shared)
        for folder in ("tables", "plans"):
            shutil.rmtree(tmp_path / folder)
        shared.write(b"x")
        shared.flush()
        with pytest.raises(DataError, match=r"tokens.bin is gone .* the same command makes it anew and continues"):
            shared_value(told, shared.fileno())
    loader = StepLoader(steps, range(6), workers=2)
    assert [[batch.tokens.tolist() for batch in item] for item in loader] == here


@pytest.mark.parametrize("clean", [[], ["exact"]])
def test_files_are_read_by_several_processes(calls, tokenizers, tmp_path, monkeypatch, clean):
    """The very source that large texts come from, and cleaned."""
    monkeypatch.setattr(cache, "ALONE", -1.0)
    monkeypatch.setattr(packing, "CHUNK", 100)
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "is odd {i}"}}\n' for i in range(300)))
    config = component(
        "data", {"name": "files", "path": str(tmp_path / "a.jsonl"), "validation_share": 0, "clean": clean}
    )
    source = build_source(config, "pretrain")
    started = []
    monkeypatch.setattr(cache, "StepLoader", lambda *a, **k: started.append(k) or StepLoader(*a, **k))
    found = cached_table(source, tokenizers[0], 16, form="text", train_on="all", workers=2)
    assert len(started) == 1 and found.fingerprint == tokenise(source, tokenizers[0], 16).fingerprint


def test_a_source_that_no_process_can_be_given_is_read_here(calls, tokenizers, monkeypatch):
    monkeypatch.setattr(cache, "ALONE", -1.0)
    monkeypatch.setattr(packing, "CHUNK", 100)
    source = texts(300)
    source.handle = open(__file__)  # noqa: SIM115
    monkeypatch.setattr(cache, "StepLoader", lambda *a, **k: pytest.fail("asked"))
    found = cached_table(source, tokenizers[0], 16, form="text", train_on="all", workers=2)
    source.handle.close()
    assert found.fingerprint == tokenise(texts(300), tokenizers[0], 16).fingerprint


MEMORY = """
import ctypes, gc, sys
from pathlib import Path
import numpy as np
from trivium.data.cache import cached_plan, cached_table
from trivium.data.config import BPEConfig, SourceConfig
from trivium.data.datamodule import StepDataset
from trivium.data.source import Source
from trivium.data.tokenizer import train_bpe

class Made(Source):
    phases = frozenset({"pretrain"})
    fingerprint = sys.argv[1]
    def __len__(self): return int(sys.argv[1])
    def __getitem__(self, i): return {"id": f"example number {i} of many", "text": f"is odd {i} yes no " * 120}

tokenizer = train_bpe(BPEConfig(vocab_size=300), ["is odd yes no"] * 3)
def held(): return int(next(l for l in Path("/proc/self/status").read_text().splitlines() if "RssAnon" in l).split()[1])
before = held()
table = cached_table(Made(SourceConfig()), tokenizer, 64, form="text", train_on="all", workers=1)
rows = cached_plan(table, 64, 0)
steps = StepDataset(table, size=8, micro_size=8, length=64, pad_id=0, seed=0, rows=rows)
for step in range(len(rows) // 8): steps[step]
gc.collect()
ctypes.CDLL(None).malloc_trim(0)  # what the allocator keeps for later is noise
print(held() - before, len(table.tokens), sum(p.stat().st_size for p in Path(sys.argv[2]).rglob("*.bin")))
"""


def test_memory_stays_as_it_is_when_data_grows(tmp_path):
    """Ten times the data, tokenised, packed and read whole: what the process holds of its own does not follow."""
    held, sizes = [], []
    for count in (600, 6000):
        place = tmp_path / str(count)
        environment = {**os.environ, "TRIVIUM_CACHE": str(place), "PYTHONPATH": os.pathsep.join(sys.path)}
        environment |= {"TOKENIZERS_PARALLELISM": "false", "MALLOC_ARENA_MAX": "1"}  # what threads keep is noise
        command = [sys.executable, "-c", MEMORY, str(count), str(place)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        kilobytes, tokens, size = map(int, done.stdout.split())
        held.append(kilobytes * 1024)
        sizes.append((tokens, size))
    assert sizes[1][0] > 9 * sizes[0][0] and sizes[1][1] > 20e6
    assert held[1] - held[0] < 0.05 * (sizes[1][1] - sizes[0][1]), (held, sizes)


def test_kept_bytes_come_back_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a/b.bin"
    assert kept(path) is None
    keep(path, b"heron")
    assert kept(path) == b"heron"
    path.write_bytes(path.read_bytes()[:-1])
    assert kept(path) is None
    path.write_bytes(b"")
    assert kept(path) is None
