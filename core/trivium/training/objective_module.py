"""Everything that learns from a data set, whatever its loss: one Lightning module, one division in the program.

An item of the loader is one optimizer step: a list of micro-batches. Their losses are sums; the sum of all is divided
once by the count of all, known before the first backward pass, so how a step is cut never changes it. Frozen companions
(a reference, a teacher) stand beside the model: asked before the loss, never trained, never saved.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from trivium.data.position import key_of
from trivium.errors import TrainingError
from trivium.models.adapters import parts
from trivium.models.experts import Sparse
from trivium.models.protocol import CausalLM
from trivium.models.weights import local
from trivium.objectives.protocol import Objective
from trivium.schema import GuardConfig
from trivium.training.average import WeightAverage
from trivium.training.balance import Balance, load_of
from trivium.training.figures import Figures, Stopwatch
from trivium.training.flops import mfu, peak_of, step_flops
from trivium.training.guard import Guard
from trivium.training.in_backward import StepInBackward
from trivium.training.memory import peak_bytes
from trivium.training.optim import guarded_step, set_rates
from trivium.training.precision import FP32, LossScale, Precision
from trivium.training.schedule import Schedule
from trivium.training.shard import Shards
from trivium.types import IGNORE, LossOutput, Metric, TokenBatch


@dataclass(frozen=True)
class StepSettings:
    """What one optimizer step is told."""

    grad_clip: float
    seed: int
    precision: Precision = FP32
    starts_equal: bool = False  # the model starts from the very weights of its companions: at_start must hold
    guard: GuardConfig = GuardConfig()
    average: float = 0.0  # decay of the weights' running average; 0 keeps none
    in_backward: bool = False  # step each parameter as soon as its gradient is there


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
        shard: Callable[[CausalLM], Shards] | None = None,
    ) -> None:
        """shard: shares the model out among processes, before the optimizer takes up its weights."""
        super().__init__()
        self.automatic_optimization = False
        # a plain dict: Lightning must not take them for parts of what is trained
        assert all(c is not model for c in (companions or {}).values()), "a companion is frozen; the model must not be"
        self.companions = {name: m.eval().requires_grad_(False) for name, m in (companions or {}).items()}
        self.model, self.objective, self.schedule, self.settings = model, objective, schedule, settings
        if settings.precision.weights is not None:
            for each in (model, *self.companions.values()):
                each.to(settings.precision.weights)
        self.shards = shard(model) if shard else None
        self.optimizer = make_optimizer(model)
        self.guard = Guard(settings.guard)
        self.loss_scale = LossScale() if settings.precision.scaled else None
        self.average = WeightAverage(model, settings.average) if settings.average else None
        self.in_backward = StepInBackward(model, self.optimizer) if settings.in_backward else None
        self.watch = Stopwatch()
        self.peak: float | None = None
        """FLOP/s of all devices together, where it is known: then rows have `mfu`."""
        self.step = 0
        self.tokens_seen = 0
        self.last: dict[str, Any] = {}
        """The figures of the newest step that was read."""
        self._unread: deque[Figures] = deque()

    def configure_optimizers(self) -> Optimizer:
        return self.optimizer

    def configure_model(self) -> None:
        """Nothing: the model was shared out when it was built, since a checkpoint is read before the loop starts."""

    def run_with_weights(self, function: Callable[..., Any], *args: Any) -> Any:
        """`function(*args)`, which uses the model: through here, its weights are whole even if they are shared out."""
        return self.shards.run(function, *args) if self.shards else function(*args)

    def loss(self, batch: TokenBatch, balance: Balance | None = None) -> tuple[Tensor, dict[str, Metric]]:
        """The objective's sum over a batch, and its metrics. balance: the step's, whose loss is added."""

        def whole() -> tuple[Tensor, dict[str, Metric]]:
            output = balance(self.objective, self.model, batch) if balance else self.objective(self.model, batch)
            return output.loss_sum.clone(), dict(output.metrics)  # never a view: FSDP hangs its hook on it

        return self.run_with_weights(whole)

    def autocast(self) -> torch.autocast:
        """The precision of matrix products; gradients and weights keep their own.

        Casts are kept while it lasts, but not of weights that are shared out: FSDP takes a weight's gradient for
        complete when the last micro-batch's own use of it is, and a cast that an earlier one made comes after that.
        """
        dtype, kept = self.settings.precision.autocast, self.shards is None
        return torch.autocast(self.device.type, dtype or torch.bfloat16, enabled=dtype is not None, cache_enabled=kept)

    def on_fit_start(self) -> None:
        for companion in self.companions.values():
            companion.to(self.device)

    def on_train_start(self) -> None:
        peak = peak_of(self.device, self.settings.precision.compute)
        self.peak = peak * self.trainer.world_size if peak else None

    def on_train_epoch_start(self) -> None:  # called before the first step's data are read
        self.watch.start(self.device)

    @property
    def world_size(self) -> int:
        """Among how many processes, or groups of them, a step's rows are shared out; one while there is no loop yet."""
        if self._trainer is None:
            return 1
        return self.shards.shares if self.shards else self._trainer.world_size

    @property
    def processes(self) -> int:
        """How many processes there are; one while there is no loop yet."""
        return self._trainer.world_size if self._trainer else 1

    @property
    def share(self) -> int:
        """Whose share of the rows this process has."""
        if self._trainer is None:
            return 0
        return self.shards.share if self.shards else self.global_rank

    @property
    def between_items(self) -> bool:
        """Whether a checkpoint taken now misses nothing: here after every step."""
        return True

    def training_step(self, micro_batches: Any, _index: int) -> None:
        self.take_step(micro_batches)

    def on_train_batch_end(self, *_: Any) -> None:  # called after every callback's
        self.watch.lap("other")

    @contextmanager
    def asking(self) -> Iterator[dict[str, Any]]:
        """The companions, and the model as "policy": without gradient, in eval mode, in training's precision."""
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad(), self.autocast():
                yield {**self.companions, "policy": self.model}
        finally:
            self.model.train(was_training)

    def consult(self, batches: Sequence[TokenBatch]) -> None:
        """Let the objective note in each batch what it must know before its loss."""
        with self.asking() as models:
            for batch in batches:
                self.run_with_weights(self.objective.consult, batch, models)
            self.run_with_weights(self.objective.prepare, self.model, batches, self.global_sum)

    def balance(self, batches: Sequence[TokenBatch], count: Tensor, tokens: Tensor) -> Balance | None:
        """What keeps a model's experts evenly busy in this step; None where nothing has to.

        A step that is cut is read once more: how busy each expert is must be known of all of it before the loss.
        """
        if not isinstance(self.model, Sparse) or not self.model.config.balance:
            return None
        alone = Balance(self.model.config.balance, count, tokens)
        if len(batches) == 1 and self.world_size == 1:
            return alone
        with self.asking():
            load = torch.stack([self.run_with_weights(load_of, self.model, batch) for batch in batches]).sum(0)
        return replace(alone, load=self.global_sum(load))

    def check_start(self, batches: Sequence[TokenBatch]) -> None:
        """Where the model still equals its companions, the objective's figures are known; refuse to train on others."""
        with self.asking():
            outputs = [LossOutput(*self.loss(b)) for b in batches]
        count = self.global_sum(torch.stack([self.objective.count(b) for b in batches]).sum())
        found = {"loss": self.global_sum(torch.stack([o.loss_sum for o in outputs]).sum()) / count}
        for name in self.objective.at_start.keys() - {"loss"}:
            total, number = (torch.stack([o.metrics[name][i] for o in outputs]).sum() for i in (0, 1))
            found[name] = self.global_sum(total) / self.global_sum(number)
        for name, expected in self.objective.at_start.items():
            off = abs(found[name].item() - expected)
            if not off <= self.settings.precision.tolerance * max(1.0, abs(expected)):  # NaN is off too
                raise TrainingError(
                    f"step 0: {name} is {found[name].item():.6f} and must be {expected:.6f} while the model equals its "
                    f"{' and '.join(self.objective.companions) or 'start'}: the mask, the reference or the template "
                    "is not what it should be"
                )

    def take_step(self, micro_batches: Sequence[TokenBatch], more: Mapping[str, float] | None = None) -> None:
        """One optimizer step; `rows` has its figures, and `more` beside them."""
        self.watch.lap("data")
        self.seed_step()
        self.consult(micro_batches)
        if self.step == 0 and self.settings.starts_equal and self.objective.at_start:
            self.check_start(micro_batches)
        self.model.train()
        counted = [torch.stack([self.objective.count(b), *_work(b)]) for b in micro_batches]
        counts = self.global_sum(torch.stack(counted).sum(0))
        balance = self.balance(micro_batches, counts[0], counts[1])
        rate = set_rates(self.optimizer, self.schedule(self.step))
        self.watch.lap("other")
        if self.loss_scale:
            self.loss_scale.begin()
        while True:
            loss, metrics = self.run_backward(micro_batches, counts[0], balance)
            norms = self.gradient_norms(self.loss_scale.scale if self.loss_scale else 1.0)
            norm = torch.linalg.vector_norm(torch.stack(list(norms.values())))
            if self.loss_scale is None or not self.loss_scale.overflowed(loss, norm):
                break
            self.optimizer.zero_grad(set_to_none=True)
            self.seed_step()
        bad = self.guard.judge(loss, norm)
        if self.in_backward is None:
            self.scale_gradients(norm)
            guarded_step(self.optimizer, bad if self.guard.holds else torch.zeros_like(bad))
            self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        if self.average:
            self.average.update(self.step, bad)
        self.watch.lap("optimizer")
        known = {"bad": bad, "train/loss": loss, "grad_norm": norm}
        known |= dict(zip(("count", "tokens", "targets", "attended"), counts, strict=True))
        known |= {f"grad_norm/{group}": value for group, value in norms.items()}
        facts = {"lr": rate, "memory": peak_bytes(), **(more or {})}
        if self.loss_scale:
            facts["loss_scale"] = self.loss_scale.scale
        self._unread.append(Figures(self.step, known, metrics, facts, self.watch.laps()))

    def rehearse(self, batch: TokenBatch) -> None:
        """Forward and backward of one micro-batch, to see what it needs; its gradients are of no use."""
        batch = batch.to(self.device)
        self.consult([batch])
        self.model.train()
        with self.autocast():
            loss = self.objective(self.model, batch).loss_sum
        loss.backward()

    def seed_step(self) -> None:
        """Every step draws its dropout from its own number, so a resumed run needs no generator state."""
        torch.manual_seed(key_of(self.settings.seed, "step", self.step, self.share))

    def run_backward(
        self, micro_batches: Sequence[TokenBatch], count: Tensor, balance: Balance | None = None
    ) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
        """Forward and backward of all micro-batches: the mean loss over all ranks, and metrics as (total, count)."""
        sums: dict[str, list[Tensor]] = {}
        # the only division: DDP averages gradients over ranks, so its factor is given back
        factor = self.world_size / count * (self.loss_scale.scale if self.loss_scale else 1.0)
        with self.autocast():  # around them all: a weight is cast once a step
            for number, batch in enumerate(micro_batches):
                loss_sum, metrics = self.loss(batch, balance)
                self.watch.lap("forward")
                with torch.autocast(self.device.type, enabled=False), self.syncing(number == len(micro_batches) - 1):
                    self.manual_backward(loss_sum * factor)
                self.watch.lap("backward")
                sums.setdefault("", []).append(loss_sum.detach())
                for name, metric in metrics.items():
                    sums.setdefault(f"{name} total", []).append(metric.total)
                    sums.setdefault(f"{name} count", []).append(metric.count)
        if self.shards:
            self.shards.settle()
        exact = torch.float32 if self.device.type == "mps" else torch.float64
        stacked = torch.stack([torch.stack([x.to(exact) for x in values]).sum() for values in sums.values()])
        found = dict(zip(sums, self.global_sum(stacked).unbind(), strict=True))
        names = [key.removesuffix(" total") for key in found if key.endswith(" total")]
        return found[""] / count, {name: (found[f"{name} total"], found[f"{name} count"]) for name in names}

    @contextmanager
    def syncing(self, last: bool) -> Iterator[None]:
        """Gradients travel between ranks once a step, after the last micro-batch."""
        wrapper = self.trainer.model
        if self.shards:
            self.shards.sync(last)
        if isinstance(wrapper, DistributedDataParallel) and not last:
            with wrapper.no_sync():
                yield
        else:
            yield

    def gradient_norms(self, scale: float) -> dict[str, Tensor]:
        """The norm of the gradient of each group of parameters: embed, attn, ffn, norms, head."""
        trained = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        named = {name: local(p.grad) for name, p in trained if p.grad is not None}
        if self.in_backward:
            norms = self.in_backward.norms
        elif named:
            first = next(iter(named.values()))
            found = torch._foreach_norm(list(named.values()), 2.0, dtype=_norm_type(first.dtype))  # type: ignore[reportPrivateImportUsage]
            norms = dict(zip(named, found, strict=True))
        else:
            raise TrainingError(f"step {self.step}: no parameter has a gradient; is everything frozen?")
        if len(norms) < len(trained) and self.world_size > 1:  # DDP would leave its whole bucket unaveraged
            lost = next(name for name, p in trained if p.grad is None)
            raise TrainingError(f"step {self.step}: {lost} has no gradient to average over the processes; freeze it")
        groups: dict[str, list[Tensor]] = {}
        parameters = dict(trained)
        for name, norm in norms.items():
            copies = self.shards.copies(parameters[name]) if self.shards else 1
            groups.setdefault(_group(name), []).append(norm / copies**0.5 if copies > 1 else norm)
        found = torch.stack([torch.linalg.vector_norm(torch.stack(values)) for values in groups.values()])
        if self.shards:  # each process has the squares of its own share
            squares = found.square()
            torch.distributed.all_reduce(squares)
            found = squares.sqrt()
        return dict(zip(groups, (found / scale).unbind(), strict=True))

    def scale_gradients(self, norm: Tensor) -> None:
        """Clip to `grad_clip`, and take the loss scale out, in one pass."""
        clip, scale = self.settings.grad_clip, self.loss_scale.scale if self.loss_scale else 1.0
        if not clip and scale == 1:
            return
        factor = (clip / (norm + 1e-6)).clamp(max=1.0) / scale if clip else torch.ones_like(norm) / scale
        grads = [local(p.grad) for p in self.model.parameters() if p.grad is not None]
        torch._foreach_mul_(grads, factor.to(grads[0].dtype))  # type: ignore[reportPrivateImportUsage]

    def rows(self, keep: int = 0) -> Iterator[dict[str, Any]]:
        """The figures of steps that were not read yet, oldest first; the `keep` newest are left on the device.

        Here the host learns of a step that the guard did not take. Raises TrainingError or RollBack.
        """
        while len(self._unread) > keep:
            row, bad, count = self._unread.popleft().read()
            if not count:
                raise TrainingError(f"step {row['step']}: no {self.objective.unit} of the batch would be trained on")
            self.guard.read(bad, row)
            targets, attended = row.pop("targets"), row.pop("attended")
            if self.peak and (flops := step_flops(self.model, row["tokens"], targets, attended)):
                row["mfu"] = mfu(row["tokens_per_second"], flops / row["tokens"], self.peak)
            self.tokens_seen += row["tokens"]
            row["tokens"] = self.tokens_seen
            if bad:
                row = {k: v if isinstance(v, int) or math.isfinite(v) else None for k, v in row.items()}
                row |= {"train/loss": None, "skipped": 1}
            self.last = row
            yield row

    def note(self, name: str, value: float) -> None:
        """Add a figure to the newest step's."""
        self._unread[-1].facts[name] = value

    def global_sum(self, value: Tensor) -> Tensor:
        """The sum over all ranks; the same bits on each."""
        if self.processes > 1:
            value = value.clone()
            torch.distributed.all_reduce(value)  # not Lightning's `reduce`: it has the host wait first
            if self.shards and self.shards.tensor > 1:  # neighbours had the same, or one of them what all must hear of
                value = value / self.shards.tensor if value.is_floating_point() else value // self.shards.tensor
        return value

    @property
    def averages(self) -> bool:
        """Whether others get other weights than those that are trained: an average of them."""
        return self.average is not None or hasattr(self.optimizer, "weights")

    def shown_tensors(self) -> dict[str, Tensor]:
        """The weights that others get, by name, in the precision they are kept in, where they are."""
        averaged: Any = self.average or self.optimizer
        weights = averaged.weights() if self.averages else {}
        return {n: weights.get(p, p).detach() for n, p in parts(self.model).items()}

    def take_average(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on with the average that a checkpoint kept (an optimizer makes its own anew)."""
        if self.average is not None:
            self.average.restore({p: tensors[name] for name, p in parts(self.model).items()})

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps beside weights, optimizer and figures."""
        return {"guard": self.guard.state(), "loss_scale": self.loss_scale.state() if self.loss_scale else None}

    def restore(self, state: dict[str, Any]) -> None:
        """Take up a checkpoint's state."""
        self._unread.clear()
        self.watch.start(self.device)
        self.guard.restore(state["guard"])
        if self.loss_scale:
            self.loss_scale.restore(state["loss_scale"])

    @contextmanager
    def shown_weights(self) -> Iterator[None]:
        """The model with the weights that others get: their average where one is kept. Afterwards all is as before."""
        if not self.averages:
            yield
            return
        averaged: Any = self.average or self.optimizer
        before = {p: p.detach().clone() for p in averaged.weights()}
        with torch.no_grad():
            for parameter, weight in averaged.weights().items():
                parameter.copy_(weight)
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, weight in before.items():
                    parameter.copy_(weight)

    @torch.no_grad()
    def validation_loss(self, batches: Sequence[TokenBatch]) -> float:
        """Mean loss over the counted units of all `batches`; leaves training as it was.

        Ranks share the batches where they can be shared evenly; else each scores them all. The mean is the same.
        """
        was_training = self.model.training
        self.model.eval()
        if len(batches) % self.world_size == 0:
            batches = batches[self.share :: self.world_size]
        batches = [batch.to(self.device) for batch in batches]
        total = count = torch.zeros((), device=self.device)
        with self.shown_weights():
            self.consult(batches)
            for batch in batches:
                with self.autocast():
                    total = total + self.loss(batch)[0]
                count = count + self.objective.count(batch)
        self.model.train(was_training)
        total, count = self.global_sum(total), self.global_sum(count)
        if not count:
            raise TrainingError(f"no {self.objective.unit} of the validation split would be scored")
        loss = (total / count).item()
        if not math.isfinite(loss):
            raise TrainingError(f"step {self.step}: the validation loss is {loss}; the last checkpoint is sound")
        return loss


def _work(batch: TokenBatch) -> list[Tensor]:
    """How many real tokens, how many of them meet the head, and how many tokens they attend to in all."""
    real = torch.ones_like(batch.tokens) if batch.segments is None else (batch.segments > 0).long()
    return [real.sum(), (batch.labels[:, 1:] != IGNORE).sum(), ((batch.positions + 1) * real).sum()]


def _group(name: str) -> str:
    """What a parameter belongs to, whatever its layer.

    >>> [_group(n) for n in ("embed.weight", "blocks.3.attn.q.weight", "blocks.0.ffn_norm.weight", "norm.weight")]
    ['embed', 'attn', 'norm', 'norm']
    """
    parts = [part for part in name.split(".") if part != "blocks" and not part.isdigit()]
    return "norm" if "norm" in parts[0] else parts[0]


def _norm_type(dtype: torch.dtype) -> torch.dtype:
    """Norms of bf16 gradients are summed in fp32."""
    return torch.promote_types(dtype, torch.float32)
