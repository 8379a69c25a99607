"""What happens after a step, in this order: validate, sample, record, save, stop. Each is one small callback.

Figures are read one step late (see figures.py), and all of them before anything is saved.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import lightning as L
from lightning.pytorch.loggers import Logger
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from trivium.disk import append_file, read_lines, replace_file
from trivium.errors import TrainingError, TriviumError
from trivium.training.background import Background
from trivium.training.guard import RollBack
from trivium.training.objective_module import ObjectiveModule
from trivium.training.parallel import ALONE, PeerLost, World
from trivium.training.stop import SignalWatch, StopController
from trivium.types import TokenBatch

PLAIN_SECONDS = 10.0
"""Seconds between lines where there is no terminal to draw a bar on."""

FAILED = 1000
"""Above every signal's number: a process could not save."""
SHOWN = {"train/accuracy": "accuracy", "rollout/reward": "reward", "train/divergence": "divergence"}
"""Figures beside the loss, where a phase has them."""


class AfterStep(L.Callback):
    """Calls `after(trainer, module)` when an optimizer step is done."""

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:  # type: ignore[override]
        assert isinstance(pl_module, ObjectiveModule)
        self.after(trainer, pl_module)

    def after(self, trainer: L.Trainer, module: ObjectiveModule) -> None:
        """One step is done."""
        raise NotImplementedError


class Validate(AfterStep):
    """Held-out loss into the step's figures, and into the stop controller."""

    def __init__(self, batches: Sequence[TokenBatch], every_steps: int, max_steps: int, stop: StopController) -> None:
        self.batches, self.every_steps, self.max_steps, self.stop = batches, every_steps, max_steps, stop
        self.improved = False

    def after(self, trainer: L.Trainer, module: ObjectiveModule) -> None:
        self.improved = False
        if module.step % self.every_steps == 0 or module.step == self.max_steps:
            with module.watch.aside():
                loss = module.validation_loss(self.batches)
            module.note("val/loss", loss)
            self.improved = self.stop.update(loss, module.step)
            if self.stop.exhausted:
                trainer.should_stop = True


class Sample(AfterStep):
    """Completions now and then, to samples.jsonl; the first of them to the console."""

    def __init__(
        self,
        path: Path,
        every_steps: int,
        make: Callable[[], list[dict]],
        first_step: int,
        console: Console,
        world: World = ALONE,
    ) -> None:
        """make: called on every process; those that do not sample return nothing, and wait."""
        self.path, self.every_steps, self.make, self.console, self.world = path, every_steps, make, console, world
        if not world.is_first:
            return
        kept = [row for row in read_lines(path) if row.get("step", 0) <= first_step]
        replace_file(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept).encode())

    def after(self, trainer: L.Trainer, module: ObjectiveModule) -> None:
        if module.step % self.every_steps == 0:
            with module.watch.aside():
                with module.shown_weights():
                    rows = self.make()
                self.world.barrier()
                if not self.world.is_first:
                    return
                lines = [json.dumps({"step": module.step, **row}, ensure_ascii=False) + "\n" for row in rows]
                append_file(self.path, "".join(lines))
            shown = f"{rows[0]['prompt']!r} -> {rows[0]['completion']!r}"
            self.console.print(f"  sample  {shown}", highlight=False, markup=False)


class Record(AfterStep):
    """Figures to every logger and to the console, once they are here."""

    def __init__(
        self, loggers: Sequence[Logger], show: Show, read: Callable[[int], dict[str, float]] = lambda step: {}
    ) -> None:
        """read: what has been read of the data after a step."""
        self.loggers, self.show, self.data_read = loggers, show, read

    def after(self, trainer: L.Trainer, module: ObjectiveModule) -> None:
        self.read(module, keep=1)

    def read(self, module: ObjectiveModule, keep: int = 0) -> None:
        """All figures but those of the `keep` newest steps."""
        for row in module.rows(keep):
            row |= self.data_read(row["step"])
            for logger in self.loggers:
                logger.log_metrics(row, step=row["step"])
            self.show.row(row)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, ObjectiveModule)
        self.show.begin(pl_module.step)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, ObjectiveModule)
        self.read(pl_module)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.show.end()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        assert isinstance(pl_module, ObjectiveModule)
        with suppress(TriviumError, RollBack):  # what went wrong first is what is told
            self.read(pl_module)
        self.show.end()  # Lightning leaves teardown out, and the terminal would be without a cursor


