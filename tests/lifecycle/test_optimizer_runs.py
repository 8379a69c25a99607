"""Real runs with each optimizer: what is restored from a checkpoint ends where the unbroken run did, bit for bit.

muon and schedule_free are killed besides (test_kill.py).
"""

import hashlib
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from trivium.plugin import discover
from trivium.registry import extra

discover()
NAMES = [n for n in extra("optimizers") if not n.startswith("paged") or torch.cuda.is_available()]
SHORT = ("trainer.max_steps=6", "checkpoint.every_steps=4")


def digest(run):
    """One SHA-256 over all tensors of the last checkpoint."""
    files = sorted((run / "checkpoints/step-6").glob("*.safetensors"))
    assert {"model.safetensors", "optimizer.safetensors"} <= {f.name for f in files}
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()


def done(fork, overrides):
    process = fork(*overrides).done()
    assert process.returncode == 0, process.err
    return process.out


def goes_on_from_step_4(fork, overrides, run):
    """Run to the end, lose the last checkpoint, run again: the same bytes. Returns what the first run said."""
    said = done(fork, overrides)
    expected = digest(run)
    shutil.rmtree(run / "checkpoints/step-6")
    assert "continues from" in done(fork, overrides)
    assert digest(run) == expected
    return said


@pytest.mark.parametrize("name", NAMES)
def test_run_goes_on_from_its_checkpoint(name, fork, pretraining, tmp_path):
    overrides = pretraining(tmp_path, name, f"optim={name}", "model.dropout=0.1", *SHORT)
    said = goes_on_from_step_4(fork, overrides, tmp_path / name)
    rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [1, 2, 3, 4, 5, 6]
    assert len({r["train/loss"] for r in rows}) == 6 and all(r["grad_norm"] > 0 for r in rows)
    assert ("expects schedule=constant" in said.replace("\n", " ")) == (name == "schedule_free")


def test_others_get_the_average_of_schedule_free(fork, pretraining, tmp_path):
    """model.safetensors is x; training goes on from y = 0.1 z + 0.9 x, which is kept beside it."""
    done(fork, pretraining(tmp_path, "sf", "optim=schedule_free", "schedule=constant", *SHORT))
    files = {
        n: load_file(tmp_path / f"sf/checkpoints/step-6/{n}.safetensors") for n in ("model", "training", "optimizer")
    }
    for name, y in files["training"].items():
        x, z = (files["optimizer"][f"{name}.{entry}"] for entry in ("x", "z"))
        assert torch.equal(files["model"][name], x) and not torch.equal(x, y)
        torch.testing.assert_close(y, 0.1 * z + 0.9 * x)


def test_reward_model_with_frozen_embedding(fork, rewarding, tuned, tmp_path):
    """Frozen weights are those of the start; the score head learns; the rest is restored as ever."""
    freeze = 'optim.groups=[{match: "embed*", freeze: true}, {match: "score*", lr: 2.0}]'
    goes_on_from_step_4(fork, rewarding(tmp_path, "judge", freeze, *SHORT), tmp_path / "judge")
    start = load_file(tuned / "checkpoints/step-120/model.safetensors")
    end = load_file(tmp_path / "judge/checkpoints/step-6/model.safetensors")
    moments = load_file(tmp_path / "judge/checkpoints/step-6/optimizer.safetensors")
    assert torch.equal(start["embed.weight"], end["embed.weight"])
    assert end["score.weight"].abs().max() > 0
    assert not torch.equal(start["blocks.0.attn.q.weight"], end["blocks.0.attn.q.weight"])
    assert {n.rpartition(".")[0] for n in moments} == end.keys() - {"embed.weight"}


def test_another_average_beside_schedule_free_is_refused(fork, pretraining, tmp_path):
    process = fork(*pretraining(tmp_path, "two", "optim=schedule_free", "trainer.average=0.9")).done()
    assert process.returncode == 2
    assert "keeps an average of the weights itself; leave trainer.average at 0" in process.err.replace("\n", " ")
