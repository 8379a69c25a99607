"""What tests/training/test_parallel.py runs, as one of two or four processes or alone: `python ranks.py FOLDER`."""

import dataclasses
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from trivium.errors import TriviumError
from trivium.models.adapters import attach
from trivium.models.config import DoraConfig, LoraConfig, MixtralConfig
from trivium.models.mixtral import Mixtral
from trivium.models.weights import local, read_tensors, shares_of, weights_of
from trivium.objectives.config import NextTokenConfig, SFTConfig
from trivium.objectives.next_token import SFT, NextToken
from trivium.plugin import discover
from trivium.registry import MODELS
from trivium.schema import GuardConfig, TrainerConfig
from trivium.training.config import AdamWConfig
from trivium.training.objective_module import ObjectiveModule, StepSettings
from trivium.training.optim import adamw, optimizer_tensors
from trivium.training.parallel import ALONE, join, leave, placed
from trivium.training.precision import precision_of
from trivium.training.shard import Shards
from trivium.training.tensorfile import write_tensors
from trivium.training.trainer import lightning_trainer
from trivium.types import LossOutput, TokenBatch

discover()
ROWS, LENGTH, VOCAB = 8, 12, 61
CPU = torch.device("cpu")


def fields(config):
    return {f.name for f in dataclasses.fields(config)}


def ragged_steps(count):
    """Steps of 8 rows with 1 to 11 trained tokens each; the last two rows of every third step have none at all."""
    generator = torch.Generator().manual_seed(0)
    steps = []
    for number in range(count):
        tokens = torch.randint(VOCAB, (ROWS, LENGTH), generator=generator)
        labels = tokens.clone()
        labels[:, 0] = -100
        kept = torch.tensor([1, 2, 11, 3, 1, 9, 11, 5])[torch.randperm(ROWS, generator=generator)]
        for row, n in enumerate(kept.tolist()):
            labels[row, 1 : LENGTH - n] = -100
        if number % 3 == 2:
            labels[1::2] = -100  # with one row a micro-batch, rank 1 of 2 has nothing to train on
        steps.append((tokens, labels))
    return steps


def cut(step, size, world):
    """This process's micro-batches of `size` rows."""
    tokens, labels = step
    positions = torch.arange(LENGTH).expand(ROWS, -1)
    parts = [slice(i, i + size) for i in range(0, ROWS, size)][world.share :: world.shares]
    return [TokenBatch(tokens[p], labels[p], positions[p]) for p in parts]


class LossIsNaN(NextToken):
    """The loss of rank 1 is NaN."""

    def __call__(self, forward, batch):
        output = super().__call__(forward, batch)
        bad = torch.nan if placed().rank == 1 else 0.0
        return LossOutput(output.loss_sum + bad, output.metrics)


class GradientIsNaN(NextToken):
    """The loss is finite, the gradient of rank 1 is not: d sqrt(0 x) / dx = inf * 0."""

    def hidden(self, forward, batch):
        states = super().hidden(forward, batch)
        return states + (states.sum() * 0).sqrt() * (placed().rank == 1)


OBJECTIVES = {
    "next_token": lambda: NextToken(NextTokenConfig(z_loss=1e-3)),
    "neftune": lambda: SFT(SFTConfig(neftune_alpha=1e-9)),
    "loss_nan": lambda: LossIsNaN(NextTokenConfig()),
    "gradient_nan": lambda: GradientIsNaN(NextTokenConfig()),
}


def train(world, strategy, *, size, steps=6, objective="next_token", tied=True, average=0.0, recompute=0,
          policy="stop", frozen=(), precision="fp32", adapter="", experts=0, family="llama", file=None):  # fmt: skip
    """Train a small model; returns its figures, its weights and its optimizer's state, whole. file: where weights that
    are shared out are written to, each process its own."""
    if strategy == "tensor":
        world, strategy = replace(world, tensor=2), "fsdp"
    sizes = {"dim": 16, "layers": 2, "heads": 4, "kv_heads": 2, "ffn_dim": 24, "context": LENGTH}
    sizes |= {"init_std": 0.3, "tied": tied}
    if experts:
        model = Mixtral(MixtralConfig(**sizes, experts=experts, active=2, balance=0.05), VOCAB)
    else:
        kind = MODELS.config(family)
        sizes |= {"settings": json.dumps(PHI3)}
        model = MODELS.load(family)(kind(**{k: v for k, v in sizes.items() if k in fields(kind)}), VOCAB)
    model.init_weights(seed=3)
    model.to(torch.float64 if precision == "fp32" else torch.float32).recompute = recompute
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    if adapter:
        attach(ADAPTERS[adapter], model)
        model.double()
    shard = (lambda m: Shards(m, world, CPU)) if strategy == "fsdp" else None
    module = ObjectiveModule(
        model,
        OBJECTIVES[objective](),
        lambda m: adamw(AdamWConfig(lr=1e-2), m),
        lambda step: 1.0,
        StepSettings(0.5, 0, precision_of(precision, "cpu"), guard=GuardConfig(policy=policy), average=average),
        shard=shard,
    )
    trainer = lightning_trainer(TrainerConfig(accelerator="cpu", devices=world.size, strategy=strategy), [], [], world)
    data = [cut(step, size, world) for step in ragged_steps(steps)]
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=None))
    rows = list(module.rows())
    keys = ("train/loss", "train/nll", "grad_norm", "grad_norm/attn", "tokens", "skipped")
    keys += ("train/balance", "train/expert_load")
    batches = [b for step in ragged_steps(2) for b in cut(step, 4, ALONE)]
    held_out = None if objective.endswith("nan") else module.validation_loss(batches)
    with module.shown_weights():
        weights = {name: weight.clone() for name, weight in weights_of(module.model).items()}
    state = {
        f"optimizer {k}": v.full_tensor() if isinstance(v, DTensor) else v
        for k, v in optimizer_tensors(module.optimizer).items()
    }
    read = True
    if module.shards and file:
        shared = dict(model.named_parameters())
        write_tensors(file, shares_of({n: p.detach() for n, p in shared.items()}), world)
        read = all(torch.equal(local(t), local(shared[n])) for n, t in read_tensors(file, shared.get).items())
    return {
        "read": read,
        "rows": [{k: row[k] for k in keys if k in row} for row in rows],
        "val/loss": held_out,
        "tensors": {**weights, **state},
    }


