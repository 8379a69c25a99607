"""Tiny runs of every phase that learns: a step takes about ten milliseconds and every path of the real thing."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

HEADS = ("model.heads=2", "model.kv_heads=1", "model.dropout=0.1")
MODEL = ("model.dim=32", "model.layers=2", "model.ffn_dim=64", *HEADS)
STUDENT = ("model.dim=16", "model.layers=1", "model.ffn_dim=32", *HEADS)
SIZES = (
    *("tokenizer.vocab_size=320", "batch.size=4", "batch.micro_size=2", "batch.length=64", "trainer.accelerator=cpu"),
    *("validation.max_rows=8", "samples.every_steps=0", "stop.deadline=20"),
)
COUNT = "data.tasks=[count]"
HELD_OUT = "validation.every_steps=20"


@dataclass(frozen=True)
class Recipe:
    """settings: overrides; {text}, {verdicts} and {tuned} are files and a run that the bench makes.

    updates: optimizer steps an item of the loader serves: checkpoints fall between items.
    """

    settings: tuple[str, ...]
    updates: int = 1


TUNED = ("phase=sft", "model=primer", "data.parts=[tasks]", "data.num_tasks=400", COUNT, *MODEL, "optim.lr=1e-2")
"""What the later phases start from: its answers are right now and then, so that samples differ in their reward."""

RECIPES = {
    "pretrain": Recipe(
        ("phase=pretrain", "domain=files", "data.path={text}", "data.validation_share=0.2", *MODEL, HELD_OUT)
    ),
    "sft": Recipe(("phase=sft", "model=primer", "data.parts=[tasks]", "data.num_tasks=400", *MODEL)),
    "preference": Recipe(
        ("phase=preference", "init_from={tuned}", COUNT, "data.num_pairs=200", "batch.length=128", HELD_OUT)
    ),
    "kto": Recipe(
        ("phase=preference", "objective=kto", "domain=files", "data.path={verdicts}", "init_from={tuned}",
         "batch.length=128", "batch.micro_size=4", "data.validation_share=0.2", HELD_OUT)
    ),
    "reward": Recipe(
        ("phase=reward", "init_from={tuned}", COUNT, "data.num_pairs=200", "batch.length=128", HELD_OUT)
    ),
    "distill": Recipe(
        ("phase=distill", "teacher.init_from={tuned}", "data.parts=[tasks]", "data.num_tasks=400", COUNT, *STUDENT,
         HELD_OUT)
    ),
    "rlhf": Recipe(
        ("phase=rlhf", "init_from={tuned}", COUNT, "data.num_tasks=200", "rollout.prompts=4", "rollout.samples=4",
         "rollout.updates=2", "inference.sampling.max_tokens=4", "optim.lr=3e-3"),
        updates=2,
    ),
}  # fmt: skip


def overridden(*groups: Iterable[str]) -> list[str]:
    """Overrides in order, each key once: a later one replaces an earlier one."""
    return list({o.partition("=")[0]: o for group in groups for o in group}.values())


def write_text(path: Path, documents: int = 60) -> None:
    """Documents of 40 words in a made language: some 20 steps an epoch."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 6))) for _ in range(200)]
    path.mkdir()
    for i in range(documents):
        (path / f"{i:03}.txt").write_text(" ".join(draw.choices(words, k=40)))


def write_verdicts(path: Path) -> None:
    """80 labelled answers, half of them undesirable."""
    draw, rows = random.Random(0), []
    for i in range(80):
        asked = {"role": "user", "content": f"How many letters: {' '.join(draw.choices('abcdef', k=3 + i % 5))}"}
        said = {"role": "assistant", "content": str(3 + i % 5 + i % 2)}
        rows.append({"messages": [asked, said], "label": i % 2 == 0})
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
