"""Where a step's time goes, and what a rate is of: against clocks of the tests' own, with delays of known length."""

import time

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import Logger
from rich.console import Console
from torch.utils.data import DataLoader, Dataset

from trivium.models.config import LlamaConfig
from trivium.models.llama import Llama
from trivium.objectives.config import NextTokenConfig
from trivium.objectives.next_token import NextToken
from trivium.training.background import Background
from trivium.training.callbacks import Record, Sample, Save, Show, Validate
from trivium.training.objective_module import ObjectiveModule, StepSettings
from trivium.training.stop import SignalWatch, StopController
from trivium.types import TokenBatch

STEPS, ROWS, LENGTH, REAL = 10, 8, 64, 40
LOAD, LOG, ASIDE = 0.03, 0.01, 0.08
"""Seconds that reading a step's data, logging its figures, and each of validating, sampling and saving take."""


def batch():
    """Rows of 64 tokens, the last 24 of them padding."""
    tokens = torch.arange(ROWS * LENGTH).view(ROWS, LENGTH) % 61
    positions = torch.arange(LENGTH).expand(ROWS, -1)
    real = positions < REAL
    return TokenBatch(tokens, torch.where(real & (positions > 0), tokens, -100), positions, real.long())


class Slow(Dataset):
    """Each step's data take LOAD seconds."""

    def __len__(self):
        return STEPS

    def __getitem__(self, index):
        time.sleep(LOAD)
        return [batch(), batch()]


class Clock(L.Callback):
    """From before the first step's data to after the last step."""

    def on_train_epoch_start(self, trainer, pl_module):
        self.began = time.perf_counter()

    def on_train_epoch_end(self, trainer, pl_module):
        self.seconds = time.perf_counter() - self.began


class Rows(Logger):
    """Keeps every row; takes LOG seconds for each."""

    name, version = "rows", ""

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_hyperparams(self, *_, **__):
        pass

    def log_metrics(self, metrics, step=None):
        time.sleep(LOG)
        self.rows.append(metrics)


class SlowlyValidated(ObjectiveModule):
    def validation_loss(self, batches):
        time.sleep(ASIDE)
        return 1.0


@pytest.fixture(scope="module")
def timed(tmp_path_factory):
    """(seconds of the whole loop, seconds spent aside, rows): 10 steps, 5 validations, 5 samplings, 6 saves."""
    spent = []

    def linger(*_):
        spent.append(ASIDE)
        time.sleep(ASIDE)
        return [{"prompt": "a", "completion": "b"}]

    model = Llama(LlamaConfig(dim=64, layers=2, heads=2, kv_heads=1, ffn_dim=128, context=LENGTH), 61)
    model.init_weights(seed=0)
    settings = StepSettings(grad_clip=1.0, seed=0)
    module = SlowlyValidated(
        model, NextToken(NextTokenConfig()), lambda m: torch.optim.AdamW(m.parameters()), lambda _: 1.0, settings
    )
    console, clock, logger = Console(quiet=True), Clock(), Rows()
    record = Record([logger], Show(console, STEPS))
    folder = tmp_path_factory.mktemp("timed")
    callbacks = [
        clock,
        Validate([], 2, STEPS, StopController()),
        Sample(folder / "samples.jsonl", 2, linger, 0, console),
        record,
        Save(linger, record, 2, STEPS, None, SignalWatch(0.0), Background()),
    ]
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=callbacks,
    )  # fmt: skip
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    slept = []
    with pytest.MonkeyPatch.context() as patch:  # a clock that other processes do not move: what is computed and slept
        patch.setattr(time, "sleep", slept.append)
        patch.setattr(time, "perf_counter", lambda: time.process_time() + sum(slept))
        trainer.fit(module, DataLoader(Slow(), batch_size=None))
    torch.set_num_threads(before)
    assert len(spent) == 10
    return clock.seconds, sum(spent) + 5 * ASIDE, logger.rows


def test_steps_take_the_loop_s_time_but_what_is_aside(timed):
    """Every second of the loop is one step's, or validation's, sampling's or a save's: 1.2 s of these 2.2 s or so.

    What is left after the last step is to log the last two rows, which no row can hold. The tolerance: 2 %, and 10 ms
    since sleeping takes longer than asked on a busy machine.
    """
    whole, aside, rows = timed
    assert len(rows) == STEPS
    assert sum(r["step_seconds"] for r in rows) == pytest.approx(whole - aside - 2 * LOG, rel=0.02, abs=0.01)


def test_split_is_the_whole_step(timed):
    for row in timed[2]:
        parts = {name: value for name, value in row.items() if name.startswith("time/")}
        assert parts.keys() == {"time/data", "time/forward", "time/backward", "time/optimizer", "time/other"}
        assert sum(parts.values()) == pytest.approx(row["step_seconds"], rel=1e-9)


def test_slow_data_is_seen_as_data_from_the_first_step_on(timed):
    for row in timed[2]:
        assert LOAD <= row["time/data"] < LOAD + 0.02


def test_slow_logger_is_part_of_the_steps(timed):
    """Eight rows are logged before the last step is done; what is aside would be ten times as much."""
    assert 8 * LOG <= sum(row["time/other"] for row in timed[2]) < 8 * LOG + 2 * ASIDE


def test_rate_is_of_real_tokens_over_the_whole_step(timed):
    """2 x 8 x 40 tokens a step; with padding it would be 2 x 8 x 64, without the data's time a multiple of it."""
    for row in timed[2]:
        assert row["tokens_per_second"] == pytest.approx(2 * ROWS * REAL / row["step_seconds"], rel=1e-9)
        assert row["step_seconds"] >= LOAD
