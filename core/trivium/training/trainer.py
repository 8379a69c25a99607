"""One training run from start or from its newest checkpoint to its end: Lightning is the loop, the rest is ours."""

from __future__ import annotations

import logging
import warnings
from collections import Counter
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
from trivium.disk import sweep
from trivium.errors import CheckpointError, ConfigError, TrainingError
from trivium.models.weights import load_weights, read_tensors, weights_of
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
from trivium.training.guard import RollBack
from trivium.training.loggers import build_loggers
from trivium.training.objective_module import ObjectiveModule
from trivium.training.optim import load_optimizer, optimizer_tensors
from trivium.training.stop import SignalWatch, StopController
from trivium.types import TokenBatch

OWN_WEIGHTS = "training.safetensors"
"""The weights that training goes on from, where the model's are an average of them."""

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


def fit(job: Job) -> Fitted:
    """Train to max_steps, early stop or a signal; continue from the newest checkpoint of the same folder."""
    config, module = job.config, job.module
    store = CheckpointStore(job.folder / "checkpoints", config.checkpoint.keep)
    stop = StopController(config.stop.patience, config.stop.min_delta)
    store.sweep()
    sweep(job.folder)
    latest, offset = store.latest(), 0
    if latest is not None:
        offset = restore(job, latest, stop)
        if config.checkpoint.keep_best and stop.best is not None:
            store.repair_best(stop.best_step)
    job.begin()
    start = module.step
    if start >= config.trainer.max_steps or stop.exhausted:
        return Fitted(start, module.tokens_seen, module.last, resumed_from=start, stopped_early=stop.exhausted)
    if latest is not None:
        job.console.print(f"  continues from {latest}")
    module.model.recompute = config.trainer.recompute
    if config.trainer.compile:
        module.model.compile_blocks()
    rolled: Counter[str] = Counter()
    with SignalWatch(config.stop.deadline) as watch:
        while True:
            try:
                _train(job, store, stop, offset, watch)
            except RollBack as back:
                offset = _roll_back(job, store, stop, back.step, offset, rolled)
            else:
                return Fitted(module.step, module.tokens_seen, module.last, start, watch.received, stop.exhausted)


def _roll_back(
    job: Job, store: CheckpointStore, stop: StopController, bad: int, offset: int, rolled: Counter[str]
) -> int:
    """Back to the newest checkpoint because of step `bad`; returns the offset that goes on behind that step's data."""
    latest, patience = store.latest(), job.config.guard.patience
    said = f"step {bad}: loss or gradient not usable"
    if latest is None:
        raise TrainingError(
            f"{said}, and there is no checkpoint yet to roll back to; lower optim.lr, raise schedule.warmup, or set "
            "guard.policy=skip"
        )
    rolled[latest.name] += 1
    if rolled[latest.name] > patience:
        raise TrainingError(
            f"{said}, after {patience} times (guard.patience) back to {latest.name}; lower optim.lr or look at the data"
        )
    restore(job, latest, stop)
    job.console.print(f"  [yellow]{said}; back to {latest.name}, and on with the data after that step[/]")
    return offset + bad - job.module.step


def _train(job: Job, store: CheckpointStore, stop: StopController, offset: int, watch: SignalWatch) -> None:
    """From the module's step to the end, or to the signal that `watch` notes.

    offset: step s reads item s + offset of the data (rollbacks move it).
    """
    config, module, start = job.config, job.module, job.module.step
    loggers = build_loggers(config.logger, job.folder, config.name, start)
    validate = None
    if config.validation.every_steps:
        validate = Validate(job.validation, config.validation.every_steps, config.trainer.max_steps, stop)

    def save(module: ObjectiveModule, best: bool) -> None:
        store.save(module.step, contents(job, module, stop, offset), best=best)

    best_of = validate if config.checkpoint.keep_best else None
    record = Record(loggers, Show(job.console, config.trainer.max_steps))
    saver = Save(save, record, config.checkpoint.every_steps, config.trainer.max_steps, best_of, watch)
    callbacks: list[L.Callback] = [validate] if validate else []
    if config.samples.every_steps and config.samples.prompts:
        callbacks.append(
            Sample(job.folder / "samples.jsonl", config.samples.every_steps, job.sample, start, job.console)
        )
    trainer = _lightning_trainer(config, loggers, [*callbacks, record, saver])
    items = range(start + offset, config.trainer.max_steps + offset)
    trainer.fit(module, datamodule=StepDataModule(job.steps, items))


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


def contents(job: Job, module: ObjectiveModule, stop: StopController, offset: int) -> Contents:
    """What a checkpoint of this run holds."""
    state = {
        "phase": job.config.phase,
        "form": job.form,
        "step": module.step,
        "tokens_seen": module.tokens_seen,
        "last": module.last,
        "stop": stop.state(),
        "training": module.state(),
        "offset": offset,
        "next_sample": job.steps.sample_id(module.step + offset),
        "guard": job.guard,
    }
    weights = weights_of(module.model)
    broken = [name for name, tensor in weights.items() if not torch.isfinite(tensor).all()]
    if broken:  # a checkpoint that can never be loaded must not push out a sound one
        raise TrainingError(f"step {module.step}: {broken[0]} is no longer finite; the last checkpoint is sound")
    tensors = {"model.safetensors": weights, "optimizer.safetensors": optimizer_tensors(module.optimizer)}
    if module.averages:  # others get the average, training goes on from its own weights
        with module.shown_weights():
            tensors["model.safetensors"] = {name: tensor.clone() for name, tensor in weights_of(module.model).items()}
        tensors[OWN_WEIGHTS] = weights
    return Contents(
        tensors=tensors,
        json={"state.json": state, "model.json": job.model_record},
        writers={"tokenizer": job.tokenizer.save},
    )


def restore(job: Job, checkpoint: Path, stop: StopController) -> int:
    """Put a checkpoint back into the job, after checking that it is this run's; returns its offset in the data.

    Raises CheckpointError.
    """
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
    step, offset, module = state["step"], state["offset"], job.module
    if state["next_sample"] != (found := job.steps.sample_id(step + offset)):
        raise CheckpointError(f"{checkpoint}: step {step} would read {found}, not {state['next_sample']}")
    shown = model_tensors(checkpoint)
    if module.averages:
        load_weights(module.model, shown, str(checkpoint))
        module.take_average()
        shown = read_tensors(checkpoint / OWN_WEIGHTS)
    load_weights(module.model, shown, str(checkpoint))
    load_optimizer(module.optimizer, trained_tensors(checkpoint), str(checkpoint))
    module.step, module.tokens_seen, module.last = step, state["tokens_seen"], state["last"]
    module.restore(state["training"])
    stop.restore(state["stop"])
    return offset


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else text[:12] + "..."
