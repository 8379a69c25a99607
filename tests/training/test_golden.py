"""The first ten losses of every recipe, to the last bit, as they were when someone last looked.

Whatever moves one bit of a loss shows here: a mask, an order of sums, a seed, a default. Is it meant? Then renew them,
look at the difference, and say why in the commit:

    TRIVIUM_RENEW_GOLDEN=1 pytest tests/training/test_golden.py

Other processors and other versions of torch add up in another order. There the losses are compared to 1e-4, and a
warning says so.
"""

import hashlib
import json
import os
import platform
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import Listed, run_through, tiny_llama

from trivium.data.chat import Encoded
from trivium.data.config import BPEConfig
from trivium.data.datamodule import PromptDataset, StepDataset
from trivium.data.packing import table_of
from trivium.data.tokenizer import train_bpe
from trivium.inference.config import NativeConfig
from trivium.inference.native.engine import NativeBackend
from trivium.objectives.config import (
    DistillConfig,
    GRPOConfig,
    NextTokenConfig,
    PreferenceConfig,
    RewardConfig,
    SFTConfig,
    UnpairedConfig,
)
from trivium.objectives.distill import Distill
from trivium.objectives.next_token import SFT, NextToken
from trivium.objectives.policy_gradient import GRPO
from trivium.objectives.preference import Preference
from trivium.objectives.reward import Reward
from trivium.objectives.unpaired import KTO
from trivium.training.config import AdamWConfig, ScheduleConfig
from trivium.training.objective_module import ObjectiveModule, StepSettings
from trivium.training.optim import adamw
from trivium.training.rollout_module import RolloutModule, RolloutSettings
from trivium.training.schedule import cosine
from trivium.types import Score

GOLDEN = Path(__file__).parent / "golden"
STEPS, VOCAB, LENGTH = 10, 61, 32
RENEW = "TRIVIUM_RENEW_GOLDEN=1 pytest tests/training/test_golden.py"
RECIPES = {
    "pretrain": NextToken(NextTokenConfig(z_loss=1e-4)),
    "sft": SFT(SFTConfig(neftune_alpha=5.0)),
    "preference": Preference(PreferenceConfig()),
    "kto": KTO(UnpairedConfig()),
    "reward": Reward(RewardConfig()),
    "rlhf": GRPO(GRPOConfig()),
    "distill": Distill(DistillConfig()),
}


def machine():
    """What the bits of a sum depend on: the version of torch, and what the processor can do."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else [f"flags: {platform.processor()}"]
    flags = sorted(
        next((x for x in lines if x.lower().startswith(("flags", "features"))), "").partition(":")[2].split()
    )
    return {"torch": torch.__version__, "flags": hashlib.sha256(" ".join(flags).encode()).hexdigest()[:16]}


def parts(objective):
    model = tiny_llama(VOCAB, layers=2, context=LENGTH, dropout=0.1)
    if objective.scores:
        model.add_score_head()
        model.head.requires_grad_(model.head.weight is model.embed.weight)
    settings = StepSettings(grad_clip=1.0, seed=0)
    make = lambda m: adamw(AdamWConfig(lr=1e-2), m)  # noqa: E731
    return model, objective, make, cosine(ScheduleConfig(warmup=0.2), STEPS), settings


def from_data(objective):
    """24 units of two documents each, packed; 4 rows a step, 2 a micro-batch."""
    draw = np.random.default_rng(0)
    documents = []
    for _ in range(24):
        prompt = draw.integers(1, VOCAB, draw.integers(1, 5)).tolist()
        for _ in range(2):
            ids = prompt + draw.integers(1, VOCAB, draw.integers(1, 9)).tolist()
            documents.append(Encoded(ids, [i >= len(prompt) or objective.reads == "text" for i in range(len(ids))]))
    columns = (
        {"desirable": np.repeat(draw.integers(0, 2, 24), 2).astype(np.float32)} if objective.reads == "labels" else {}
    )
    group = 2 if objective.reads in ("pairs", "labels") else 1
    table = table_of(documents, [str(i) for i in range(48)], group=group, columns=columns)
    steps = StepDataset(table, size=4, micro_size=2, length=LENGTH, pad_id=0, seed=0, batch=objective.batch)
    companions = {name: tiny_llama(VOCAB, seed=2, context=LENGTH) for name in objective.companions}
    return ObjectiveModule(*parts(objective), companions=companions), [steps[i] for i in range(STEPS)]


class Questions(Listed):
    """An answer is worth its number of letters e, less a tenth of its length."""

    def score(self, example, completion):
        return Score(completion.count("e") - len(completion) / 10, False)


def from_samples(objective):
    """Two updates on each rollout of 4 prompts with 4 answers."""
    tokenizer = train_bpe(BPEConfig(vocab_size=300), ["the river and the stone"] * 3)
    examples = [
        {
            "id": f"q{i}",
            "messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "the"}],
            "answer": "the",
        }
        for i, text in enumerate(["the river?", "and?", "stone", "so the stone?", "a", "river river"])
    ]
    source = Questions(examples)
    model, *others = parts(objective)
    model, reference = (tiny_llama(tokenizer.vocab_size, seed=s, context=64, dropout=0.1) for s in (1, 2))
    module = RolloutModule(
        model, *others, {name: reference for name in objective.companions},
        backend=NativeBackend(NativeConfig(), model, tokenizer), source=source, tokenizer=tokenizer,
        rollouts=RolloutSettings(4, 2, 8, 0.9, 2, 4, 64),  # with seed 0 one draw is 1e-8 from falling on another token
    )  # fmt: skip
    steps = PromptDataset(source, tokenizer, size=4, updates=2, seed=0)
    return module, [steps[i] for i in range(STEPS)]


def losses(name):
    objective = RECIPES[name]
    module, items = (from_samples if objective.reads == "answers" else from_data)(objective)
    run_through(module, items)
    return [row["train/loss"] for row in module.rows()]


@pytest.mark.parametrize("name", RECIPES)
def test_losses_are_those_that_were_looked_at(name):
    path, found, here = GOLDEN / f"{name}.json", losses(name), machine()
    assert len(found) == STEPS and len(set(found)) == STEPS
    if os.environ.get("TRIVIUM_RENEW_GOLDEN"):
        path.write_text(json.dumps({"machine": here, "losses": [x.hex() for x in found]}, indent=1) + "\n")
    kept = json.loads(path.read_text())
    known = [float.fromhex(x) for x in kept["losses"]]
    if kept["machine"] == here:
        first = next((i for i in range(STEPS) if found[i].hex() != kept["losses"][i]), None)
        assert first is None, (
            f"{name}: the loss of step {first + 1} is {found[first]!r} and was {known[first]!r}. If that is meant, "
            f"renew the file with `{RENEW}`, look at the difference, and say why in the commit"
        )
    else:
        warnings.warn(f"golden losses of {name} are of another machine {kept['machine']}: TO 1e-4 ONLY", stacklevel=1)
        assert found == pytest.approx(known, abs=1e-4), f"{name}; if meant, renew the file with `{RENEW}`"


def test_one_bit_of_one_weight_shows():
    """A weight of the last norm is the next number of fp32 after 1: some loss among ten is another."""
    module, items = from_data(RECIPES["pretrain"])
    with torch.no_grad():
        module.model.norm.weight[0] = float(np.nextafter(np.float32(1), np.float32(2)))
    run_through(module, items)
    assert [row["train/loss"] for row in module.rows()] != losses("pretrain")
