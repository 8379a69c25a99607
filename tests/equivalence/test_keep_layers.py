"""A shallower model that starts from some layers of a deeper one is that model with the other layers taken out."""

import re

import pytest
import torch
from safetensors.torch import load_file

from trivium.models.config import LlamaConfig
from trivium.models.llama import Llama
from trivium.models.weights import keep_layers, load_weights, spread_layers, weights_of

SIZES = {"dim": 32, "heads": 4, "kv_heads": 2, "ffn_dim": 48, "context": 64}


@pytest.mark.parametrize(
    ("layers", "kept", "expected"),
    [(5, 2, [0, 4]), (5, 5, [0, 1, 2, 3, 4]), (6, 3, [0, 2, 5]), (4, 1, [0]), (12, 6, [0, 2, 4, 7, 9, 11])],
)
def test_kept_layers_are_spread_from_first_to_last(layers, kept, expected):
    assert spread_layers(layers, kept) == expected


def test_shallow_model_is_the_deep_one_without_the_other_layers():
    """Layers 0, 2 and 4 of five, by cutting the deep model's own list of blocks."""
    deep = Llama(LlamaConfig(layers=5, **SIZES), 40)
    deep.init_weights(0)
    shallow = Llama(LlamaConfig(layers=3, **SIZES), 40)
    load_weights(shallow, keep_layers(weights_of(deep), [0, 2, 4]), "deep")
    deep.blocks = torch.nn.ModuleList([deep.blocks[i] for i in (0, 2, 4)])
    tokens = torch.arange(24).view(2, 12)
    positions = torch.arange(12).expand(2, -1)
    assert torch.equal(shallow.eval()(tokens, positions), deep.eval()(tokens, positions))


def test_tuning_starts_from_the_kept_layers(main, trained, tmp_path):
    """One of two layers: the run says so, its checkpoint has one, and its untouched start equals the parent's first."""
    command = ["phase=sft", f"init_from={trained}", f"runs={tmp_path}", "name=small", "data.parts=[tasks]",
               "data.num_tasks=60", "trainer.max_steps=1", "batch.size=2", "batch.micro_size=2", "batch.length=64",
               "validation.every_steps=0", "optim.lr=1e-12", "optim.weight_decay=0"]  # fmt: skip
    done = main(*command, "keep_layers=1", "samples.every_steps=0")
    assert done.code == 0, done.err
    assert "starts from 1 layers of" in done.out.replace("\n", " ")
    small = load_file(tmp_path / "small/checkpoints/step-1/model.safetensors")
    large = load_file(trained / "checkpoints/step-6/model.safetensors")
    assert {n.split(".")[1] for n in small if n.startswith("blocks")} == {"0"}
    for name, tensor in small.items():
        torch.testing.assert_close(tensor, large[name], rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["keep_layers=3"], "keep_layers=3: .* has 2 layers"),
        (["keep_layers=-1"], "keep_layers=-1 takes layers of a trained model"),
    ],
)
def test_layers_that_are_not_there_are_refused(main, trained, tmp_path, overrides, sentence):
    done = main("phase=sft", f"init_from={trained}", f"runs={tmp_path}", "data.num_tasks=60", *overrides)
    assert done.code == 2
    assert re.search(sentence, done.err.replace("\n", " "))


def test_layers_of_nothing_are_refused(main, tmp_path):
    done = main("phase=sft", "model=primer", "keep_layers=2", f"runs={tmp_path}")
    assert done.code == 2 and "name it in init_from=" in done.err
