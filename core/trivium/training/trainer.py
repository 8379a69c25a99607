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
from lightning.fabric.utilities.exceptions import MisconfigurationException
from rich.console import Console

from trivium.data.datamodule import Steps
from trivium.data.loader import StepLoader
from trivium.data.tokenizer import Tokenizer
from trivium.disk import sweep
from trivium.errors import CheckpointError, ConfigError, TrainingError, TriviumError
from trivium.models import peft
from trivium.models.adapters import has_adapter, load_parts, parts
from trivium.models.weights import read_tensors, shares_of
from trivium.schema import RunConfig, TrainerConfig
from trivium.training.background import Background
from trivium.training.callbacks import Record, Sample, Save, Show, Validate
from trivium.training.checkpoint import MODEL, CheckpointStore, Contents, read_checkpoint_json
from trivium.training.guard import RollBack
from trivium.training.loggers import build_loggers
from trivium.training.memory import keep_freed
from trivium.training.objective_module import ObjectiveModule
from trivium.training.optim import load_optimizer, named, optimizer_tensors
from trivium.training.parallel import ALONE, Placed, World, strategy_of
from trivium.training.profiler import Profile
from trivium.training.stop import SignalWatch, StopController
from trivium.types import TokenBatch

OWN_WEIGHTS = "training.safetensors"
"""The weights that training goes on from, where the model's are an average of them."""

BEFORE_WORKERS = 4
"""Steps whose data this process makes itself, so that training does not wait until its data workers have started."""
FREE = ("trainer.max_steps",)
"""Guarded settings that may change at a resume; the change is announced, since the schedule stretches with it."""


