"""Everything that learns from a data set, whatever its loss: one Lightning module, one division in the program.

An item of the loader is one optimizer step: a list of micro-batches. Their losses are sums; the sum of all is divided
once by the count of all, known before the first backward pass, so how a step is cut never changes it. Frozen companions
(a reference, a teacher) stand beside the model: asked before the loss, never trained, never saved.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.optim import Optimizer

from trivium.data.position import key_of
from trivium.errors import TrainingError
from trivium.models.protocol import CausalLM
from trivium.objectives.protocol import Objective
from trivium.training.optim import set_rates
from trivium.training.schedule import Schedule
from trivium.types import Metric, TokenBatch


@dataclass(frozen=True)
class StepSettings:
    """What one optimizer step is told."""

    grad_clip: float
    seed: int
    autocast: torch.dtype | None  # None computes in the weights' own precision
    starts_equal: bool = False  # the model starts from the very weights of its companions: at_start must hold


START_TOLERANCE = {None: 1e-4, torch.bfloat16: 2e-2}
"""Of `at_start`, relative where the figure is above 1: rounding of log-probabilities summed over an answer."""


class ObjectiveModule(L.LightningModule):
    """Composes a model, an objective and an optimizer. `step` counts optimizer steps done, resumes included."""

    def __init__(
        self,
        model: CausalLM,
        objective: Objective,
        make_optimizer: Callable[[CausalLM], Optimizer],
        schedule: Schedule,
        settings: StepSettings,
        companions: Mapping[str, CausalLM] | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        # a plain dict: Lightning must not take them for parts of what is trained
        assert all(c is not model for c in (companions or {}).values()), "a companion is frozen; the model must not be"
        self.companions = {name: m.eval().requires_grad_(False) for name, m in (companions or {}).items()}
        self.model, self.objective, self.schedule, self.settings = model, objective, schedule, settings
        self.optimizer = make_optimizer(model)
        self._compiled: tuple[CausalLM, ...] = ()
        self.step = 0
        self.tokens_seen = 0
        self.last: dict[str, float] = {}

    def compile_model(self) -> None:
        """Run the inner model through torch.compile; never the LightningModule, whose hooks would break the graph."""
        self._compiled = (torch.compile(self.model),)  # type: ignore[assignment]  # a tuple: no second submodule

    @property
    def forward_model(self) -> CausalLM:
        """The model that losses run through."""
        return self._compiled[0] if self._compiled else self.model

    def configure_optimizers(self) -> Optimizer:
        return self.optimizer

    def autocast(self) -> torch.autocast:
        """The precision of matrix products; gradients and weights stay fp32."""
        dtype = self.settings.autocast
        return torch.autocast(self.device.type, dtype or torch.bfloat16, enabled=dtype is not None)

    def on_fit_start(self) -> None:
        for companion in self.companions.values():
            companion.to(self.device)

    @property
    def between_items(self) -> bool:
        """Whether a checkpoint taken now misses nothing: here after every step."""
        return True

    def training_step(self, micro_batches: Any, _index: int) -> None:
        with self.timed():
            self.take_step(micro_batches)

    @contextmanager
    def asking(self) -> Iterator[dict[str, Any]]:
        """The companions, and the model as "policy": without gradient, in eval mode, in training's precision."""
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad(), self.autocast():
                yield {**self.companions, "policy": self.forward_model}
        finally:
            self.model.train(was_training)

    def consult(self, batches: Sequence[TokenBatch]) -> None:
        """Let the objective note in each batch what it must know before its loss."""
        with self.asking() as models:
            for batch in batches:
                self.objective.consult(batch, models)
            self.objective.prepare(self.forward_model, batches, self.global_sum)

    def check_start(self, batches: Sequence[TokenBatch]) -> None:
        """Where the model still equals its companions, the objective's figures are known; refuse to train on others."""
        with self.asking():
            outputs = [self.objective(self.forward_model, b) for b in batches]
        count = self.global_sum(torch.stack([self.objective.count(b) for b in batches]).sum())
        found = {"loss": self.global_sum(torch.stack([o.loss_sum for o in outputs]).sum()) / count}
        for name in self.objective.at_start.keys() - {"loss"}:
            total, number = (torch.stack([o.metrics[name][i] for o in outputs]).sum() for i in (0, 1))
            found[name] = self.global_sum(total) / self.global_sum(number)
        for name, expected in self.objective.at_start.items():
            off = abs(found[name].item() - expected)
            if not off <= START_TOLERANCE[self.settings.autocast] * max(1.0, abs(expected)):  # NaN is off too
                raise TrainingError(
                    f"step 0: {name} is {found[name].item():.6f} and must be {expected:.6f} while the model equals its "
                    f"{' and '.join(self.objective.companions) or 'start'}: the mask, the reference or the template "
                    "is not what it should be"
                )

    def take_step(self, micro_batches: Sequence[TokenBatch]) -> None:
        """One optimizer step; its figures are in `last`."""
        # Every step draws its dropout from its own number, so a resumed run needs no generator state.
        torch.manual_seed(key_of(self.settings.seed, "step", self.step, self.global_rank))
        self.consult(micro_batches)
        if self.step == 0 and self.settings.starts_equal and self.objective.at_start:
            self.check_start(micro_batches)
        self.model.train()
        count = self.global_sum(torch.stack([self.objective.count(b) for b in micro_batches]).sum())
        if not count:
            raise TrainingError(f"step {self.step}: no {self.objective.unit} of the batch would be trained on")
        loss = torch.zeros((), device=self.device)
        sums: dict[str, Metric] = {}
        for batch in micro_batches:
            with self.autocast():
                output = self.objective(self.forward_model, batch)
            # the only division: DDP averages gradients over ranks, so its factor is given back
            self.manual_backward(output.loss_sum * (self.trainer.world_size / count))
            loss += output.loss_sum.detach()
            for name, metric in output.metrics.items():
                old = sums.get(name)
                sums[name] = metric if old is None else Metric(old.total + metric.total, old.count + metric.count)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.grad_clip or float("inf"))
        loss = self.global_sum(loss) / count
        if not torch.isfinite(loss + norm):
            raise TrainingError(
                f"step {self.step}: loss {loss.item()}, gradient norm {norm.item()}. The step was not taken; the last "
                "checkpoint is sound. Lower optim.lr, raise schedule.warmup or set precision=fp32"
            )
        rate = set_rates(self.optimizer, self.schedule(self.step))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.tokens_seen += int(self.global_sum(sum(_real_tokens(b) for b in micro_batches)))  # type: ignore[arg-type]
        self.last = {
            "step": self.step,
            "train/loss": loss.item(),
            **{f"train/{k}": mean for k, m in sums.items() if (mean := self._mean(m)) is not None},
            "lr": rate,
            "grad_norm": norm.item(),
            "tokens": self.tokens_seen,
        }

    def _mean(self, metric: Metric) -> float | None:
        count = self.global_sum(metric.count)
        return (self.global_sum(metric.total) / count).item() if count else None

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Note a step's time in `last`, and the rate of its real tokens."""
        started, before = time.perf_counter(), self.tokens_seen
        yield
        seconds = time.perf_counter() - started
        self.last |= {"step_seconds": seconds, "tokens_per_second": (self.tokens_seen - before) / seconds}

    def global_sum(self, value: Tensor) -> Tensor:
        """The sum over all ranks."""
        return self.trainer.strategy.reduce(value, reduce_op="sum") if self.trainer.world_size > 1 else value  # type: ignore[return-value]

    @torch.no_grad()
    def validation_loss(self, batches: Sequence[TokenBatch]) -> float:
        """Mean loss over the counted units of all `batches`; leaves training as it was."""
        was_training = self.model.training
        self.model.eval()
        batches = [batch.to(self.device) for batch in batches]
        self.consult(batches)
        total = count = torch.zeros((), device=self.device)
        for batch in batches:
            with self.autocast():
                total = total + self.objective(self.forward_model, batch).loss_sum
            count = count + self.objective.count(batch)
        self.model.train(was_training)
        if not count:
            raise TrainingError(f"no {self.objective.unit} of the validation split would be scored")
        loss = (total / count).item()
        if not math.isfinite(loss):
            raise TrainingError(f"step {self.step}: the validation loss is {loss}; the last checkpoint is sound")
        return loss


def _real_tokens(batch: TokenBatch) -> Tensor:
    if batch.segments is None:
        return torch.tensor(batch.tokens.numel(), device=batch.tokens.device)
    return (batch.segments > 0).sum()
