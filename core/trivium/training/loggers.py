"""Where figures go: metrics.jsonl and metrics.csv always, TensorBoard and wandb when asked; all Lightning loggers."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger

from trivium.disk import read_lines, replace_file
from trivium.errors import CheckpointError, ConfigError
from trivium.schema import LoggerConfig

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


def build_loggers(config: LoggerConfig, folder: Path, name: str, first_step: int) -> list[Logger]:
    """The run's loggers, the files' first."""
    loggers: list[Logger] = [FileLogger(folder, first_step)]
    try:
        if config.tensorboard:
            loggers.append(TensorBoardLogger(str(folder), name="tensorboard", version=""))
        if config.wandb and config.wandb_mode != "disabled":
            loggers.append(
                WandbLogger(
                    name=name,
                    id=name.replace("/", "-"),
                    project=config.wandb_project,
                    save_dir=str(folder),
                    offline=config.wandb_mode == "offline",
                )
            )
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"this logger needs a package that is not installed: pip install 'trivium-llm[tensorboard]' ({error})"
        ) from error
    return loggers
