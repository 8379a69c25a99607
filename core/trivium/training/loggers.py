"""Where figures go: metrics.jsonl and metrics.csv always, TensorBoard and wandb when asked; all Lightning loggers.

The files are the run's own: it stops when they cannot be written. The others never stop a run.
"""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO

from lightning.pytorch.loggers import Logger, TensorBoardLogger

from trivium.disk import read_lines, replace_file
from trivium.errors import CheckpointError, ConfigError
from trivium.lineage.manifest import masked
from trivium.schema import LoggerConfig

FOLLOWER = Path(__file__).with_name("wandb_follower.py")
FINISH_SECONDS = 10.0
"""How long a run's end waits for wandb; what is left to send is sent while the run is over."""
COLUMNS = ("step", "train/loss", "val/loss", "lr", "grad_norm", "tokens", "tokens_per_second", "step_seconds")


class FileLogger(Logger):
    """One JSON object and one CSV row a step, on disk when the step is done."""

    def __init__(self, folder: Path, first_step: int) -> None:
        super().__init__()
        self.json_path, self.csv_path = folder / "metrics.jsonl", folder / "metrics.csv"
        kept = [row for row in read_lines(self.json_path) if row["step"] <= first_step]
        replace_file(self.json_path, "".join(json.dumps(row) + "\n" for row in kept).encode())
        replace_file(self.csv_path, (",".join(COLUMNS) + "\n" + "".join(map(self._row, kept))).encode())
        self._json, self._csv = open(self.json_path, "a"), open(self.csv_path, "a")

    @property
    def name(self) -> str:
        return "files"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """The run's config.yaml has them."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self._write(self._json, self.json_path, json.dumps(metrics) + "\n")
        self._write(self._csv, self.csv_path, self._row(metrics))

    def finalize(self, status: str) -> None:
        for file in (self._json, self._csv):
            with suppress(OSError):  # what a full disk did not take was told when it was written
                file.close()

    @staticmethod
    def _write(file: TextIO, path: Path, line: str) -> None:
        try:
            file.write(line)
            file.flush()
        except OSError as error:
            raise CheckpointError(f"{path} ({len(line):,} bytes) cannot be written: {error.strerror}") from error

    @staticmethod
    def _row(metrics: Mapping[str, float]) -> str:
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerow([metrics.get(c, "") for c in COLUMNS])
        return out.getvalue()


class SideLogger(Logger):
    """A logger that cannot stop training: what it raises is said once, and it is told no more.

    make: opens the logger. warn: told in one sentence what went wrong. Only a package that is missing is raised.
    """

    def __init__(self, name: str, make: Callable[[], Logger], warn: Callable[[str], None]) -> None:
        super().__init__()
        self._name, self._warn = name, warn
        self._logger: Logger | None = None
        self._try(lambda: setattr(self, "_logger", make()))

    @property
    def name(self) -> str:
        return self._name

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """The run's config.yaml has them, and there secrets are masked."""

    def log_metrics(self, metrics: Mapping[str, float | None], step: int | None = None) -> None:
        known = {key: value for key, value in metrics.items() if value is not None}  # TensorBoard refuses None
        self._try(lambda: self._logger and self._logger.log_metrics(known, step))

    def finalize(self, status: str) -> None:
        self._try(lambda: self._logger and self._logger.finalize(status))

    def _try(self, act: Callable[[], object]) -> None:
        try:
            act()
        except ModuleNotFoundError:
            raise
        except Exception as error:
            self._logger = None
            said = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            self._warn(f"{self._name} is left out from here on, training goes on: {masked(said)}")


class Wandb(Logger):
    """Starts the process that hands metrics.jsonl to wandb (wandb_follower.py), and looks now and then how it does."""

    def __init__(self, config: LoggerConfig, folder: Path, name: str, first_step: int, warn: Callable[[str], None]):
        super().__init__()
        if find_spec("wandb") is None:
            raise ModuleNotFoundError("No module named 'wandb'")
        self._kept, self._warn = folder / "wandb", warn
        about = [folder, name, config.wandb_project, config.wandb_mode, first_step, os.getpid()]
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(FOLLOWER), *map(str, about)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is the run's, which then ends it
        )
        assert self._process.stdout
        os.set_blocking(self._process.stdout.fileno(), False)

    @property
    def name(self) -> str:
        return "wandb"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """The process takes them from the manifest."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """The rows reach it by metrics.jsonl. Raises ConnectionError when the process is no more."""
        self._pass_on()
        if self._process.poll() is not None:
            raise ConnectionError(f"its process ended with code {self._process.returncode}")

    def finalize(self, status: str) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(FINISH_SECONDS)
        self._pass_on()
        if self._process.poll() is None:
            self._warn(f"wandb is not done; it goes on for a minute at most, and `wandb sync` sends {self._kept} later")
        elif self._process.returncode:
            raise ConnectionError(f"its process ended with code {self._process.returncode}")

    def _pass_on(self) -> None:
        """What the process says is why it is not online."""
        assert self._process.stdout
        for line in (self._process.stdout.read() or b"").decode().splitlines():
            self._warn(
                f"wandb: {masked(line.strip())}; the figures are kept in {self._kept}, `wandb sync` sends them later"
            )


def build_loggers(
    config: LoggerConfig, folder: Path, name: str, first_step: int, warn: Callable[[str], None] = print
) -> list[Logger]:
    """The run's loggers, the files' first: theirs is the only failure that stops a run. warn: told of the others'."""
    loggers: list[Logger] = [FileLogger(folder, first_step)]
    try:
        if config.tensorboard:
            loggers.append(SideLogger("TensorBoard", lambda: _tensorboard(folder), warn))
        if config.wandb and config.wandb_mode != "disabled":
            loggers.append(SideLogger("wandb", lambda: Wandb(config, folder, name, first_step, warn), warn))
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"this logger needs a package that is not installed: pip install 'trivium-llm[tensorboard]' ({error})"
        ) from error
    return loggers


def _tensorboard(folder: Path) -> Logger:
    logger = TensorBoardLogger(str(folder), name="tensorboard", version="")
    _ = logger.experiment  # opened now: what it refuses is known before the first step
    return logger
