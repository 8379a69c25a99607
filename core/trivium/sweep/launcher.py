"""One clean process for each job of a sweep (`-m`): a crash harms one job, and a job is the command one would type."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from trivium.disk import make_folder
from trivium.errors import TrainingError

RANKS = ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "WORLD_SIZE", "NODE_RANK")
"""What a surrounding launcher set for its own ranks; a job that saw them would take itself for one of those."""


@dataclass
class ProcessConfig:
    """Settings of `hydra/launcher=process`."""

    _target_: str = "hydra_plugins.trivium.ProcessLauncher"
    n_jobs: int = 1  # jobs at once; each takes the memory of a whole run


ConfigStore.instance().store(group="hydra/launcher", name="process", node=ProcessConfig, provider="trivium")


class ProcessLauncher(Launcher):
    """Runs jobs as processes; job N has the run folder SWEEP/N, so rerunning a sweep continues it."""

    def __init__(self, n_jobs: int = 1) -> None:
        self.n_jobs = n_jobs

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.config = config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        folder = Path(self.config.hydra.sweep.dir)
        with ThreadPoolExecutor(self.n_jobs) as pool:
            jobs = [pool.submit(self._run, folder, initial_job_idx + i, list(o)) for i, o in enumerate(job_overrides)]
        return [job.result() for job in jobs]

    def _run(self, folder: Path, number: int, overrides: list[str]) -> JobReturn:
        own = [o for o in overrides if not o.startswith(("name=", "hydra", "~hydra", "+hydra"))]
        place = make_folder(folder / str(number))
        environment = {k: v for k, v in os.environ.items() if k not in RANKS}
        command = [sys.executable, os.path.abspath(sys.argv[0]), *own, f"name={folder.name}/{number}"]
        with open(place / "console.log", "ab") as log:
            code = subprocess.run(
                command, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False
            ).returncode
        print(f"job {number}  {' '.join(own)}  {'done' if code == 0 else f'FAILED with {code}'}  {place}", flush=True)
        result = JobReturn(overrides=own, working_dir=str(place))
        result.status = JobStatus.COMPLETED if code == 0 else JobStatus.FAILED
        result.return_value = (
            place if code == 0 else TrainingError(f"job {number} exited with {code}; see {place}/console.log")
        )
        return result
