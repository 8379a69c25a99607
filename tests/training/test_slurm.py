"""A real Slurm of one machine: jobs submitted, run by srun, stopped before their time and continued."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "squeue")
pytest.importorskip("submitit")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        os.geteuid() != 0 or not all(map(shutil.which, TOOLS)),
        reason="SLURM IS NOT TESTED: it needs root and its programs (Debian: apt-get install slurm-wlm munge)",
    ),
]
CONF = """
ClusterName=here
SlurmctldHost={host}(127.0.0.1)
AuthInfo=socket={folder}/munge
SlurmUser=root
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus}
PartitionName=all Nodes=ALL Default=YES State=UP
"""
TWO = ("trainer.accelerator=cpu", "trainer.devices=2", "batch.micro_size=2")
SUBMIT = ("launcher.kind=slurm", "launcher.minutes=10", "launcher.cpus=1")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory, cache):
    """The environment of a shell on a cluster of this machine."""
    if (os.cpu_count() or 1) < 2:
        pytest.skip("SLURM IS NOT TESTED: two tasks need two cores")
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("state", "spool"):
        (folder / name).mkdir()
    (folder / "key").write_bytes(os.urandom(1024))
    (folder / "key").chmod(0o600)
    with socket.socket() as one, socket.socket() as other:
        ports = [s.bind(("127.0.0.1", 0)) or s.getsockname()[1] for s in (one, other)]
    facts = {"host": socket.gethostname().split(".")[0], "folder": folder, "ports": ports, "cpus": os.cpu_count()}
    (folder / "slurm.conf").write_text(CONF.format(**facts))
    own = {"SLURM_CONF": str(folder / "slurm.conf"), "TRIVIUM_CACHE": str(cache), "GLOO_SOCKET_IFNAME": "lo"}
    environment = {**os.environ, **own, "OMP_NUM_THREADS": "1"}
    names = {"key-file": "key", "socket": "munge", "pid-file": "munged.pid", "seed-file": "seed", "log-file": "log"}
    munged = ["munged", "--foreground", "--force", *(f"--{k}={folder / v}" for k, v in names.items())]
    started = []
    try:
        for command in (munged, ["slurmctld", "-D", "-c"], ["slurmd", "-D"]):
            with open(folder / f"{command[0]}.out", "w") as said:
                started.append(subprocess.Popen(command, env=environment, stdout=said, stderr=said))
            time.sleep(2)
        deadline = time.monotonic() + 60
        while "idle" not in subprocess.run(["sinfo"], env=environment, capture_output=True, text=True).stdout:
            assert time.monotonic() < deadline, (folder / "slurmctld.out").read_text()[-2000:]
            time.sleep(0.5)
        yield environment
    finally:
        for process in reversed(started):
            process.terminate()
            process.wait(timeout=30)


def launched(environment, *args, by=()):
    command = [*by, sys.executable, "launch.py", *map(str, args)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def losses(run):
    path = run / "metrics.jsonl"
    return [json.loads(line)["train/loss"] for line in path.read_text().splitlines()] if path.is_file() else []


def test_job_and_srun_train_what_one_command_trains(slurm, fork, pretraining, tmp_path):
    job = launched(slurm, *pretraining(tmp_path, "job", *TWO, *SUBMIT, "launcher.wait=true"))
    assert job.returncode == 0 and re.search(r"job \d+: 2 processes", job.stdout), job.stdout + job.stderr
    srun = launched(slurm, *pretraining(tmp_path, "srun", *TWO), by=("srun", "--ntasks=2"))
    assert srun.returncode == 0 and srun.stdout.count("done: step 6") == 1, srun.stdout + srun.stderr
    assert fork(*pretraining(tmp_path, "here", *TWO[::2])).done().returncode == 0
    assert len(losses(tmp_path / "job")) == 6
    assert losses(tmp_path / "job") == losses(tmp_path / "srun")
    assert losses(tmp_path / "job") == pytest.approx(losses(tmp_path / "here"), rel=1e-5)


def test_job_that_is_told_to_stop_saves_and_the_next_continues(slurm, pretraining, tmp_path):
    """USR1 before the time limit: every step done is in a checkpoint; the same command goes on from it."""
    long = ("trainer.max_steps=100000", "schedule=constant", "schedule.warmup=0", "checkpoint.every_steps=50000")
    run, before = tmp_path / "long", 0
    for _ in range(2):
        submitted = launched(slurm, *pretraining(tmp_path, "long", *TWO, *SUBMIT, *long))
        assert submitted.returncode == 0, submitted.stderr
        job = re.search(r"job (\d+)", submitted.stdout)[1]
        deadline = time.monotonic() + 120
        while len(losses(run)) < before + 5:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        subprocess.run(["scancel", f"--signal={signal.SIGUSR1}", job], env=slurm, check=True)
        while subprocess.run(["squeue", "-h"], env=slurm, capture_output=True, text=True).stdout.strip():
            assert time.monotonic() < deadline
            time.sleep(0.2)
        said = (run / f"jobs/{job}_0_log.out").read_text()
        assert (f"continues from {run}/checkpoints/step-{before}" in said.replace("\n", "")) == (before > 0), said
        assert len(losses(run)) > before
        before = len(losses(run))
        assert (run / f"checkpoints/step-{before}").is_dir()
        assert f"stopped by signal 10 after step {before}, saved" in said