@dataclass
class Job:
    """Everything a training run is made of. guard: what must be the same at a resume, as flat plain data.

    form: "chat" or "text", how its data reads. begin: called once the folder is known to be this run's, before anything
    in it is changed. foresee: called with a number of steps once it is known that the data of so many will be read.
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
    world: World = ALONE
    foresee: Callable[[int], None] = lambda steps: None


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
    figures = [job.folder / name for name in ("metrics.jsonl", "samples.jsonl")]
    together = job.world.apart() if module.shards else ALONE
    store = CheckpointStore(job.folder / "checkpoints", config.checkpoint.keep, figures, together)
    stop = StopController(config.stop.patience, config.stop.min_delta)
    if job.world.is_first:
        store.sweep()
        sweep(job.folder)
    latest, offset = _newest(job, store), 0
    if latest is not None:
        offset = restore(job, latest, stop)
        if config.checkpoint.keep_best and stop.best is not None and job.world.is_first:
            store.repair_best(stop.best_step)
    job.world.barrier()  # from here on the first process changes what the others have read
    job.begin()
    start = module.step
    if start >= config.trainer.max_steps or stop.exhausted:
        return Fitted(start, module.tokens_seen, module.last, resumed_from=start, stopped_early=stop.exhausted)
    if latest is not None:
        job.console.print(f"  continues from {latest}")
    module.model.recompute = config.trainer.recompute
    if config.trainer.compile:
        module.model.compile_blocks()
    keep_freed()
    rolled: Counter[str] = Counter()
    background = Background()
    with SignalWatch(config.stop.deadline) as watch:
        while True:
            job.foresee(config.trainer.max_steps + offset)
            try:
                signal = _train(job, store, stop, offset, background, watch)
            except RollBack as back:
                background.wait()
                job.world.barrier()  # the first has saved what all of them go back to
                offset, signal = _roll_back(job, store, stop, back, offset, rolled), back.signal
                if signal is None:
                    continue
            except BaseException as first:
                try:
                    background.wait()
                except TriviumError as second:
                    if second is not first:
                        job.console.print(f"  [red]and the save that was under way: {second}[/]")
                raise
            return Fitted(module.step, module.tokens_seen, module.last, start, signal, stop.exhausted)


def _newest(job: Job, store: CheckpointStore) -> Path | None:
    """What the first process finds, which reads every byte; the others take its word."""
    found = None
    with job.world.together("find a sound checkpoint"):
        if job.world.is_first:
            found = store.sound(fallback=job.config.checkpoint.fallback, say=_warner(job.console))
    name = job.world.gather(found.name if found else "")[0]
    return store.folder / name if name else None


def _roll_back(
    job: Job, store: CheckpointStore, stop: StopController, back: RollBack, offset: int, rolled: Counter[str]
) -> int:
    """Back to the newest checkpoint because of a bad step; returns the offset that goes on behind that step's data."""
    latest, patience = _newest(job, store), job.config.guard.patience
    if latest is None:
        raise TrainingError(
            f"{back}, and there is no checkpoint yet to roll back to; lower optim.lr, raise schedule.warmup, or set "
            "guard.policy=skip"
        )
    rolled[latest.name] += 1
    if rolled[latest.name] > patience:
        raise TrainingError(
            f"{back}, after {patience} times (guard.patience) back to {latest.name}; lower optim.lr or look at the data"
        )
    restore(job, latest, stop)
    job.console.print(f"  [yellow]{back}; back to {latest.name}, and on with the data after that step[/]")
    shared = job.steps.updates  # steps that learn from the same data are all behind
    return -(-(offset + back.step) // shared) * shared - job.module.step


def _train(
    job: Job, store: CheckpointStore, stop: StopController, offset: int, background: Background, watch: SignalWatch
) -> int | None:
    """From the module's step to the end; returns the signal that ended it before, if one did.

    offset: step s reads item s + offset of the data (rollbacks move it).
    """
    config, module, start = job.config, job.module, job.module.step
    first = job.world.is_first
    loggers = build_loggers(config.logger, job.folder, config.name, start, _warner(job.console)) if first else []
    validate = None
    if config.validation.every_steps:
        validate = Validate(job.validation, config.validation.every_steps, config.trainer.max_steps, stop)

    def save(module: ObjectiveModule, best: bool) -> None:
        background.wait()  # never two copies at once
        step, found = module.step, contents(job, module, stop, offset) if first or module.shards else None
        if found and config.checkpoint.async_save:
            held = found.held()
            background.start(lambda: store.save(step, held, best=best))
        elif found:
            store.save(step, found, best=best)
        job.world.barrier()  # no process goes on, or ends, before the first has its copy

    best_of = validate if config.checkpoint.keep_best else None
    record = Record(loggers, Show(job.console, config.trainer.max_steps), lambda s: job.steps.figures(s + offset))
    every, most = config.checkpoint.every_steps, config.trainer.max_steps
    saver = Save(save, record, every, most, best_of, watch, background, job.world)
    callbacks: list[L.Callback] = []
    if config.profiler.torch and first:
        callbacks.append(Profile(config.profiler, job.folder, job.console.print))
    callbacks += [validate] if validate else []
    if config.samples.every_steps and config.samples.prompts:
        path, every = job.folder / "samples.jsonl", config.samples.every_steps
        callbacks.append(Sample(path, every, job.sample, start, job.console, job.world))
    trainer = lightning_trainer(config.trainer, loggers, [*callbacks, record, saver], job.world)
    items = range(start + offset, config.trainer.max_steps + offset)
    loader = StepLoader(
        job.steps,
        items,
        workers=config.trainer.workers,
        prefetch=config.trainer.prefetch,
        timeout=config.trainer.loader_timeout,
        pin=trainer.strategy.root_device.type == "cuda",
        interrupted=lambda: job.world.size == 1 and watch.received is not None,  # several stop together
        here=BEFORE_WORKERS,
    )
    try:
        trainer.fit(module, train_dataloaders=loader)
    except RollBack as back:
        back.signal = saver.signal or job.world.most(watch.received or 0) or None
        raise
    finally:
        loader.close()
    return saver.signal or None


def _warner(console: Console) -> Callable[[str], None]:
    return lambda text: console.print(f"  warning: {text}", style="yellow", markup=False, highlight=False)


def lightning_trainer(config: TrainerConfig, loggers: list, callbacks: list[L.Callback], world: World) -> L.Trainer:
    """Lightning's loop over what is left, and nothing else of it."""
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch.accelerators.cuda"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning.*")  # advice for its own loop: workers, log intervals
    try:
        return L.Trainer(
            accelerator=config.accelerator,
            devices=config.devices if world.size > 1 else 1,
            num_nodes=config.nodes if world.size > 1 else 1,
            strategy=strategy_of(world, config.strategy),
            plugins=[Placed(world)],  # or Lightning would look for a cluster of its own
            max_epochs=1,  # the loader holds exactly the steps that are left
            logger=loggers,
            callbacks=callbacks,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
    except (ValueError, RuntimeError, MisconfigurationException) as error:
        raise ConfigError(f"trainer.accelerator={config.accelerator}: {error}") from error


def contents(job: Job, module: ObjectiveModule, stop: StopController, offset: int) -> Contents:
    """What a checkpoint of this run holds; of weights and optimizer state that are shared out, this process's part."""
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
        "processes": job.world.size,
        "guard": job.guard,
    }
    weights = {name: parameter.detach() for name, parameter in parts(module.model).items()}  # a tied one once
    shown = module.shown_tensors() if module.averages else weights
    more = {OWN_WEIGHTS: weights} if module.averages else {}  # others get the average, training goes on from its own
    written = {"state.json": state, "model.json": job.model_record}
    if has_adapter(module.model):  # in peft's own form, so that a checkpoint is what it takes
        shown, file = peft.to_peft(module.model, shown), peft.WEIGHTS
        written[peft.CONFIG] = peft.peft_config(module.model, job.model_record["adapter"]["base"]["path"])
    else:
        file = MODEL
    tensors = {file: shown, **more, "optimizer.safetensors": optimizer_tensors(module.optimizer)}
    return Contents(
        tensors={file: shares_of(each) for file, each in tensors.items()},
        json=written,
        writers={"tokenizer": job.tokenizer.save},
    )


