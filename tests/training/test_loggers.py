"""Figures reach every logger that was asked for, and a resume leaves neither doubled nor half lines."""

import csv
import json

import pytest

from trivium.errors import ConfigError
from trivium.schema import LoggerConfig
from trivium.training.loggers import FileLogger, build_loggers


def test_file_logger_drops_what_lies_behind_the_resumed_step(tmp_path):
    """Steps 1-4 were written, 4 only by half; the checkpoint is of step 2, so 3 is trained again."""
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": s, "train/loss": s / 4}) + "\n" for s in (1, 2, 3)) + '{"step": 4, "tr')
    logger = FileLogger(tmp_path, first_step=2)
    logger.log_metrics({"step": 3, "train/loss": 9.5, "val/loss": 2.0})
    logger.finalize("success")
    assert [json.loads(line)["train/loss"] for line in path.read_text().splitlines()] == [0.25, 0.5, 9.5]
    rows = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    assert [(r["step"], r["train/loss"], r["val/loss"]) for r in rows] == [
        ("1", "0.25", ""), ("2", "0.5", ""), ("3", "9.5", "2.0"),
    ]  # fmt: skip


def test_tensorboard_and_wandb_get_the_same_losses(launch, pretraining, tmp_path):
    """wandb works offline, without an account; TensorBoard's events hold what metrics.jsonl holds."""
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = launch(*pretraining(tmp_path, "logged", "logger=wandb", "logger.tensorboard=true"))
    assert run.returncode == 0, run.stderr
    folder = tmp_path / "logged"
    losses = [json.loads(line)["train/loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    events = event_accumulator.EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    assert [e.value for e in events.Scalars("train/loss")] == pytest.approx(losses, rel=1e-6)
    assert list(folder.glob("wandb/offline-run-*/run-*.wandb"))


def test_missing_logger_package_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("trivium.training.loggers.TensorBoardLogger", _absent)
    with pytest.raises(ConfigError, match=r"pip install 'trivium-llm\[tensorboard\]'"):
        build_loggers(LoggerConfig(tensorboard=True), tmp_path, "name", 0)


def _absent(*_args, **_kwargs):
    raise ModuleNotFoundError("No module named 'tensorboard'")
