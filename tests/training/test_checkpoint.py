"""The checkpoint writer: a crash, a refusing disk or a changed byte at any point never costs the older checkpoint."""

import errno
import hashlib
import json
import os
import random
import subprocess
import sys
import threading
import time

import pytest
import torch

from trivium.data.config import BPEConfig
from trivium.data.tokenizer import Tokenizer, train_bpe
from trivium.errors import CheckpointError, TrainingError
from trivium.models.weights import read_tensors
from trivium.training.background import Background
from trivium.training.checkpoint import RECORD, CheckpointStore, Contents, model_tensors, verify
from trivium.training.tensorfile import EXPONENTS, NAMES, write_tensors

STAGES = ("fsync", "rename", "replace")
"""The calls of `os` that make bytes, names and pointers durable; between any two of them the disk looks different."""
REMOVALS = ("unlink", "rmdir")
"""Those that let go of an old checkpoint."""


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(BPEConfig(vocab_size=300), ["the river and the stone"] * 3)


@pytest.fixture
def contents(tokenizer):
    """contents(value): a checkpoint whose every file tells `value` (but for the tokenizer's)."""

    def make(value):
        tensors = {
            "model.safetensors": {"w": torch.full((3, 4), float(value)), "b": torch.full((2,), value).to(torch.int8)},
            "optimizer.safetensors": {"0.exp_avg": torch.full((3, 4), value + 0.5)},
        }
        return Contents(tensors, {"state.json": {"step": value}, "model.json": {"name": "x"}},
                        {"tokenizer": tokenizer.save})  # fmt: skip

    return make


@pytest.fixture
def store(tmp_path, contents):
    """A store with the one checkpoint step-1, told to keep two."""
    store = CheckpointStore(tmp_path / "checkpoints", keep=2)
    store.save(1, contents(1))
    return store


def intact(checkpoint, value):
    verify(checkpoint)
    assert torch.equal(model_tensors(checkpoint)["w"], torch.full((3, 4), float(value)))
    assert json.loads((checkpoint / "state.json").read_text()) == {"step": value}
    Tokenizer.load(checkpoint / "tokenizer")
    return True


def names(store):
    return [p.name for p in store.complete()]


def leftovers(store):
    return [str(p) for p in store.folder.rglob("*.tmp-*")]


def fail_at(monkeypatch, number, act, stages=STAGES):
    """Call `act(name)` in place of the `number`-th durable call (from 0); returns the list of the calls made."""
    calls = []
    for name, real in [(n, getattr(os, n)) for n in stages]:

        def call(*args, _name=name, _real=real, **kwargs):
            calls.append(_name)
            if len(calls) - 1 == number:
                act(_name)
            return _real(*args, **kwargs)

        monkeypatch.setattr(os, name, call)
    return calls


def test_save_is_read_back_exactly(store):
    checkpoint = store.latest()
    assert checkpoint is not None and checkpoint.name == "step-1" and intact(checkpoint, 1)
    record = verify(checkpoint)
    assert record["step"] == 1
    assert sorted(record["files"]) == [
        *("model.json", "model.safetensors", "optimizer.safetensors", "state.json"),
        *("tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"),
    ]
    assert record["files"]["state.json"]["bytes"] == (checkpoint / "state.json").stat().st_size
    assert model_tensors(checkpoint)["b"].dtype is torch.int8
    assert not leftovers(store)


def test_every_file_and_folder_is_synced_before_the_rename(store, contents, monkeypatch):
    """A name that becomes durable before its bytes do is an empty file after a power cut."""
    synced, at_rename = set(), set()
    real_fsync, real_rename = os.fsync, os.rename

    def fsync(descriptor):
        synced.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        real_fsync(descriptor)

    def rename(old, new):
        pid = f".tmp-{os.getpid()}"  # of files that were written under another name first
        paths = {p for s in synced for p in (s, s.removesuffix(pid))}
        at_rename.update(str(p) for p in [old, *old.rglob("*")] if str(p) not in paths)
        real_rename(old, new)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    store.save(2, contents(2))
    assert at_rename == set()
    assert str(store.folder) in synced, "the rename itself must be made durable"