def restore(job: Job, checkpoint: Path, stop: StopController) -> int:
    """Put a verified checkpoint back into the job, if it is this run's; returns its offset in the data.

    Raises CheckpointError.
    """
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
    if state["processes"] != job.world.size:
        job.console.print(
            f"  [yellow]trained on {state['processes']} processes up to here, on {job.world.size} from here: the same "
            "rows a step, but sums in another order, and dropout drawn by others[/]"
        )
    step, offset, module = state["step"], state["offset"], job.module
    if state["next_sample"] != (found := job.steps.sample_id(step + offset)):
        raise CheckpointError(f"{checkpoint}: step {step} would read {found}, not {state['next_sample']}")
    model, trained = module.model, named(module.optimizer)
    weights = parts(model)
    if has_adapter(model):
        ours = {theirs: name for name, theirs in peft.peft_names(model).items()}
        read = read_tensors(checkpoint / peft.WEIGHTS, lambda name: weights.get(ours.get(name, "")))
        shown = peft.from_peft(model, read, str(checkpoint))
    else:
        shown = read_tensors(checkpoint / MODEL, weights.get)
    if module.averages:
        load_parts(model, shown, str(checkpoint))
        module.take_average(shown)
        shown = read_tensors(checkpoint / OWN_WEIGHTS, weights.get)
    load_parts(model, shown, str(checkpoint))
    state_of = read_tensors(
        checkpoint / "optimizer.safetensors", lambda k: trained.get(k.rpartition(".")[0], (None,))[0]
    )
    load_optimizer(module.optimizer, state_of, str(checkpoint))
    module.step, module.tokens_seen, module.last = step, state["tokens_seen"], state["last"]
    module.restore(state["training"])
    stop.restore(state["stop"])
    return offset


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else text[:12] + "..."
