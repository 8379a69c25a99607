"""Jobs for a cluster: what Slurm is asked for, and the same tasks as real processes of submitit's local executor."""

import json
import os
import stat
import subprocess
import sys

import pytest

submitit = pytest.importorskip("submitit")

SBATCH = """#!/bin/sh
cp "$1" "$RECORD"
echo Submitted batch job 42
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A machine with sbatch and srun, the first of which keeps the script that it is given."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("sbatch", "srun"):
        (tools / name).write_text(SBATCH)
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tools), prepend=os.pathsep)
    monkeypatch.setenv("RECORD", str(tmp_path / "script"))
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))  # set by submit(); put back afterwards
    monkeypatch.setenv("SUBMITIT_PREEMPT_SIGNAL", "USR1")
    return tmp_path / "script"


def test_job_that_slurm_gets(slurm, main, tmp_path):
    asked = ("launcher.kind=slurm", "launcher.partition=gpu", "launcher.minutes=90", "launcher.cpus=6",
             "launcher.memory=64", "launcher.account=lab", "launcher.setup=['module load cuda']")  # fmt: skip
    sizes = ("trainer.devices=8", "trainer.nodes=2", "batch.size=256", "batch.micro_size=16", "model=primer")
    done = main("phase=pretrain", f"runs={tmp_path}", "name=wide", *sizes, *asked)
    assert done.code == 0 and "job 42: 16 processes" in done.out, done.err
    lines = slurm.read_text().splitlines()
    for wanted in ("--nodes=2", "--ntasks-per-node=8", "--cpus-per-task=6", "--time=90", "--mem=64GB",
                   "--partition=gpu", "--account=lab", "--job-name=wide", "--signal=USR1@120"):  # fmt: skip
        assert f"#SBATCH {wanted}" in lines, (wanted, lines)
    assert any(line in lines for line in ("#SBATCH --gpus-per-node=8", "#SBATCH --gres=gpu:8"))
    assert "module load cuda" in lines
    (order,) = (tmp_path / "wide" / "jobs").glob("order-*.json")
    assert stat.S_IMODE(order.stat().st_mode) == 0o600
    assert json.loads(order.read_text())["config"]["trainer"]["nodes"] == 2


def test_local_job_trains_on_two_processes(fork, pretraining, tmp_path):
    two = ("trainer.accelerator=cpu", "trainer.devices=2", "batch.micro_size=2")
    local = ("launcher.kind=local", "launcher.wait=true")
    started = [fork(*pretraining(tmp_path, "job", *two, *local)), fork(*pretraining(tmp_path, "here", *two[::2]))]
    assert [p.done(300).returncode for p in started] == [0, 0], started[0].err
    job, here = (
        [json.loads(line)["train/loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("job", "here")
    )
    assert len(job) == 6 and job == pytest.approx(here, rel=1e-5)
    facts = json.loads((tmp_path / "job" / "MANIFEST.json").read_text())
    assert facts["status"] == "done"


def test_refusals(main, tmp_path, monkeypatch):
    said = main("phase=chat", "init_from=x", "launcher.kind=slurm", f"runs={tmp_path}")
    assert said.code == 2 and "is for one phase that trains" in said.err
    monkeypatch.setenv("PATH", "/nowhere")
    said = main("phase=pretrain", "model=primer", "launcher.kind=slurm", f"runs={tmp_path}")
    assert said.code == 2 and "there is no sbatch on this machine" in said.err


def test_a_run_that_asks_for_no_cluster_leaves_logging_alone():
    """submitit sets up logging anew when it is imported, and closes what others have set up."""
    said = subprocess.run(
        [sys.executable, "-c", "import sys, trivium.pipeline; print('submitit' in sys.modules)"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert said.stdout == "False\n", said.stderr