def test_figures_of_the_run_are_on_disk_before_the_checkpoint_counts(tmp_path, contents, monkeypatch):
    """After a power cut a checkpoint of step 40 beside figures up to step 31 would leave a gap that nothing fills."""
    figures, missing = tmp_path / "metrics.jsonl", tmp_path / "samples.jsonl"
    figures.write_text("{}\n")
    store = CheckpointStore(tmp_path / "checkpoints", beside=[figures, missing])
    order = []
    real_fsync, real_rename = os.fsync, os.rename

    def fsync(descriptor):
        order.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        real_fsync(descriptor)

    def rename(old, new):
        order.append("rename")
        real_rename(old, new)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    store.save(1, contents(1))
    whole = next(i for i, name in enumerate(order) if RECORD in name)
    assert order.index(str(figures)) < whole < order.index("rename")
    assert order.index(str(tmp_path)) < whole, "the name of the figures' file, and of checkpoints/ itself"
    assert str(missing) not in order


def test_process_killed_at_any_call_leaves_the_old_checkpoint(store, contents, monkeypatch):
    """A child process dies before its n-th fsync, rename, replace, unlink or rmdir, for every n.

    Whatever then counts as complete is whole, also where the death fell into the removal of an old one.
    """
    store.save(2, contents(2))
    calls = fail_at(monkeypatch, -1, None, (*STAGES, *REMOVALS))
    store.save(3, contents(3))
    total = len(calls)
    assert set(calls) == {*STAGES, *REMOVALS} and total >= 20
    monkeypatch.undo()
    seen_leftovers = 0
    for number in range(total):
        value = 10 + number
        child = os.fork()
        if child == 0:
            fail_at(monkeypatch, number, lambda _name: os._exit(9), (*STAGES, *REMOVALS))
            store.save(value, contents(value))
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9, f"call {number} was never made"
        complete = store.complete()
        assert complete
        assert all(intact(c, int(c.name[5:])) for c in complete)
        assert (store.folder / (store.folder / "LATEST").read_text()).is_dir()
        seen_leftovers += bool(leftovers(store))
        store.sweep()
        assert not leftovers(store)
        if number > calls.index("rename"):  # died after the rename: the new one counts
            assert store.latest().name == f"step-{value}"
    assert seen_leftovers >= calls.index("rename"), "every death before the rename leaves something to sweep"
    store.save(99, contents(99))
    assert intact(store.latest(), 99) and (store.folder / "LATEST").read_text() == "step-99"


def test_disk_that_refuses_at_any_call_gives_a_checkpoint_error(store, contents, monkeypatch):
    """EIO at the n-th fsync, rename or replace, for every n: one error that names a path, nothing left over."""
    calls = fail_at(monkeypatch, -1, None)
    store.save(2, contents(2))
    total, renamed = len(calls), calls.index("rename")
    monkeypatch.undo()

    def refuse(name):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    for number in range(total):
        with monkeypatch.context() as patch:
            fail_at(patch, number, refuse)
            with pytest.raises(CheckpointError, match=f"{store.folder}.*Input/output error"):
                store.save(50 + number, contents(50))
        assert not leftovers(store)
        assert (store.folder / f"step-{50 + number}").exists() == (number > renamed)
        assert intact(store.folder / "step-2", 2)
        if number > renamed:  # the checkpoint is whole; only what points to it is not
            assert intact(store.folder / f"step-{50 + number}", 50)
            subprocess.run(["rm", "-r", store.folder / f"step-{50 + number}"], check=True)


def test_old_checkpoint_that_cannot_be_removed_stops_nothing(store, contents, monkeypatch):
    """The new one is saved; what could not be removed only takes space."""
    store.save(2, contents(2))
    real = os.rename

    def rename(old, new):
        if str(old).endswith("step-1"):
            raise PermissionError(errno.EPERM, "no")
        real(old, new)

    monkeypatch.setattr(os, "rename", rename)
    assert store.save(3, contents(3)).name == "step-3"
    assert names(store) == ["step-1", "step-2", "step-3"] and intact(store.latest(), 3)


def test_interrupt_between_files_leaves_nothing(store, contents):
    """Ctrl-C inside a save is no OSError; it must not leave half a checkpoint either."""
    half = contents(2)

    def interrupted(_folder):
        raise KeyboardInterrupt

    half.writers["tokenizer"] = interrupted
    with pytest.raises(KeyboardInterrupt):
        store.save(2, half)
    assert names(store) == ["step-1"] and not leftovers(store) and intact(store.latest(), 1)


def test_folder_without_its_record_is_no_checkpoint(store, contents):
    store.save(2, contents(2))
    (store.folder / "step-2" / RECORD).unlink()
    assert names(store) == ["step-1"] and store.latest().name == "step-1"


