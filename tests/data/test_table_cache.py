"""A tokenised data set comes from the cache only where the same text would be tokenised in the same way."""

import hashlib
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch.distributed as dist
from helpers import Listed
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Core

from trivium.build import build_source
from trivium.compose import component
from trivium.data import adapted, cache, packing
from trivium.data.cache import cached_plan, cached_table
from trivium.data.config import BPEConfig, SourceConfig
from trivium.data.datamodule import StepDataset
from trivium.data.loader import StepLoader
from trivium.data.packing import plan, tokenise
from trivium.data.tokenizer import BYTES, Tokenizer, train_bpe
from trivium.data.transfer import LEAST, share, shared_value
from trivium.disk import keep, kept
from trivium.errors import DataError
from trivium.plugin import discover

discover()


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


TALKS = [
    {"messages": [{"role": "user", "content": f"is {i} odd"}, {"role": "assistant", "content": " yes"},
                  {"role": "user", "content": "is it"}, {"role": "assistant", "content": "no"}]}
    for i in (0, 1, 2, 3, 0)
]  # fmt: skip


@pytest.mark.parametrize(
    "changed", ["nothing", "template", "train_on", "turns", "clean", "cleaning", "tokenizer", "length", "letter"]
)
def test_what_tokens_follow_from_is_a_miss_and_nothing_else_is(calls, tokenizers, tmp_path, changed):
    """Chats in a file, as a run reads them; then the same once more, but for one thing."""
    path, tokenizer = tmp_path / "talks.jsonl", tokenizers[0]
    data = {"name": "files", "path": str(path), "validation_share": 0.0, "cleaning": {}}
    reading = {"form": "chat", "train_on": "assistant", "turns": "refuse"}

    def table():
        path.write_text("".join(json.dumps(row) + "\n" for row in talks))
        return cached_table(build_source(component("data", data), "sft"), tokenizer, length, **reading)

    talks, length = TALKS, 64
    first = table()
    if changed == "template":
        said = tmp_path / "twice.jinja"
        said.write_text(tokenizer.template.replace("{{ bos_token }}", "{{ bos_token }}{{ bos_token }}"))
        tokenizer = tokenizer.extended((), str(said))
    elif changed in ("train_on", "turns"):
        reading |= {"train_on": "last_turn"} if changed == "train_on" else {"turns": "fork"}
    elif changed == "clean":
        data["clean"] = ["exact"]  # the last is the first again
    elif changed == "cleaning":
        data["cleaning"] = {"min_chars": 3}  # of a step that is not asked for
    elif changed == "tokenizer":
        tokenizer = tokenizers[1]
    elif changed == "length":
        length = 62
    elif changed == "letter":
        talks = [*TALKS[:-1], json.loads(json.dumps(TALKS[-1]).replace(" yes", " yet"))]
    again = table()
    same = changed in ("nothing", "cleaning")
    assert len(calls) == len([*tmp_path.glob("tables/*")]) == (1 if same else 2)
    learned = changed in ("turns", "length")  # of these rows, which nothing cuts or forks, the same is made
    assert (again.fingerprint == first.fingerprint) == (same or learned)


def ask(*said):
    """A conversation: turns of the user and the assistant in alternation."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]


SMALL = {
    "text": [
        {"id": f"t{i}", "text": "the heron is here. " * i, "source": ("", "pond", "sea")[i % 3]} for i in (1, 5, 2)
    ],
    "chat": [
        {"id": "c1", "messages": ask("is 1 odd?", "yes", "and 2?", "no"), "task": "odd"},
        {"id": "c2", "messages": ask("is it?", "it is " * 12)},
        {"id": "c3", "prompt": "the heron is", "completion": " here", "task": "odd"},
    ],
    "pairs": [{"id": "p1", "chosen": ask("is 1 odd?", "yes"), "rejected": ask("is 1 odd?", "no")}],
    "labels": [
        {"id": "l1", "messages": ask("is 1 odd?", "yes"), "label": True},
        {"id": "l2", "messages": ask("is 2 odd?", "yes"), "label": False},
    ],
}
"""Of each form some examples: long ones are cut, one is forked, some have a name, others none."""
NO_HISTORY = (  # earlier answers are left out, so a conversation of two becomes two documents
    "{% for m in messages %}{% if loop.last or m.role == 'user' %}<{{ m.role }}>{{ m.content }}<end>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
MADE = {
    "VERSION": 5,
    "text": "29e3a7fb812e5488009bd3751155074db4c50a5e0047b4f776cbbc07db6b80de",
    "plan": "7cfaa6be2a4958a926405a5b2b048ac84d76121688196fd4d3380a6424f6b402",
    "chat": "0348e860627fd10fdfc4dadc6268a28e21beb401ff7e952b6562bd1d505752ae",
    "pairs": "66ca3a9b8fc292020529d3065cfaa24f51d2c27b13ced8f4de67443713f70367",
    "labels": "0f1cfd94f905cb2f3a2ebc24d911acc295f8b64a9ed4c53b24d641ca35d023f8",
}
"""SHA-256 of what cache.VERSION makes of SMALL."""


def bytes_and_a_word():
    """A tokenizer that no training has a part in: bytes, marks, and "is"."""
    marks = ["<bos>", "<eos>", "<pad>", "<end>", "<user>", "<assistant>"]
    vocabulary = {token: number for number, token in enumerate([*marks, *sorted(BYTES), "is"])}
    core = Core(models.BPE(vocabulary, [("i", "s")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(mark, normalized=False) for mark in marks])
    names = {f"{mark[1:-1]}_token": mark for mark in marks[:3]}
    return Tokenizer(core, {**names, "eot_token": "<end>", "chat_template": NO_HISTORY})


def test_what_is_made_of_the_same_data_is_of_its_version(calls, tmp_path):
    """Facts name every array's kind, size and hash: one byte of one that changes, changes the digest."""
    made = {"VERSION": cache.VERSION}
    for form, examples in SMALL.items():
        before = {*tmp_path.glob("tables/*")}
        table = cached_table(
            Listed(examples), bytes_and_a_word(), 48, form=form, train_on="assistant", turns="fork", workers=1
        )
        [folder] = {*tmp_path.glob("tables/*")} - before
        made[form] = hashlib.sha256(kept(folder / cache.FACTS)).hexdigest()
        assert table.truncated == (1 if form == "chat" else 0) and table.forks == (2 if form == "chat" else 0)
        if form == "text":
            cached_plan(table, 48, seed=3)
            [folder] = tmp_path.glob("plans/*")
            made["plan"] = hashlib.sha256(kept(folder / cache.FACTS)).hexdigest()
    assert made == MADE, "tables are made otherwise: raise VERSION in data/cache.py and update the digests in MADE"


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


