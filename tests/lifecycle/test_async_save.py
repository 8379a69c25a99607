"""Real runs that save beside training: the same checkpoints as those that wait, whatever comes in between."""

import hashlib
import json
import re
import signal
import subprocess
import time

import pytest

STEPS = 60
SETTINGS = (
    *(f"trainer.max_steps={STEPS}", "checkpoint.every_steps=7", "model.dropout=0.1"),
    *("validation.every_steps=10", "checkpoint.keep_best=val/loss", "checkpoint.keep=3"),
)
ASYNC = "checkpoint.async_save=true"
SLOW_DISK = """
import os, time
real = os.fsync
def fsync(descriptor):
    if ".tmp-" in os.readlink(f"/proc/self/fd/{descriptor}"):
        time.sleep(0.1)
    real(descriptor)
os.fsync = fsync
"""
"""A save syncs about ten files and folders: on this disk it takes a second, a step a hundredth of that."""


def rows_of(run):
    path = run / "metrics.jsonl"
    text = path.read_text() if path.is_file() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def curve(run):
    return [(r["step"], *(float(r.get(n, 0.0)).hex() for n in ("train/loss", "val/loss"))) for r in rows_of(run)]


def kept(run):
    """The checkpoints, BEST, LATEST and a hash of each checkpoint's weights and optimizer state."""
    folder = run / "checkpoints"
    assert not list(folder.glob("*.tmp-*"))
    found = {name: (folder / name).read_text() for name in ("BEST", "LATEST")}
    for path in folder.glob("step-*"):
        data = b"".join((path / n).read_bytes() for n in ("model.safetensors", "optimizer.safetensors"))
        found[path.name] = hashlib.sha256(data).hexdigest()
    return found


@pytest.fixture
def slow_disk(tmp_path):
    """A folder for PYTHONPATH that makes syncing a file of a checkpoint slow."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(SLOW_DISK)
    return tmp_path / "site"


@pytest.fixture(scope="module")
def waiting(fork, pretraining, tmp_path_factory):
    """The same run with saves that training waits for."""
    runs = tmp_path_factory.mktemp("waiting")
    done = fork(*pretraining(runs, "a", *SETTINGS)).done(timeout=500)
    assert done.returncode == 0, done.err
    return runs / "a"


def in_the_midst_of_a_save(process, run, after):
    """Wait until training has gone on by three steps since a save began that is still under way; returns its step."""
    deadline = time.monotonic() + 300
    while True:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        under_way = [int(re.match(r"step-(\d+)", p.name)[1]) for p in run.glob("checkpoints/step-*.tmp-*")]
        rows = rows_of(run)
        if under_way and max(under_way) >= after and rows and rows[-1]["step"] >= max(under_way) + 3:
            return max(under_way)
        time.sleep(0.001)


def test_async_run_keeps_what_a_waiting_run_keeps(fork, pretraining, waiting, tmp_path):
    """Losses, each kept checkpoint's every bit, the best and the newest."""
    done = fork(*pretraining(tmp_path, "a", *SETTINGS, ASYNC)).done(timeout=500)
    assert done.returncode == 0, done.err
    assert curve(tmp_path / "a") == curve(waiting) and len(curve(waiting)) == STEPS
    assert kept(tmp_path / "a") == kept(waiting)


def test_killed_in_the_midst_of_an_async_save_continues_from_the_one_before(
    spawn, fork, pretraining, waiting, slow_disk, tmp_path
):
    """Training is three steps further, the save half done: the checkpoint before it stands, and nothing is lost."""
    run, overrides = tmp_path / "a", pretraining(tmp_path, "a", *SETTINGS, ASYNC)
    process = spawn(*overrides, path=[slow_disk])
    under_way = in_the_midst_of_a_save(process, run, after=14)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=10)
    assert process.returncode == -signal.SIGKILL
    assert (
        list(run.glob(f"checkpoints/step-{under_way}.tmp-*")) and not (run / f"checkpoints/step-{under_way}").exists()
    )
    before = max(int(p.name[5:]) for p in run.glob("checkpoints/step-*") if "tmp" not in p.name)
    assert before < under_way
    rest = fork(*overrides).done(timeout=500)
    assert rest.returncode == 0, rest.err
    assert f"continues from {run}/checkpoints/step-{before}" in rest.out.replace("\n", "")
    assert curve(run) == curve(waiting) and kept(run) == kept(waiting)


