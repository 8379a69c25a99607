"""The front door of every phase: from a typed RunConfig to a finished run folder."""

from __future__ import annotations

import signal
from collections.abc import Callable

import torch
from rich.console import Console

from trivium.disk import lock_folder
from trivium.errors import ConfigError
from trivium.lineage.report import write_report
from trivium.phases.evaluate import run_evaluate
from trivium.phases.run import Run
from trivium.phases.speak import run_chat, run_generate
from trivium.phases.train import run_tokenizer, run_training
from trivium.schema import TRAINING_PHASES, RunConfig
from trivium.training.memory import peak_bytes, reset_peak

PHASES: dict[str, Callable[[Run], int]] = {
    "tokenizer": run_tokenizer,
    "evaluate": run_evaluate,
    "generate": run_generate,
    "chat": run_chat,
    **dict.fromkeys(TRAINING_PHASES, run_training),
}


def run(config: RunConfig, console: Console, *, skip_done: bool = False) -> int:
    """Run one phase; returns the exit code. skip_done: a finished run with the same settings is left as it is."""
    if config.trainer.threads:
        torch.set_num_threads(config.trainer.threads)
    this = Run(config, console)
    config = this.config
    console.rule(f"[bold]{config.phase}[/] on {config.domain} -> {this.folder}", align="left", style="dim")
    if this.manifest.was_done and (skip_done or config.phase in ("tokenizer", "evaluate")) and this.same_content():
        this.say("done already; the same settings and inputs")
        return 0
    lock = lock_folder(this.folder)
    if lock is None:
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
        lock.close()
        if interruptible:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
    this.manifest.update("done" if code == 0 else "stopped", peak_memory=peak_bytes())
    write_report(this.folder)
    return code