@pytest.fixture
def read_in(tmp_path):
    """read_in() -> a source of 700 documents in a text file, as a run opens it."""
    text = "\n\n".join(f"is {i} odd or is it no heron. " * 160 for i in range(700))
    (tmp_path / "text.txt").write_text(text)
    chosen = component("data", {"name": "files", "path": str(tmp_path / "text.txt"), "validation_share": 0.0})
    return lambda: build_source(chosen, "pretrain")


def test_text_is_read_and_encoded_once_many_documents_at_a_time(calls, tokenizers, read_in, monkeypatch):
    """All that tokenising does beside a bare loop is by the batch: what it costs does not grow with documents."""
    source, read, encoded = read_in(), [], []
    get, encode = type(source).__getitem__, Tokenizer.encode_batch
    monkeypatch.setattr(type(source), "__getitem__", lambda self, i: (read.append(i), get(self, i))[1])
    monkeypatch.setattr(
        Tokenizer, "encode_batch", lambda self, texts, **k: (encoded.append(texts), encode(self, texts))[1]
    )
    cached_table(source, tokenizers[0], 64, form="text", train_on="all", workers=1)
    assert read == list(range(700))
    size = sum(map(len, sum(encoded, [])))
    assert sum(encoded, []) == [get(source, i)["text"] for i in range(700)] and size > 3e6
    assert len(encoded) <= size // packing.BATCH + -(-700 // packing.CHUNK)


def test_a_start_on_what_is_kept_reads_every_byte_once(calls, tokenizers, read_in, tmp_path, monkeypatch):
    """The file, each array of the table and of its plan are hashed once. No document is looked at, no text is encoded,
    no process started."""

    def start():
        table = cached_table(read_in(), tokenizers[0], 64, form="text", train_on="all", workers=2)
        return table, cached_plan(table, 64, seed=0)

    monkeypatch.setattr(cache, "ALONE", 1e9)
    first = start()
    hashed, real = [], cache.digest_file
    for module in (cache, adapted):
        monkeypatch.setattr(module, "digest_file", lambda path: (hashed.append(path), real(path))[1])
    for owner, name in ((Tokenizer, "encode_batch"), (adapted.Adapted, "_example"), (subprocess, "Popen")):
        monkeypatch.setattr(owner, name, lambda *_, name=name, **__: pytest.fail(f"{name} was called"))
    again = start()
    arrays = [p for kind in ("tables", "plans") for p in tmp_path.glob(f"{kind}/*/*.bin") if p.name != cache.FACTS]
    assert sorted(hashed) == sorted([tmp_path / "text.txt", *arrays]) and len(arrays) == 8
    assert again[0].fingerprint == first[0].fingerprint and again[1] == first[1]


PLACE = {
    "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "1", "NODE_RANK": "0", "GROUP_RANK": "0", "ROLE_RANK": "0",
}  # fmt: skip
"""What a launcher tells a process of its group."""
ASKED = """
import os, sys
from trivium.data.config import SourceConfig
from trivium.data.source import Source

class Asked(Source):
    phases = frozenset({"pretrain"})
    fingerprint = "asked"
    def __len__(self): return 4
    def __getitem__(self, i):
        had = "torch" in sys.modules
        import torch.distributed
        told = sorted(name for name in os.environ if "RANK" in name or "MASTER" in name or "WORLD" in name)
        where = "with" if torch.distributed.is_initialized() else "without"
        return {"id": str(i), "text": f"{os.getpid()} {had} {where} a group {told}"}
"""


def test_processes_that_make_tokens_are_in_no_process_group(calls, tokenizers, tmp_path, monkeypatch):
    """The one that starts them is in one, as under torchrun; they are told nothing of it, and load no torch."""
    (tmp_path / "asked_source.py").write_text(ASKED)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(cache, "ALONE", -1.0)
    monkeypatch.setattr(packing, "CHUNK", 1)
    for name, value in PLACE.items():
        monkeypatch.setenv(name, value)
    from asked_source import Asked

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        source = Asked(SourceConfig())
        assert source[0]["text"].split(" ", 2)[2] == f"with a group {sorted(PLACE)}"
        found = cached_table(source, tokenizers[0], 4096, form="text", train_on="all", workers=2)
    finally:
        dist.destroy_process_group()
    said = [tokenizers[0].decode(found.document(d)[0]).split(" ", 1) for d in range(4)]
    assert [what for _, what in said] == ["False without a group []"] * 2 + ["True without a group []"] * 2
    assert len({pid for pid, _ in said}) == 2 and str(os.getpid()) not in dict(said)


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
