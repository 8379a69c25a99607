"""`launch.py trainer.devices=2`: real processes, started, stopped and killed as a person or a cluster would."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trivium.selftest.harness import Bench
from trivium.selftest.poison import salt_of

ROOT = Path(__file__).parents[2]
SLOW = 300
"""Seconds until a run counts as stuck: on busy cores the imports of two processes alone take a minute."""
ON_CPU = ("trainer.accelerator=cpu", "batch.micro_size=2")
TWO = (*ON_CPU, "trainer.devices=2")
FLAT = ("schedule=constant", "schedule.warmup=0.0", "validation.every_steps=6")
"""The rate of a step does not depend on how many there will be."""


def rows_of(run):
    path = run / "metrics.jsonl"
    text = path.read_text() if path.is_file() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def curve(run, tolerance=1e-5):
    """Each step's figures, to compare. fp32: sums in another order differ by 1e-7, and steps of AdamW let it grow."""
    names = ("step", "train/loss", "val/loss", "grad_norm", "tokens", "reward/margin", "rollout/reward")
    rows = rows_of(run)
    return pytest.approx([float(r[n]) for r in rows for n in names if n in r], rel=tolerance, abs=tolerance)


def flat(run):
    return curve(run).expected


def workers_of(launcher):
    """Process numbers of a launcher's workers, by rank."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                if parent == launcher and b"trivium.worker" in (folder / "cmdline").read_bytes():
                    facts = (folder / "environ").read_bytes().split(b"\0")
                    found[next(int(f[5:]) for f in facts if f.startswith(b"RANK="))] = int(folder.name)
            except (OSError, StopIteration):
                continue  # it has ended while it was looked at
    return [found[rank] for rank in sorted(found)]


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def gone(workers):
    """Wait until no worker is left: 5 s for the others to notice a death by themselves, and 5 for a busy machine."""
    deadline = time.monotonic() + 10
    while any(map(alive, workers)):
        assert time.monotonic() < deadline, "a process outlives the others"
        time.sleep(0.02)


def under_way(process, run, more=5):
    """Wait until a run that was just started is `more` steps on; returns its workers, both alive."""
    before, deadline = len(rows_of(run)), time.monotonic() + SLOW
    while len(rows_of(run)) < before + more:
        assert process.poll() is None, process.err
        assert time.monotonic() < deadline, f"step {before + more} was not reached"
        time.sleep(0.01)
    workers = workers_of(process.pid)
    assert len(workers) == 2 and all(map(alive, workers))
    return workers


def test_two_processes_continue_what_one_began_and_one_what_two_began(fork, pretraining, tmp_path):
    """12 steps: all by one process; 6 by two with FSDP2, saved beside, 6 by one; 6 by one, 6 by two
    that compute each block together. One curve."""
    half = (*FLAT, "trainer.max_steps=6", "checkpoint.every_steps=6")
    whole = (*FLAT, "trainer.max_steps=12", "checkpoint.every_steps=6")
    shared = ("trainer.devices=2", "trainer.strategy=fsdp")

    def run(name, *settings):
        return fork(*pretraining(tmp_path, name, *ON_CPU, "model.kv_heads=2", *settings))

    started = [
        run("one", *whole),
        run("from_two", *half, *shared, "checkpoint.async_save=true"),
        run("from_one", *half),
    ]
    assert [p.done(SLOW).returncode for p in started] == [0, 0, 0], started[1].err
    assert not started[1].err
    started = [run("from_two", *whole), run("from_one", *whole, *shared, "trainer.tensor_parallel=2")]
    assert [p.done(SLOW).returncode for p in started] == [0, 0], started[1].err
    assert len(rows_of(tmp_path / "one")) == 12 and rows_of(tmp_path / "one")[-1]["val/loss"] > 0
    assert flat(tmp_path / "from_two") == curve(tmp_path / "one")
    assert flat(tmp_path / "from_one") == curve(tmp_path / "one")
    assert "trained on 2 processes up to here, on 1 from here" in " ".join(started[0].out.split())
    facts = json.loads((tmp_path / "from_one" / "MANIFEST.json").read_text())
    assert facts["status"] == "done" and facts["tokens_seen"] == rows_of(tmp_path / "one")[-1]["tokens"]
    saved = tmp_path / "from_one" / "checkpoints" / "step-12"
    assert (saved / "model.safetensors").stat().st_size == (
        tmp_path / "one" / "checkpoints" / "step-12" / "model.safetensors"
    ).stat().st_size  # whole, for init_from and export


def test_signal_and_deaths(fork, pretraining, tmp_path):
    """SIGTERM to one worker: all stop after the same step, saved. One killed: the other ends, one sentence. The
    launcher killed: no worker is left."""
    long = (*FLAT[:2], *TWO, "trainer.max_steps=100000", "checkpoint.every_steps=50000")
    run = tmp_path / "long"
    first = fork(*pretraining(tmp_path, "long", *long))
    os.kill(under_way(first, run)[1], signal.SIGTERM)
    assert first.wait(timeout=SLOW) == 143, first.err
    steps = len(rows_of(run))
    assert [p.name for p in (run / "checkpoints").glob("step-*")] == [f"step-{steps}"]
    assert "stopped by signal 15" in (run / "log.txt").read_text() and not first.err
    assert json.loads((run / "MANIFEST.json").read_text())["status"] == "stopped"

    second = fork(*pretraining(tmp_path, "long", *long))
    workers = under_way(second, run)
    os.kill(workers[1], signal.SIGKILL)
    gone(workers)
    assert second.wait(timeout=SLOW) == 1
    assert second.err == "error: process 1 of 2 was killed by SIGKILL; the same command continues the run\n"
    assert rows_of(run)[steps]["step"] == steps + 1  # it had gone on from the save

    third = fork(*pretraining(tmp_path, "long", *long))
    workers = under_way(third, run)
    third.send_signal(signal.SIGKILL)
    gone(workers)


@pytest.mark.parametrize(
    "phase",
    [
        "preferring",
        pytest.param("distilling", marks=pytest.mark.slow),
        pytest.param("tuning", marks=pytest.mark.slow),
        pytest.param("judging", marks=pytest.mark.slow),
        pytest.param("rewarding", marks=pytest.mark.slow),
        pytest.param("rolling", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_phases_learn_the_same_on_two_processes(phase, strategy, fork, tmp_path, request):
    """Every phase, from caches that the first process fills. Without dropout, whose draws are a process's own."""
    if (phase, strategy) == ("rolling", "fsdp"):
        pytest.skip("refused, as test_refusals shows")
    settings = request.getfixturevalue(phase)
    plain = (*ON_CPU, "model.dropout=0.0") if phase == "tuning" else ON_CPU
    if phase in ("preferring", "judging", "rewarding", "rolling"):  # which take the tuned model's own dropout
        plain = (*plain, "model=llama", "model.dim=32", "model.layers=2", "model.heads=2", "model.kv_heads=1",
                 "model.ffn_dim=64", "model.context=256", "model.dropout=0.0")  # fmt: skip
    started = [
        fork(*settings(tmp_path, "two", *plain, "trainer.devices=2", f"trainer.strategy={strategy}")),
        fork(*settings(tmp_path, "one", *plain)),
    ]
    assert [p.done(SLOW).returncode for p in started] == [0, 0], started[0].err + started[1].err
    assert len(rows_of(tmp_path / "one")) == 6
    assert flat(tmp_path / "two") == curve(tmp_path / "one", 1e-4)


