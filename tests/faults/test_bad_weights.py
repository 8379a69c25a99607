"""2,000 damaged copies each of a config.json and of a safetensors file: one kind of error, or a sound model."""

import json
import random
import resource
import time

import pytest
import torch
from safetensors.torch import save_file

from trivium.build import load_artifact
from trivium.errors import TriviumError
from trivium.models.config import LlamaConfig
from trivium.models.llama import Llama
from trivium.models.weights import weights_of
from trivium.plugin import discover

discover()
COPIES = 2_000
ODD = [None, True, -1, 0, 1, 3, 10**9, 10**30, -(10**30), 1e308, float("nan"), float("inf"), "", "7", "x" * 10_000, [],
       [1], {}, {"rope_type": "yarn"}, {"rope_type": ["llama3"], "factor": "2"}, "default"]  # fmt: skip


@pytest.fixture
def folder(trained, tmp_path):
    """A small sound folder, its tokenizer that of the trained run."""
    tokenizer = load_artifact(str(trained)).tokenizer
    model = Llama(LlamaConfig(dim=16, layers=2, heads=2, kv_heads=1, ffn_dim=24, context=32), tokenizer.vocab_size)
    model.init_weights(0)
    names = model.hf_names()
    save_file({names[n]: t for n, t in weights_of(model).items()}, tmp_path / "model.safetensors")
    config = {"model_type": "llama", **model.hf_config(), "rope_scaling": {"rope_type": "llama3", "factor": 2.0}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tokenizer.save(tmp_path)
    assert load_artifact(str(tmp_path)).model(None)[0].num_parameters == model.num_parameters
    return tmp_path


def damaged_bytes(content, rng):
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 8])):
        kind = rng.randrange(5)
        if len(data) < 9:
            break
        at = rng.randrange(min(len(data), 3000)) if rng.random() < 0.8 else rng.randrange(len(data))
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data = data[: max(1, at)]
        elif kind == 2:
            data[at:at] = rng.randbytes(rng.choice([1, 8, 100]))
        elif kind == 3:
            data[at : at + 8] = rng.choice([b"\xff" * 8, b"\x00" * 8, (2**40).to_bytes(8, "little")])
        else:
            data[at : at + rng.choice([1, 20])] = b""
    return bytes(data)


def damaged_config(content, rng):
    if rng.random() < 0.3:
        return damaged_bytes(content, rng)
    tree = json.loads(content)
    for _ in range(rng.choice([1, 1, 2, 3])):
        tree[rng.choice(list(tree))] = rng.choice(ODD)
    return json.dumps(tree).encode()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_damage_is_one_kind_of_error(name, folder, monkeypatch):
    """Never another exception, never over a second or 200 MB; what is read is finite and of the size it says."""
    tokenizer = load_artifact(str(folder)).tokenizer
    monkeypatch.setattr("trivium.build.Tokenizer.load", lambda _folder: tokenizer)  # not what is damaged here
    sound, rng = (folder / name).read_bytes(), random.Random(0)
    damage = damaged_config if name == "config.json" else damaged_bytes
    before, slowest, refused = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0.0, 0
    for _ in range(COPIES):
        content = damage(sound, rng)
        (folder / name).write_bytes(content)
        began = time.perf_counter()
        try:
            model, _ = load_artifact(str(folder)).model(None)
            assert all(torch.isfinite(p).all() for p in model.parameters())
        except TriviumError as error:
            refused += 1
            assert "\n" not in str(error)[:400] or "Traceback" not in str(error)
        slowest = max(slowest, time.perf_counter() - began)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"{refused} of {COPIES} refused, slowest {slowest:.3f} s, {grown:.0f} MB more")
    assert refused > COPIES / 4
    assert grown < 200
    assert slowest < 1.0