def test_one_changed_bit_in_any_file_is_noticed_by_name(store):
    checkpoint = store.latest()
    files = sorted(p for p in checkpoint.rglob("*") if p.is_file() and p.name != RECORD)
    assert len(files) == 6
    for path in files:
        good = path.read_bytes()
        for place in {0, len(good) - 1, random.randrange(len(good))}:
            bad = bytearray(good)
            bad[place] ^= 1 << random.randrange(8)
            path.write_bytes(bad)
            with pytest.raises(CheckpointError, match=f"{path} is damaged"):
                verify(checkpoint)
        path.write_bytes(good[:-1])
        with pytest.raises(CheckpointError, match=f"{path} is damaged"):
            verify(checkpoint)
        path.write_bytes(good)
    assert intact(checkpoint, 1)


def test_every_bit_of_the_record_itself_counts(store):
    """A changed digit of `step`, a letter of a file's name, a bracket: all 8 bits of all bytes, the record is named."""
    record = store.latest() / RECORD
    good = record.read_bytes()
    for place in range(8 * len(good)):
        bad = bytearray(good)
        bad[place // 8] ^= 1 << place % 8
        record.write_bytes(bad)
        with pytest.raises(CheckpointError, match=f"{record} is missing or damaged"):
            verify(record.parent)
    record.write_bytes(good)
    assert intact(record.parent, 1)


def test_record_of_an_earlier_version_is_read(store):
    """Those had no digest of themselves; one that has been made wrong is no such record."""
    record = store.latest() / RECORD
    said = json.loads(record.read_text())
    said.pop("sha256")
    record.write_text(json.dumps(said))
    assert verify(record.parent)["step"] == 1
    record.write_text(json.dumps(said | {"sha257": "0" * 64}))
    with pytest.raises(CheckpointError, match="CHECKPOINT.json is missing or damaged"):
        verify(record.parent)


def test_missing_file_is_noticed_by_name(store):
    checkpoint = store.latest()
    (checkpoint / "optimizer.safetensors").unlink()
    with pytest.raises(CheckpointError, match="optimizer.safetensors is missing; the checkpoint is incomplete"):
        verify(checkpoint)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"step": 1}', '{"files": 3}', "\xff"])
def test_damaged_record_is_noticed(store, text):
    record = store.latest() / RECORD
    record.write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=f"{record} is missing or damaged"):
        verify(record.parent)


def test_keep_counts_and_best_stays(store, contents):
    for step in (2, 3, 4, 5):
        store.save(step, contents(step), best=step == 2)
    assert names(store) == ["step-2", "step-4", "step-5"]
    assert store.best().name == "step-2" and store.latest().name == "step-5"
    store.save(6, contents(6), best=True)
    assert names(store) == ["step-5", "step-6"] and store.best().name == "step-6"


