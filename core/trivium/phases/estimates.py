"""What a run would take, before it is started: tokens exactly; memory, time and disk about, one step of it being taken.

Compared with real runs in docs/doctor.md and the tests.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from trivium.build import build_optimizer, device_of
from trivium.data.datamodule import StepDataset
from trivium.data.tokenizer import Tokenizer
from trivium.models.adapters import parts
from trivium.models.protocol import CausalLM
from trivium.objectives.logprobs import target_logprobs
from trivium.schema import BatchConfig, RunConfig
from trivium.training.optim import optimizer_tensors
from trivium.training.precision import precision_of


@dataclass(frozen=True)
class Estimate:
    """tokens: read in all steps, without padding. memory, disk: bytes. checkpoints: how many are on disk at most."""

    steps: int
    tokens: int
    epochs: float
    memory: float
    step_seconds: float
    disk: int
    checkpoints: int

    @property
    def seconds(self) -> float:
        """Of all steps."""
        return self.steps * self.step_seconds

    def __str__(self) -> str:
        time_ = f"{self.seconds / 60:.1f} min ({self.step_seconds:.2f} s a step)"
        return (
            f"about {self.memory / 1e9:.1f} GB of memory, {time_}, "
            f"{self.disk / 1e9:.3g} GB of disk for {self.checkpoints} checkpoint{'s' * (self.checkpoints > 1)}"
        )


def tokens_read(steps: StepDataset, num_steps: int) -> int:
    """Tokens of the rows of the first steps, as a run counts them: without padding, repeats counted again."""
    per_row = np.add.reduceat(steps.table.lengths[steps.rows.documents], steps.rows.ends[:-1])
    return int(per_row[steps.order.rows(0, num_steps * steps.size)].sum())


def memory_of(model: CausalLM, batch: BatchConfig, companions: int = 0, state: int | None = None) -> float:
    """About how many bytes training holds. companions: parameters of frozen models beside it. state: bytes of the
    optimizer's, those of two moments unless given."""
    # the libraries, weights with gradients and two moments, and about 40 fp32 values a layer, token and width
    held = batch.micro_size * batch.length * model.width_times_depth * 160
    frozen = [p for p in model.parameters() if not p.requires_grad]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    state = trained * 8 if state is None else state
    memory = 0.6e9 + trained * 8 + state + sum(p.numel() for p in frozen) * 4 + held + companions * 4
    return memory + (model.num_parameters - sum(p.numel() for p in model.parameters())) * 0.6  # held in few bits


def estimate(config: RunConfig, model: CausalLM, tokenizer: Tokenizer, steps: StepDataset) -> Estimate:
    """Take one step as the run would, and multiply. The model is not the same afterwards."""
    device, precision = (
        device_of(config.trainer.accelerator),
        precision_of(config.precision, config.trainer.accelerator),
    )
    model.recompute = config.trainer.recompute
    model.to(device, precision.weights).train()
    optimizer = build_optimizer(config.optim, model)
    batch = steps.collated(steps.order.rows(0, steps.micro_size)).to(device)
    backward, update = [], []
    for _ in range(3):  # the first one fills caches, and makes the optimizer's state
        start = time.monotonic()
        with torch.autocast(device.type, precision.autocast, enabled=precision.autocast is not None):
            loss = -target_logprobs(model, batch).mean()
        loss.backward()
        float(loss.detach())  # a GPU has then done it
        middle = time.monotonic()
        optimizer.step()
        optimizer.zero_grad()
        backward.append(middle - start)
        update.append(time.monotonic() - middle)
    state = sum(t.nbytes for t in optimizer_tensors(optimizer).values())
    weights = sum(p.numel() * p.element_size() for p in parts(model).values())
    weights *= 2 if config.trainer.average or getattr(config.optim.config, "averages", False) else 1
    total, every = config.trainer.max_steps, config.checkpoint.every_steps
    kept = min(config.checkpoint.keep, -(-total // every))
    kept += bool(config.checkpoint.keep_best and config.validation.every_steps)
    return Estimate(
        steps=total,
        tokens=tokens_read(steps, total),
        epochs=total * steps.size / len(steps.rows),
        memory=memory_of(model, config.batch, state=state),
        step_seconds=min(backward) * steps.size / steps.micro_size + min(update),
        disk=kept * (weights + state + _saved(tokenizer)),
        checkpoints=kept,
    )


def _saved(tokenizer: Tokenizer) -> int:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(Path(folder))
        return sum(path.stat().st_size for path in Path(folder).iterdir())
