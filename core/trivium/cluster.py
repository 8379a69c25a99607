"""Hands a training run to Slurm, through submitit: one task a device, each of which joins the others.

What is submitted is the path of a file with the composed settings (readable by its owner alone, inside the run's
folder), so a job on many machines composes nothing again. `launcher.kind=local` has submitit start the same tasks on
this machine. Two minutes before the time limit Slurm sends SIGUSR1, which is a clean save; the same command, submitted
again, continues the run.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from trivium.compose import as_dict, config_of
from trivium.disk import make_folder, write_file
from trivium.errors import ConfigError, TriviumError
from trivium.phases.start import run
from trivium.plugin import discover, local_plugins, register_local
from trivium.registry import load
from trivium.schema import TRAINING_PHASES, RunConfig

SIGNAL = "USR1"


@dataclass(frozen=True)
class Task:
    """One process of the job. order: path of the settings."""

    order: str

    def __call__(self) -> int:
        load("submitit.helpers:TorchDistributedEnvironment")().export(set_cuda_visible_devices=False, overwrite=True)
        order = json.loads(Path(self.order).read_text())
        register_local(order["plugins"])
        discover()
        try:
            return run(config_of(order["config"]), Console(soft_wrap=True))
        except TriviumError as error:
            print(f"error: {error}", file=sys.stderr)
            return error.exit_code


def submit(config: RunConfig, console: Console) -> int:
    """Submit a run; returns 0 once it is queued, or its exit code where launcher.wait=true."""
    if config.phase not in TRAINING_PHASES or config.pipeline.stages:
        raise ConfigError(f"launcher.kind={config.launcher.kind} is for one phase that trains; run the others here")
    submitit = _submitit(config.launcher.kind)
    if config.launcher.kind == "slurm" and shutil.which("sbatch") is None:
        raise ConfigError("launcher.kind=slurm: there is no sbatch on this machine; submit from a login node")
    folder = make_folder(Path(config.runs) / (config.name or f"{config.phase}-{config.domain}") / "jobs").absolute()
    order = folder / f"order-{os.getpid()}.json"
    write_file(order, b"")
    order.chmod(0o600)
    content = {"config": as_dict(config), "plugins": local_plugins()}
    write_file(order, json.dumps(content).encode())
    os.environ["SUBMITIT_PREEMPT_SIGNAL"] = SIGNAL
    os.environ["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)  # a bare clone has no other way to be found
    executor = submitit.AutoExecutor(folder, cluster=config.launcher.kind)
    submitit.JobEnvironment.USR_SIG = SIGNAL  # read from the environment at import
    executor.update_parameters(**parameters(config))
    job = executor.submit(Task(str(order)))
    console.print(f"job {job.job_id}: {config.trainer.processes} processes; output in {folder}", highlight=False)
    if not config.launcher.wait:
        return 0
    try:
        return max(job.results())
    except Exception as error:  # submitit raises what the task raised, or that it was killed
        raise TriviumError(f"job {job.job_id} failed; see {job.paths.stderr}") from error


def _submitit(kind: str) -> Any:
    """Imported where it is needed only: it sets up logging anew when it is, which closes the handlers of others."""
    try:
        return importlib.import_module("submitit")
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"launcher.kind={kind} needs a package that is not installed: pip install 'trivium-llm[slurm]'"
        ) from error


def parameters(config: RunConfig) -> dict[str, Any]:
    """What submitit is asked for."""
    launcher, trainer = config.launcher, config.trainer
    wanted: dict[str, Any] = {
        "name": (config.name or config.phase).replace("/", "-"),
        "nodes": trainer.nodes,
        "tasks_per_node": trainer.devices,
        "cpus_per_task": launcher.cpus,
        "timeout_min": launcher.minutes,
    }
    if trainer.accelerator != "cpu":
        wanted["gpus_per_node"] = trainer.devices
    if launcher.memory:
        wanted["mem_gb"] = launcher.memory
    if launcher.kind == "slurm":
        wanted["slurm_signal_delay_s"] = launcher.grace
        wanted["slurm_setup"] = list(launcher.setup)
        for name in ("partition", "account", "qos", "constraint"):
            if getattr(launcher, name):
                wanted[f"slurm_{name}"] = getattr(launcher, name)
    return wanted
