"""The front door of every phase: from a typed RunConfig to a finished run folder."""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console

from trivium.build import device_of
from trivium.compose import as_dict
from trivium.disk import lock_folder
from trivium.errors import ConfigError
from trivium.lineage.report import write_report
from trivium.phases.evaluate import run_evaluate
from trivium.phases.export import run_export
from trivium.phases.feedback import run_feedback
from trivium.phases.promote import run_promote
from trivium.phases.run import Run
from trivium.phases.search import run_search
from trivium.phases.serve import run_serve
from trivium.phases.speak import run_chat, run_generate
from trivium.phases.train import run_tokenizer, run_training
from trivium.plugin import local_plugins
from trivium.schema import DATA_PHASES, TRAINING_PHASES, RunConfig
from trivium.training.checkpoint import RECORD
from trivium.training.memory import peak_bytes, reset_peak
from trivium.training.parallel import PeerLost, World, join, leave, lost_peer, placed
from trivium.training.processes import run_processes

PHASES: dict[str, Callable[[Run], int]] = {
    "tokenizer": run_tokenizer,
    "evaluate": run_evaluate,
    "generate": run_generate,
    "chat": run_chat,
    "serve": run_serve,
    "search": run_search,
    "export": run_export,
    "feedback": run_feedback,
    "promote": run_promote,
    **dict.fromkeys(TRAINING_PHASES, run_training),
}

STARTS_MODEL = ("pretrain", "distill")
"""Phases that bring a model of their own, unless init_from= names a trained one."""


def with_checkpoint_model(overrides: Sequence[str], *, trained: bool = False) -> list[str]:
    """Overrides under which a checkpoint in init_from= brings its own model, unless one is chosen beside it.

    trained: there will be a checkpoint, even if an earlier stage has not made it yet.
    """
    said = dict(o.split("=", 1) for o in overrides if "=" in o)
    path = Path(said.get("init_from", "").strip("'\""))
    trained = trained or (path / "checkpoints").is_dir() or (path / RECORD).is_file()
    chosen = any(key == "model" or key.startswith("model.") for key in said)
    return [*overrides, "~model"] if trained and not chosen and said.get("phase") in STARTS_MODEL else list(overrides)


def run(config: RunConfig, console: Console, *, skip_done: bool = False) -> int:
    """Run one phase; returns the exit code. skip_done: a finished run with the same settings is left as it is.

    Training on several processes: this one starts them and waits, unless a launcher has made it one of them.
    """
    world = placed()
    if config.phase in TRAINING_PHASES and config.trainer.processes > 1 and world.size == 1:
        return _start_processes(config, skip_done)
    try:
        if world.size > 1:
            world = _join(config, world)
        code = _run(config, console if world.is_first else Console(quiet=True), world, skip_done)
        leave(world)
    except Exception as error:
        if world.size > 1 and lost_peer(error):
            raise PeerLost("another process of this run has ended; its own error says why") from error
        raise
    return code


def _start_processes(config: RunConfig, skip_done: bool) -> int:
    trainer = config.trainer
    if trainer.nodes > 1:
        raise ConfigError(
            f"trainer.nodes={trainer.nodes} is more than this machine: start one process a device with torchrun or "
            "srun, as docs/parallel.md shows"
        )
    device = device_of(trainer.accelerator)
    here = {"cuda": torch.cuda.device_count(), "mps": 1}.get(device.type, trainer.devices)
    if trainer.devices > here:
        raise ConfigError(
            f"trainer.devices={trainer.devices}: this machine has {here} of them; set trainer.devices={here}, or "
            "trainer.accelerator=cpu"
        )
    order = {"config": as_dict(config), "skip_done": skip_done, "plugins": local_plugins()}
    return run_processes(order, trainer.devices, trainer.threads if device.type == "cpu" else 0)


def _join(config: RunConfig, world: World) -> World:
    trainer = config.trainer
    if config.phase not in TRAINING_PHASES:
        raise ConfigError(f"phase={config.phase} runs in one process; start it without torchrun or srun")
    if world.size != trainer.processes:
        raise ConfigError(
            f"the launcher started {world.size} processes, the settings say trainer.devices={trainer.devices} x "
            f"trainer.nodes={trainer.nodes}; set trainer.devices to the processes on each machine"
        )
    world = dataclasses.replace(world, local_size=trainer.devices, tensor=trainer.tensor_parallel)
    world = join(world, device_of(trainer.accelerator))
    world.agree(as_dict(config))
    return world


def _run(config: RunConfig, console: Console, world: World, skip_done: bool) -> int:
    if config.trainer.threads:
        torch.set_num_threads(config.trainer.threads)
    this = Run(config, console, world)
    config = this.config
    world.barrier()  # all have read what the folder holds
    about = f" on {config.domain}" if config.phase in DATA_PHASES and config.phase != "search" else ""
    console.rule(f"[bold]{config.phase}[/]{about} -> {this.folder}", align="left", style="dim")
    if this.manifest.was_done and (skip_done or config.phase in ("tokenizer", "evaluate")) and this.same_content():
        this.say("done already; the same settings and inputs")
        return 0
    lock = lock_folder(this.folder) if world.is_first else None
    if world.any(lock is None and world.is_first):
        raise ConfigError(f"another process is at work in {this.folder}; wait for it, or choose another name=")
    reset_peak()
    # what answers can be interrupted; training takes signals itself, and before its first step there is nothing to save
    interruptible = config.phase not in TRAINING_PHASES and signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    if interruptible:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if config.phase not in TRAINING_PHASES:
        this.begin()
    try:
        code = PHASES[config.phase](this)
    except BaseException as error:
        if not this.manifest.others:  # a refused command leaves the facts of the run that is there
            this.manifest.update("failed", error=f"{type(error).__name__}: {error}")
        raise
    finally:
        if lock:
            lock.close()
        if interruptible:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
    this.manifest.update("done" if code == 0 else "stopped", peak_memory=world.most(peak_bytes()))
    if world.is_first:
        write_report(this.folder)
    return code
