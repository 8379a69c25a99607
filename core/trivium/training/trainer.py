"""One training run from start or from its newest checkpoint to its end: Lightning is the loop, the rest is ours."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from rich.console import Console

from trivium.data.datamodule import StepDataModule, Steps
from trivium.data.tokenizer import Tokenizer
from trivium.errors import CheckpointError, ConfigError, TrainingError
from trivium.models.weights import load_weights, weights_of
from trivium.schema import RunConfig
from trivium.training.callbacks import Record, Sample, Save, Show, Validate
from trivium.training.checkpoint import (
    CheckpointStore,
    Contents,
    model_tensors,
    read_checkpoint_json,
    trained_tensors,
    verify,
)
from trivium.training.loggers import build_loggers
from trivium.training.objective_module import ObjectiveModule
from trivium.training.optim import load_optimizer, optimizer_tensors
from trivium.training.stop import StopController
from trivium.types import TokenBatch

FREE = ("trainer.max_steps",)
"""Guarded settings that may change at a resume; the change is announced, since the schedule stretches with it."""


@dataclass
class Job:
    """Everything a training run is made of. guard: what must be the same at a resume, as flat plain data.

    form: "chat" or "text", how its data reads. begin: called once the folder is known to be this run's, before anything
    in it is changed.
    """

    config: RunConfig
    folder: Path
    module: ObjectiveModule
    steps: Steps
    validation: list[TokenBatch]
    tokenizer: Tokenizer
    model_record: dict[str, Any]
    guard: dict[str, Any]
    form: str
    sample: Callable[[], list[dict]]
    begin: Callable[[], None]
    console: Console


@dataclass(frozen=True)
class Fitted:
    """How a run ended. signal: the number of the signal that stopped it, if one did."""

    steps: int
    tokens: int
    figures: dict[str, float]
    resumed_from: int = 0
    signal: int | None = None
    stopped_early: bool = False


def autocast_dtype(precision: str, accelerator: str) -> torch.dtype | None:
    """What `precision` means on this hardware: None is fp32; "auto" is bf16 where it is computed, not emulated."""
    if precision == "fp32":
        return None
    on_gpu = accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    if on_gpu:
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has_bf16 = "bf16" in _cpu_flags()  # avx512_bf16, amx_bf16, or bf16 on Arm
    return torch.bfloat16 if precision == "bf16" or has_bf16 else None


def _cpu_flags() -> str:
    info = Path("/proc/cpuinfo")
    return info.read_text() if info.is_file() else ""


def fit(job: Job) -> Fitted:
    """Train to max_steps, early stop or a signal; continue from the newest checkpoint of the same folder."""
    config, module = job.config, job.module
    store = CheckpointStore(job.folder / "checkpoints", config.checkpoint.keep)
    stop = StopController(config.stop.patience, config.stop.min_delta)
    store.sweep()
    latest = store.latest()
    if latest is not None:
        restore(job, latest, stop)
        if config.checkpoint.keep_best and stop.best is not None:
            store.repair_best(stop.best_step)
    job.begin()
    start = module.step
    if start >= config.trainer.max_steps or stop.exhausted:
        return Fitted(start, module.tokens_seen, module.last, resumed_from=start, stopped_early=stop.exhausted)
    if latest is not None:
        job.console.print(f"  continues from {latest}")
    loggers = build_loggers(config.logger, job.folder, config.name, start)
    validate = None
    if config.validation.every_steps:
        validate = Validate(job.validation, config.validation.every_steps, config.trainer.max_steps, stop)

    def save(module: ObjectiveModule, best: bool) -> None:
        store.save(module.step, contents(job, module, stop), best=best)

    best_of = validate if config.checkpoint.keep_best else None
    saver = Save(save, config.checkpoint.every_steps, config.trainer.max_steps, best_of)
    callbacks: list[L.Callback] = [validate] if validate else []
    if config.samples.every_steps and config.samples.prompts:
        callbacks.append(
            Sample(job.folder / "samples.jsonl", config.samples.every_steps, job.sample, start, job.console)
        )
    callbacks += [Record(), Show(job.console, config.trainer.max_steps), saver]
    trainer = _lightning_trainer(config, loggers, callbacks)
    trainer.fit(module, datamodule=StepDataModule(job.steps, start, config.trainer.max_steps))
    return Fitted(module.step, module.tokens_seen, module.last, start, saver.watch.received, stop.exhausted)


def _lightning_trainer(config: RunConfig, loggers: list, callbacks: list[L.Callback]) -> L.Trainer:
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch.accelerators.cuda"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning.*")  # advice for its own loop: workers, log intervals
    try:
        return L.Trainer(
            accelerator=config.trainer.accelerator,
            devices=1,
            max_epochs=1,  # the loader holds exactly the steps that are left
            logger=loggers,
            callbacks=callbacks,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
    except (ValueError, RuntimeError, MisconfigurationException) as error:
        raise ConfigError(f"trainer.accelerator={config.trainer.accelerator}: {error}") from error


def contents(job: Job, module: ObjectiveModule, stop: StopController) -> Contents:
    """What a checkpoint of this run holds."""
    state = {
        "phase": job.config.phase,
        "form": job.form,
        "step": module.step,
        "tokens_seen": module.tokens_seen,
        "last": module.last,
        "stop": stop.state(),
        "next_sample": job.steps.sample_id(module.step),
        "guard": job.guard,
    }
    weights = weights_of(module.model)
    broken = [name for name, tensor in weights.items() if not torch.isfinite(tensor).all()]
    if broken:  # a checkpoint that can never be loaded must not push out a sound one
        raise TrainingError(f"step {module.step}: {broken[0]} is no longer finite; the last checkpoint is sound")
    return Contents(
        tensors={
            "model.safetensors": weights,
            "optimizer.safetensors": optimizer_tensors(module.optimizer),
        },
        json={"state.json": state, "model.json": job.model_record},
        writers={"tokenizer": job.tokenizer.save},
    )


def restore(job: Job, checkpoint: Path, stop: StopController) -> None:
    """Put a checkpoint back into the job, after checking that it is this run's. Raises CheckpointError."""
    verify(checkpoint)
    state = read_checkpoint_json(checkpoint, "state.json")
    differences = [k for k in job.guard if state["guard"].get(k) != job.guard[k]]
    for key in [k for k in differences if k in FREE]:
        job.console.print(
            f"  [yellow]{key} was {state['guard'].get(key)}, is {job.guard[key]}: the schedule stretches with it[/]"
        )
    hard = [k for k in differences if k not in FREE]
    if hard:
        shown = "; ".join(f"{k} was {_short(state['guard'].get(k))}, is {_short(job.guard[k])}" for k in hard[:4])
        raise CheckpointError(
            f"{job.folder} holds another run: {shown}{' and more' if len(hard) > 4 else ''}. "
            "Choose another name=, or the settings it was started with"
        )
    step = state["step"]
    if state["next_sample"] != job.steps.sample_id(step):
        raise CheckpointError(
            f"{checkpoint}: step {step} would read {job.steps.sample_id(step)}, not {state['next_sample']}"
        )
    load_weights(job.module.model, model_tensors(checkpoint), str(checkpoint))
    load_optimizer(job.module.optimizer, trained_tensors(checkpoint), str(checkpoint))
    job.module.step, job.module.tokens_seen, job.module.last = step, state["tokens_seen"], state["last"]
    stop.restore(state["stop"])


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else text[:12] + "..."