def test_steps_are_ordered_as_numbers(store, contents):
    for step in (9, 10, 100):
        store.save(step, contents(step))
    assert names(store) == ["step-10", "step-100"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB."""
    place = tmp_path / "small"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", place], capture_output=True).returncode:
        pytest.skip("mounting needs root")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_full_disk_names_path_and_bytes_and_keeps_the_old(small_disk, contents):
    """300 kB fit, the 1.2 MB after them do not."""
    store = CheckpointStore(small_disk / "checkpoints")
    store.save(1, contents(1))
    large = contents(2)
    large.tensors["model.safetensors"]["w"] = torch.zeros(300_000)
    with pytest.raises(CheckpointError, match=r"model\.safetensors \(1,200,\d\d\d bytes\) cannot be written: No space"):
        store.save(2, large)
    assert names(store) == ["step-1"] and not leftovers(store) and intact(store.latest(), 1)
    store.save(3, contents(3))
    assert intact(store.latest(), 3)


def test_full_disk_in_the_tokenizer_names_path_and_bytes(store, contents, monkeypatch):
    """The files that writers make are no exception: real ENOSPC, from /dev/full."""
    real_open = open

    def full(path, mode="r", *args, **kwargs):
        if "tokenizer.json" in str(path) and "w" in mode:
            return real_open("/dev/full", mode, *args, **kwargs)
        return real_open(path, mode, *args, **kwargs)

    monkeypatch.setattr("builtins.open", full)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json\S* \([\d,]+ bytes\) cannot be written: No space"):
        store.save(2, contents(2))
    monkeypatch.undo()
    assert names(store) == ["step-1"] and not leftovers(store)


def test_read_only_folder_is_named(tmp_path, contents):
    """Not by permissions, which root ignores: a bind mount that is read-only for everyone."""
    place = tmp_path / "ro"
    store = CheckpointStore(place)
    store.save(1, contents(1))
    mounted = subprocess.run(["mount", "--bind", "-o", "ro", place, place], capture_output=True)
    if mounted.returncode or subprocess.run(["mount", "-o", "remount,bind,ro", place], capture_output=True).returncode:
        pytest.skip("mounting needs root")
    try:
        with pytest.raises(CheckpointError, match=f"{place}/step-2 cannot be written: Read-only file system"):
            store.save(2, contents(2))
    finally:
        subprocess.run(["umount", "-l", place], check=True)
    assert names(store) == ["step-1"] and intact(store.latest(), 1)


# ---- files of tensors


def test_every_type_and_shape_is_read_back_as_the_library_reads_it(tmp_path):
    """Bits, not values: random bytes as bfloat16 are NaN now and then, so floats are drawn."""
    tensors = {}
    for number, dtype in enumerate(NAMES):
        values = torch.randn(7, 3) if dtype.is_floating_point else torch.randint(0, 2, (7, 3))
        tensors[f"{number}.whole"] = values.to(dtype)
        tensors[f"{number}.scalar"] = values[0, 0].to(dtype)
        tensors[f"{number}.none"] = values[:0].to(dtype)
        tensors[f"{number}.turned"] = values.to(dtype).t()
        tensors[f"{number}.skipping"] = values.to(dtype)[::2]
    tensors["large"] = torch.randn(700_001)  # more than one piece, and no whole number of them
    size, digest = write_tensors(tmp_path / "t.safetensors", tensors)
    data = (tmp_path / "t.safetensors").read_bytes()
    assert (size, digest) == (len(data), hashlib.sha256(data).hexdigest())
    found = read_tensors(tmp_path / "t.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype is tensor.dtype and found[name].shape == tensor.shape
        assert found[name].contiguous().view(-1).view(torch.uint8).equal(
            tensor.contiguous().view(-1).view(torch.uint8)
        ), name  # fmt: skip


def test_type_that_files_cannot_hold_is_told(tmp_path):
    with pytest.raises(CheckpointError, match="w is of the type torch.complex64"):
        write_tensors(tmp_path / "t.safetensors", {"w": torch.zeros(1, dtype=torch.complex64)})


@pytest.mark.parametrize("dtype", EXPONENTS)
@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors"])
def test_checkpoint_that_is_not_finite_is_never_marked_good(file, dtype, store, contents):
    """Weights and optimizer state alike, at the first value or the last; the largest and smallest numbers are fine."""
    far = torch.finfo(dtype)
    fine = torch.tensor([far.max, far.min, far.tiny, far.tiny / 2, -0.0], dtype=torch.float64).to(dtype).repeat(300_000)
    good = contents(2)
    good.tensors[file]["w"] = fine
    store.save(2, good)
    for value, place in ((float("nan"), 0), (float("inf"), -1), (-float("inf"), 700_000)):
        bad = contents(3)
        bad.tensors[file]["w"] = fine.clone()
        bad.tensors[file]["w"][place] = value
        with pytest.raises(TrainingError, match=f"step 3: w in {file} is no longer finite"):
            store.save(3, bad, best=True)
    assert names(store) == ["step-1", "step-2"] and not leftovers(store) and store.best() is None
    assert (store.folder / "LATEST").read_text() == "step-2"


def test_saving_takes_no_second_copy_and_checking_none_at_all(tmp_path):
    """256 MB of weights: the peak grows by less than a tenth of them (before: by more than the whole of them).

    A copy for the background takes one copy, and no more either.
    """
    measure = """
import re, sys, torch
from pathlib import Path
from trivium.training.checkpoint import CheckpointStore, Contents, verify
def kilobytes(name):
    return int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
def growth(action):
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew
    before = kilobytes("VmRSS")
    action()
    return (kilobytes("VmHWM") - before) * 1024
weights = {str(i): torch.ones(1 << 23) for i in range(8)}
store = CheckpointStore(Path(sys.argv[1]))
store.save(1, Contents({"model.safetensors": {"w": torch.ones(3)}}, {}, {}))
contents = Contents({"model.safetensors": weights}, {}, {})
saved = growth(lambda: store.save(2, contents))
checked = growth(lambda: verify(store.latest()))
print(saved, checked, growth(lambda: store.save(3, contents.held())))
"""
    done = subprocess.run([sys.executable, "-c", measure, tmp_path / "c"], capture_output=True, text=True, check=True)
    saved, checked, held = (int(x) / (8 << 25) for x in done.stdout.split())
    print(f"peak over the weights' 256 MB: save {saved:.3f}, verify {checked:.3f}, save of a copy {held:.3f}")
    assert saved <= 0.1 and checked <= 0.1 and 0.9 < held <= 1.1


# ---- beside training


def test_copy_is_of_its_moment(store, contents):
    """What training changes after the copy was taken is not in it: weights, optimizer state, JSON."""
    live = contents(2)
    held = live.held()
    for tensors in live.tensors.values():
        for tensor in tensors.values():
            tensor.fill_(77)
    live.json["state.json"]["step"] = 77
    assert intact(store.save(2, held), 2)


def test_background_runs_one_job_at_a_time_and_loses_no_error():
    background, order, gate = Background(), [], threading.Event()

    def first():
        gate.wait(10)
        time.sleep(0.05)
        order.append("first")

    def failing():
        order.append("failing")
        raise CheckpointError("no room")

    background.wait()  # nothing to wait for
    background.start(first)
    assert order == [] and not background.failed, "the caller goes on"
    gate.set()
    background.start(failing)  # waits for the first
    assert order[0] == "first"
    while background._thread.is_alive():
        time.sleep(0.001)
    assert background.failed
    with pytest.raises(CheckpointError, match="no room"):
        background.wait()
    background.wait()  # told once
    assert not background.failed
    background.start(failing)
    with pytest.raises(CheckpointError, match="no room"):
        background.start(first)
    background.start(failing)
    background.join()
    with pytest.raises(CheckpointError, match="no room"):
        background.wait()


# ---- damaged ones


def damage(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_damaged_newest_is_refused_or_set_aside_if_so_set(store, contents):
    store.save(2, contents(2))
    store.save(3, contents(3), best=True)
    assert store.sound(fallback=False, say=None) == store.folder / "step-3"
    damage(store.folder / "step-3/model.safetensors")
    bad = (store.folder / "step-3/model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match=r"step-3/model.safetensors is damaged.*checkpoint.fallback=true.*step-2"):
        store.sound(fallback=False, say=None)
    assert names(store) == ["step-2", "step-3"], "refusing changes nothing"
    said = []
    assert store.sound(fallback=True, say=said.append) == store.folder / "step-2"
    assert len(said) == 1 and f"{store.folder}/step-3/model.safetensors is damaged" in said[0]
    assert "set aside as step-3.damaged-1, continues from step-2" in said[0]
    assert (store.folder / "step-3.damaged-1/model.safetensors").read_bytes() == bad, "never removed"
    assert (store.folder / "LATEST").read_text() == "step-2" and store.best() is None
    store.sweep()
    store.save(3, contents(3))  # trained again
    assert names(store) == ["step-2", "step-3"] and intact(store.latest(), 3)
    damage(store.folder / "step-3/model.safetensors")
    store.sound(fallback=True, say=said.append)
    assert (store.folder / "step-3.damaged-2").is_dir() and (store.folder / "step-3.damaged-1").is_dir()


def test_several_damaged_ones_are_set_aside_but_never_all(store, contents):
    """When none is whole nothing is renamed: the refusal must leave a folder that can be looked at."""
    store.keep = 3
    store.save(2, contents(2))
    store.save(3, contents(3))
    damage(store.folder / "step-2/state.json")
    (store.folder / "step-3" / RECORD).unlink()
    said = []
    assert store.sound(fallback=True, say=said.append).name == "step-1" and len(said) == 2
    assert names(store) == ["step-1"]
    damage(store.folder / "step-1/tokenizer/tokenizer.json")
    with pytest.raises(CheckpointError, match="tokenizer.json is damaged.*none that is whole: choose another name="):
        store.sound(fallback=True, say=said.append)
    assert names(store) == ["step-1"]


def test_save_where_half_a_checkpoint_lies_writes_a_whole_one(store, contents):
    """A folder that lost its record was taken for a finished save once, and LATEST pointed to it."""
    store.save(2, contents(2))
    (store.folder / "step-2" / RECORD).unlink()
    store.save(2, contents(2))
    assert intact(store.latest(), 2) and (store.folder / "LATEST").read_text() == "step-2"
    assert (store.folder / "step-2.damaged-1/model.safetensors").is_file()


def test_no_checkpoint_is_no_damage(tmp_path):
    assert CheckpointStore(tmp_path / "none").sound(fallback=False, say=None) is None