def test_signal_waits_for_the_save_under_way_and_for_its_own(spawn, fork, pretraining, waiting, slow_disk, tmp_path):
    """SIGTERM three steps into a save: both saves are whole before the process ends with 143."""
    run, overrides = tmp_path / "a", pretraining(tmp_path, "a", *SETTINGS, ASYNC)
    process = spawn(*overrides, path=[slow_disk])
    under_way = in_the_midst_of_a_save(process, run, after=7)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 143 and not err
    reached = rows_of(run)[-1]["step"]
    assert f"stopped by signal 15 after step {reached}, saved" in out and reached >= under_way + 3
    assert {f"step-{under_way}", f"step-{reached}"} <= kept(run).keys()
    rest = fork(*overrides).done(timeout=500)
    assert rest.returncode == 0 and f"step-{reached}" in rest.out.replace("\n", ""), rest.err
    assert curve(run) == curve(waiting)
    assert kept(run)[f"step-{STEPS}"] == kept(waiting)[f"step-{STEPS}"]


def test_second_signal_ends_at_once_in_the_midst_of_a_save(spawn, pretraining, slow_disk, tmp_path):
    run = tmp_path / "a"
    process = spawn(*pretraining(tmp_path, "a", *SETTINGS, ASYNC), path=[slow_disk])
    in_the_midst_of_a_save(process, run, after=7)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=10)
    assert process.returncode == 1 and time.monotonic() - began < 1  # 143 is for a clean save
    assert list(run.glob("checkpoints/*.tmp-*")), "it was in the midst"


def test_full_disk_met_by_the_thread_ends_the_run_with_one_sentence(spawn, pretraining, tmp_path):
    """A file system of 1.5 MB: what the thread meets is told at the next step, and the older checkpoint is whole."""
    place = tmp_path / "small"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1500k", "none", place], capture_output=True).returncode:
        pytest.skip("mounting needs root")
    settings = ("checkpoint.keep=9", "checkpoint.every_steps=1", "trainer.max_steps=30", ASYNC)
    try:
        process = spawn(*pretraining(place, "a", *settings))
        out, err = process.communicate(timeout=300)
        assert process.returncode == 1
        assert re.fullmatch(rf"error: {place}/\S+ \([\d,]+ bytes\) cannot be \w+: No space left on device\n", err), err
        complete = sorted(int(p.name[5:]) for p in place.glob("a/checkpoints/step-*"))
        assert complete and complete[-1] < 30
        subprocess.run(["mount", "-o", "remount,size=60m", place], check=True)
        again = spawn(*pretraining(place, "a", *settings))
        out, err = again.communicate(timeout=300)
        assert again.returncode == 0, err
        assert f"continues from {place}/a/checkpoints/step-{complete[-1]}" in out.replace("\n", "")
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def test_damaged_newest_checkpoint_is_set_aside_if_so_set(main, pretraining, waiting, tmp_path):
    """Refused with the way out; with it, a warning that names the file, and the unbroken run's curve."""
    run, overrides = tmp_path / "a", pretraining(tmp_path, "a", *SETTINGS)
    assert main(*[o for o in overrides if "max_steps" not in o], "trainer.max_steps=21").code == 0
    path = run / "checkpoints/step-21/model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 128
    path.write_bytes(data)
    refused = main(*overrides)
    assert refused.code == 1 and "Traceback" not in refused.err
    said = f"{path} is damaged: its bytes are not those that were saved"
    assert said in refused.err and refused.err.count("\n") == 1
    assert "checkpoint.fallback=true sets the damaged aside and continues from step-20" in refused.err
    done = main(*overrides, "checkpoint.fallback=true")
    assert done.code == 0, done.err
    told = " ".join(done.out.split())
    assert "warning: " in told and "set aside as step-21.damaged-1, continues from step-20" in told
    assert str(path) in done.out.replace("\n", "")
    assert (run / "checkpoints/step-21.damaged-1/model.safetensors").read_bytes() == bytes(data)
    assert [r["step"] for r in rows_of(run)] == list(range(1, STEPS + 1))