ADAPTERS = {
    "lora": LoraConfig(rank=3, alpha=9.0),
    "dora": DoraConfig(rank=3, targets=["*.attn.*"]),
    "also": LoraConfig(rank=3, also=["embed", "norm"]),
}

PHI3 = {
    **{"model_type": "phi3", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "pad_token_id": 0},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": LENGTH, "eos_token_id": 1},
    "bos_token_id": 1,
}
FAMILIES = ("mistral", "qwen2", "qwen3", "gemma2", "gpt2", "qwen3_moe", "hf")
"""Beside llama, of which all other runs are, and mixtral ("experts")."""

RUNS = {
    **{f"fsdp {family} family": ("fsdp", {"size": 2, "family": family}) for family in FAMILIES},
    **{f"{s} adapter {kind}": (s, {"size": 2, "adapter": kind}) for s in ("ddp", "fsdp") for kind in ADAPTERS},
    **{f"{s} size {n}": (s, {"size": n}) for s in ("ddp", "fsdp") for n in (4, 2, 1)},
    "fsdp untied": ("fsdp", {"size": 2, "tied": False}),
    "fsdp recompute": ("fsdp", {"size": 2, "recompute": 1}),
    "fsdp average": ("fsdp", {"size": 2, "average": 0.9}),
    **{f"{s} bf16 {n}": (s, {"size": n, "precision": "bf16"}) for s in ("ddp", "fsdp", "tensor") for n in (1, 2)},
    **{f"{s} experts": (s, {"size": 2, "experts": 4}) for s in ("ddp", "fsdp")},
    "fsdp experts recompute": ("fsdp", {"size": 2, "experts": 4, "recompute": 1}),
    "fsdp neftune": ("fsdp", {"size": 2, "objective": "neftune"}),
    "ddp average": ("ddp", {"size": 2, "average": 0.9}),
    "ddp frozen": ("ddp", {"size": 2, "frozen": ("blocks.0.attn.q.weight",)}),
    "tensor size": ("tensor", {"size": 4}),
    "tensor recompute": ("tensor", {"size": 4, "recompute": 1}),
    "tensor average": ("tensor", {"size": 8, "average": 0.9, "tied": False}),
    **{
        f"{s} {bad}": (s, {"size": 2, "steps": 1, "objective": bad, "policy": "skip"})
        for s in ("ddp", "fsdp", "tensor")
        for bad in ("loss_nan", "gradient_nan")
    },
}


RUNS_OF_FOUR = {
    "four tensor": ("tensor", {"size": 4}),
    "four recompute": ("tensor", {"size": 2, "recompute": 1}),
    "four fsdp": ("fsdp", {"size": 2}),
}
"""Two pairs: each computes its blocks together, and shares its weights out to the other."""


def told(action):
    """The sentence that `action` is refused with."""
    try:
        action()
    except TriviumError as error:
        return str(error)
    return ""


def main(folder):
    world = join(replace(placed(), local_size=placed().size), CPU)
    for name, (strategy, settings) in (RUNS if world.size == 2 else RUNS_OF_FOUR).items():
        found = train(world, strategy, **settings, file=folder / f"{name}.file")
        save_file(found.pop("tensors"), folder / f"{name}.{world.rank}.safetensors")
        (folder / f"{name}.{world.rank}.json").write_text(json.dumps(found))
    mine = world.rank + 1
    facts = {
        "any": [world.any(False), world.any(world.rank == 1)],
        "most": world.most(mine),
        "gather": world.gather({"rank": world.rank, "text": "x" * mine}),
        "same": told(lambda: world.agree({"optim": {"lr": 1.0}, "seed": 0})),
        "other": told(lambda: world.agree({"optim": {"lr": float(mine)}, "seed": 0})),
    }
    with world.first():
        if world.is_first:
            time.sleep(0.3)
            (folder / "made").write_text("by the first")
        facts["read"] = (folder / "made").read_text()
    (folder / f"facts.{world.rank}.json").write_text(json.dumps(facts))
    leave(world)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
    os._exit(0)