def test_error_of_all_processes_is_told_once(fork, pretraining, tmp_path):
    failed = fork(*pretraining(tmp_path, "x", *TWO, f"init_from={tmp_path / 'nowhere'}")).done(SLOW)
    assert failed.returncode == 1
    assert failed.err.count("error:") == 1 and "does not exist" in failed.err
    assert not (tmp_path / "x").exists()


def test_torchrun_runs_the_same_command(corpus, pretraining, cache, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "launch.py"]
    env = {**os.environ, "TRIVIUM_CACHE": str(cache), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    run = subprocess.run(
        [*command, *pretraining(tmp_path, "run", *TWO)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=SLOW
    )
    assert run.returncode == 0, run.stderr
    assert [r["step"] for r in rows_of(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    assert run.stdout.count("done: step 6") == 1


@pytest.mark.parametrize(
    "settings, said",
    [
        (("batch.micro_size=4",), "batch.size=4 must be a multiple of batch.micro_size=4 x 2 processes; set "
         "batch.micro_size=2"),
        (("trainer.nodes=2", "batch.micro_size=1"), "is more than this machine"),
        (("trainer.strategy=zero",), "is not one of auto, ddp, fsdp"),
        (("trainer.strategy=fsdp", "trainer.devices=1"), "shares weights among processes, and there is one"),
        (("trainer.tensor_parallel=2",), "trainer.tensor_parallel=2 needs trainer.strategy=fsdp (it is auto)"),
        (("trainer.strategy=fsdp", "trainer.tensor_parallel=3"), "and trainer.devices a multiple of it (it is 2)"),
        (("trainer.accelerator=mps",), "there is none here"),
    ],
)  # fmt: skip
def test_refusals(settings, said, main, pretraining, tmp_path):
    done = main(*pretraining(tmp_path, "x", *TWO, *settings))
    assert done.code == 2 and said in done.err and done.err.count("\n") == 1


def test_one_process_ignores_the_tasks_of_its_batch_script(fork, pretraining, tmp_path):
    """`python launch.py` without srun in a script that asks for two tasks; Lightning would refuse to start."""
    inside = {"SLURM_NTASKS": "2", "SLURM_JOB_NAME": "x", "SLURM_JOB_ID": "3", "SLURM_NODELIST": "a"}
    run = fork(*pretraining(tmp_path, "a"), environment=inside).done()
    assert run.returncode == 0, run.err


@pytest.mark.parametrize(
    "settings, said",
    [
        (("phase=pretrain",), "started 2 processes, the settings say trainer.devices=1 x trainer.nodes=1"),
        (("phase=tokenizer",), "phase=tokenizer runs in one process; start it without torchrun or srun"),
        (("pipeline=three_phases",), "run it once, without torchrun or srun"),
    ],
)
def test_launchers_that_disagree_with_the_settings_are_refused(settings, said, main, tmp_path, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    done = main(*settings, f"runs={tmp_path}")
    assert done.code == 2 and said in done.err


@pytest.mark.slow
def test_bad_step_of_one_process_takes_both_back(tmp_path):
    """NaN in the loss of some data, which one process meets: 30 steps are taken, and the same ones a second time."""
    bench = Bench(tmp_path)
    salt = f"objective.salt={salt_of(bench)[0]}"
    poisoned = ("objective=poisoned", "objective.value=nan", "objective.place=loss", salt, "guard.policy=rollback")
    two = ("trainer.devices=2", "trainer.accelerator=cpu", "trainer.max_steps=30", "checkpoint.every_steps=3")
    try:
        runs = [bench.place("r") for _ in range(2)]
        for run in runs:
            done = bench.fork(*bench.command("pretrain", run, *poisoned, *two)).done(SLOW)
            assert done.returncode == 0 and "; back to step-" in done.out, done.err
            assert [r["step"] for r in rows_of(run)] == list(range(1, 31))
        assert [r["train/loss"] for r in rows_of(runs[0])] == [r["train/loss"] for r in rows_of(runs[1])]
        assert all(3 < r["train/loss"] < 6 and "skipped" not in r for r in rows_of(runs[0]))
    finally:
        bench.close()


@pytest.mark.slow
def test_compiled_blocks_learn_the_same_on_two_processes(fork, pretraining, tmp_path):
    started = [
        fork(*pretraining(tmp_path, "one", *ON_CPU)),
        fork(*pretraining(tmp_path, "two", *TWO, "trainer.compile=true")),
    ]
    assert [p.done(SLOW).returncode for p in started] == [0, 0], started[1].err
    assert flat(tmp_path / "two") == curve(tmp_path / "one") and len(rows_of(tmp_path / "two")) == 6


FULL = """
import errno, os, threading, time
real = os.fsync
def full(descriptor):
    if threading.current_thread().name == "trivium-background":
        time.sleep(0.2)
        raise OSError(errno.ENOSPC, "No space left on device")
    real(descriptor)
if os.environ["RANK"] == "1":
    os.fsync = full
from trivium.worker import main
code = main()
os._exit(code)
"""


def test_save_that_fails_beside_training_is_told_by_the_process_that_knows_why(pretraining, cache, tmp_path):
    """The first process only hears that another could not save; the sentence has path and reason all the same."""
    (tmp_path / "full.py").write_text(FULL)
    start = (
        "import sys, trivium.training.processes as p; p.WORKER = 'full'; from trivium.cli import main; sys.exit(main())"
    )
    long = ("trainer.max_steps=3000", "checkpoint.every_steps=2", "checkpoint.async_save=true", "trainer.strategy=fsdp")
    paths = os.pathsep.join(map(str, (tmp_path, ROOT / "core", ROOT / "plugins")))
    run = subprocess.run(
        [sys.executable, "-c", start, *pretraining(tmp_path, "a", *TWO, *long)], cwd=ROOT, capture_output=True,
        text=True, env={**os.environ, "TRIVIUM_CACHE": str(cache), "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"},
        timeout=SLOW,
    )  # fmt: skip
    assert run.returncode == 1
    said = (
        rf"error: {tmp_path}/a/checkpoints/step-2.tmp-\d+/\w+.safetensors cannot be written: No space left on device\n"
    )
    assert re.fullmatch(said, run.stderr), run.stderr
    assert not list((tmp_path / "a/checkpoints").glob("step-*"))