class Show:
    """A bar on a terminal, a line every few seconds elsewhere."""

    def __init__(self, console: Console, max_steps: int) -> None:
        self.console, self.max_steps = console, max_steps
        self._bar: Progress | None = None
        self._last_line = self._began = time.monotonic()
        self._first_step = 0

    def begin(self, step: int) -> None:
        """Training starts after `step`."""
        self._first_step = step
        self._began = time.monotonic()
        if self.console.is_terminal:
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
            self._bar = bar = Progress(*columns, console=self.console, transient=True)
            bar.add_task("", total=self.max_steps, completed=step)
            bar.start()

    def row(self, row: dict) -> None:
        """The figures of one step."""
        step, now = row["step"], time.monotonic()
        if "skipped" in row:
            self.console.print(f"  [yellow]step {step}: loss or gradient not usable; the step was skipped[/]")
            return
        held_out = f"  val {row['val/loss']:.3f}" if "val/loss" in row else ""
        more = "".join(f"  {name} {row[key]:.3f}" for key, name in SHOWN.items() if key in row)
        text = f"loss {row['train/loss']:.3f}{held_out}{more}  {row['tokens_per_second']:,.0f} tokens/s"
        if self._bar:
            self._bar.update(self._bar.task_ids[0], completed=step, description=text)
        if held_out or (not self._bar and now - self._last_line > PLAIN_SECONDS):
            self._last_line = now
            left = (now - self._began) / (step - self._first_step) * (self.max_steps - step)
            self.console.print(f"  step {step:>6}/{self.max_steps}  {text}  {left:,.0f} s left", highlight=False)

    def end(self) -> None:
        """No more rows."""
        if self._bar:
            self._bar.stop()


class Save(AfterStep):
    """Checkpoints on schedule, at the best validation, at the end and when a signal came; then stops for the signal."""

    def __init__(
        self,
        save: Callable[[ObjectiveModule, bool], None],
        record: Record,
        every_steps: int,
        max_steps: int,
        best_of: Validate | None,
        watch: SignalWatch,
        background: Background,
        world: World = ALONE,
    ) -> None:
        self.record, self.watch, self.background, self.world = record, watch, background, world
        self.save, self.every_steps, self.max_steps, self.best_of = save, every_steps, max_steps, best_of
        self.signal = 0
        """The signal that some process got, once all of them know of it."""
        self._due = False
        self._saved = 0  # the last step that a checkpoint holds
        self._working = threading.Lock()  # held from the moment a step's data is here until all is done with it

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, ObjectiveModule)
        self._saved = pl_module.step
        self.watch.overdue = lambda: self.save_late(pl_module)
        self.watch.listen()  # Lightning has set its own handlers, which save nothing,
        trainer._signal_connector.received_sigterm = False  # and would raise for what came before now

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, ObjectiveModule)
        with self._working:
            if self.world.size == 1 and self.watch.received:  # it may have come while a step's data was waited for
                self.signal = self.watch.received
                if pl_module.step != self._saved and pl_module.between_items:
                    self._write(pl_module, best=False)
            self.background.wait()  # while signals are still only noted

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.background.join()

    def on_train_batch_start(self, *_: object) -> None:  # type: ignore[override]
        self._working.acquire()

    def after(self, trainer: L.Trainer, module: ObjectiveModule) -> None:
        told = self.world.most(FAILED if self.background.failed else self.watch.received or 0)
        if told == FAILED:  # all end here, with the reason of the one that has it
            self.background.wait()
            raise PeerLost("another process could not save")
        self.signal = self.signal or told
        best = self.best_of is not None and self.best_of.improved
        ends = module.step == self.max_steps or trainer.should_stop
        self._due |= module.step % self.every_steps == 0 or ends or best or self.signal > 0
        if self._due and module.between_items:  # in the midst of a rollout the steps that are left come first
            self._write(module, best)
            self._due = False
            if self.signal:
                trainer.should_stop = True
        self._working.release()

    def _write(self, module: ObjectiveModule, best: bool) -> None:
        self.record.read(module)  # a checkpoint of a step whose figures are not known could hide a bad one
        with module.watch.aside():
            self.save(module, best)
        self._saved = module.step

    def save_late(self, module: ObjectiveModule) -> None:
        """From another thread, when the run should have ended: save the last step if the main thread waits for data."""
        if not self._working.acquire(blocking=False):
            raise TrainingError(f"step {module.step + 1} takes longer; the newest checkpoint has step {self._saved}")
        if self.world.size > 1:
            raise TrainingError(f"the other processes cannot be waited for; checkpoint {self._saved} is the newest")
        if module.step != self._saved and not module.between_items:
            raise TrainingError(f"step {module.step} is one of several on one rollout and cannot be saved alone; "
                                f"the newest checkpoint has step {self._saved}")  # fmt: skip
        if module.step != self._saved:
            self._write(module, best=False)
        self.background.wait()
