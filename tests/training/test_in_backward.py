"""Steps in the backward pass: the same weights as steps after it, and what cannot go with them."""

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from trivium.errors import ConfigError
from trivium.models.config import LlamaConfig
from trivium.models.llama import Llama
from trivium.objectives.config import NextTokenConfig
from trivium.objectives.next_token import NextToken
from trivium.schema import BatchConfig, GuardConfig, RunConfig, TrainerConfig
from trivium.training.objective_module import ObjectiveModule, StepSettings
from trivium.types import TokenBatch

VOCAB = 31


def steps(count):
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        tokens = torch.randint(VOCAB, (3, 10), generator=generator)
        labels = tokens.clone()
        labels[:, 0] = -100
        yield [TokenBatch(tokens, labels, torch.arange(10).expand(3, 10).contiguous())]


def train(in_backward, optimizer, tied=True):
    model = Llama(LlamaConfig(dim=8, layers=2, heads=2, kv_heads=1, ffn_dim=12, context=16, tied=tied), VOCAB)
    model.init_weights(1)
    settings = StepSettings(0.0, 0, guard=GuardConfig(policy="off"), in_backward=in_backward)
    module = ObjectiveModule(model, NextToken(NextTokenConfig()), optimizer, lambda step: 1 / (step + 1), settings)
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(list(steps(5)), batch_size=None))
    return module, list(module.rows())


OPTIMIZERS = {
    "adamw": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2, weight_decay=0.1, fused=True),
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=1e-2, momentum=0.9),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("tied", [True, False])
def test_weights_state_and_figures_are_the_same_to_the_bit(name, tied):
    """Five steps; a tied matrix has one gradient, from both its uses, before it is stepped."""
    (usual, rows), (here, ours) = (train(flag, OPTIMIZERS[name], tied) for flag in (False, True))
    for p, q in zip(usual.model.parameters(), here.model.parameters(), strict=True):
        assert torch.equal(p, q) and q.grad is None
        one, other = usual.optimizer.state[p], here.optimizer.state[q]
        assert one and all(torch.equal(torch.as_tensor(one[k]), torch.as_tensor(other[k])) for k in one)
    for one, other in zip(rows, ours, strict=True):
        assert one["train/loss"] == other["train/loss"] and one["lr"] == other["lr"]
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-6)


def test_never_two_gradients_at_once():
    held = []

    def make(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        optimizer.register_step_pre_hook(lambda *_: held.append(sum(p.grad is not None for p in model.parameters())))
        return optimizer

    module, _ = train(True, make)
    assert held == [1] * 5 * len(list(module.model.parameters()))


def test_an_optimizer_that_needs_all_gradients_is_refused():
    class Other(torch.optim.SGD):
        pass

    with pytest.raises(ConfigError, match="steps one parameter at a time, which Other cannot do"):
        train(True, lambda m: Other(m.parameters(), lr=1e-2))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, "trainer.grad_clip=1.0 must be 0"),
        ({"trainer": {"grad_clip": 0.0}}, "guard.policy=stop must be off"),
        ({"trainer": {"grad_clip": 0.0}, "guard": {"policy": "off"}}, "batch.micro_size=8 must be 16"),
    ],
)
def test_what_cannot_go_with_it_is_refused(change, said):
    with pytest.raises(ConfigError, match=said):
        RunConfig(
            data=object(),
            batch=BatchConfig(micro_size=8),
            trainer=TrainerConfig(step_in_backward=True, **change.get("trainer", {})),
            guard=GuardConfig(**change.get("guard", {})),
        )
