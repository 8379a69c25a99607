"""Several processes train one model: real ones, over gloo. What they learn is what one process learns."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from trivium.compose import Component
from trivium.errors import ConfigError
from trivium.models.config import LlamaConfig
from trivium.models.llama import Llama
from trivium.schema import BatchConfig, RunConfig, TrainerConfig
from trivium.training.config import AdamWConfig
from trivium.training.parallel import ALONE, World
from trivium.training.shard import sharding
from trivium.training.tensorfile import write_tensors

SCRIPT = Path(__file__).with_name("ranks.py")
spec = importlib.util.spec_from_file_location("ranks", SCRIPT)
ranks = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ranks)


def made_by(count, folder):
    """What `count` processes made of all of their runs: found(name, rank) -> figures and tensors."""
    place = {"WORLD_SIZE": str(count), "TRIVIUM_RENDEZVOUS": str(folder / "meet"), "GLOO_SOCKET_IFNAME": "lo"}
    started = [
        subprocess.Popen(
            [sys.executable, SCRIPT, folder],
            env={**os.environ, "OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank), **place},
            stderr=subprocess.PIPE, text=True,
        )
        for rank in range(count)
    ]  # fmt: skip
    said = [process.communicate(timeout=300)[1] for process in started]
    assert not any(process.returncode for process in started), "\n".join(text[-3000:] for text in said)
    assert not any("Warning" in text for text in said), said

    def found(name, rank=0):
        facts = json.loads((folder / f"{name}.{rank}.json").read_text())
        tensors = folder / f"{name}.{rank}.safetensors"
        made = {"tensors": load_file(tensors), "file": folder / f"{name}.file"} if tensors.is_file() else {}
        return facts | made

    return found


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """ranks.RUNS, by two processes."""
    return made_by(2, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """ranks.RUNS_OF_FOUR, by four."""
    return made_by(4, tmp_path_factory.mktemp("four"))


@pytest.fixture(scope="module")
def alone():
    """alone(**settings) -> the same of one process, with all rows of a step at once; each made once."""
    made = {}

    def found(**settings):
        key = json.dumps(settings)
        if key not in made:
            before = torch.get_num_threads()
            torch.set_num_threads(1)
            made[key] = ranks.train(ALONE, "auto", **{"size": 8, **settings})
            torch.set_num_threads(before)
        return made[key]

    return found


def apart(one, other):
    assert one["tensors"].keys() == other["tensors"].keys()
    return max((one["tensors"][k].double() - other["tensors"][k].double()).abs().max().item() for k in one["tensors"])


def equal_runs(one, other, tolerance):
    """Losses, norms, counts, validation, weights and optimizer state."""
    assert [r.keys() for r in one["rows"]] == [r.keys() for r in other["rows"]]
    for mine, theirs in zip(one["rows"], other["rows"], strict=True):
        assert mine == pytest.approx(theirs, rel=tolerance)
        assert mine["tokens"] == theirs["tokens"]
    assert one["val/loss"] == pytest.approx(other["val/loss"], rel=1e-6)  # summed in fp32, whatever the weights are
    assert apart(one, other) < tolerance


SAME = [name for name in ranks.RUNS if "nan" not in name and "bf16" not in name]


@pytest.mark.parametrize("name", SAME)
def test_two_processes_learn_what_one_does(name, together, alone):
    """fp64, six steps of AdamW with clipping, 1 to 4 micro-batches a process, ragged, one process at times without a
    trained token. 1e-12 is rounding: sums over ranks and micro-batches in another order."""
    _, settings = ranks.RUNS[name]
    expected = alone(**{k: v for k, v in settings.items() if k not in ("size", "recompute")})
    # neftune's noise, of size 1e-9, is drawn by each process; averages are kept in fp32
    # GPT-2's keys have a bias, whose gradient is 0 but for rounding, of which AdamW makes steps of 1e-11
    tolerance = {"neftune": 1e-8, "average": 1e-6, "gpt2": 1e-10}.get(name.split()[1], 1e-12)
    equal_runs(together(name), expected, tolerance)
    equal_runs(together(name, rank=1), together(name), 1e-300)  # the processes have the very same bits


@pytest.mark.parametrize("name", ranks.RUNS_OF_FOUR)
def test_four_processes_learn_what_one_does(name, four, alone):
    """Pairs that compute each block together, and share their weights out between them."""
    _, settings = ranks.RUNS_OF_FOUR[name]
    equal_runs(four(name), alone(**{k: v for k, v in settings.items() if k not in ("size", "recompute")}), 1e-12)
    for rank in (1, 2, 3):
        equal_runs(four(name, rank), four(name), 1e-300)


@pytest.mark.parametrize("name", [n for n in (*SAME, *ranks.RUNS_OF_FOUR) if not n.startswith("ddp")])
def test_file_that_all_write_is_what_they_hold_together(name, together, four, tmp_path):
    """Weights cut once, or twice (in a pair, then between pairs); each reads its own part back."""
    made = four if name in ranks.RUNS_OF_FOUR else together
    found = made(name)
    assert found["read"] and made(name, rank=1)["read"]
    whole = {n: t for n, t in found["tensors"].items() if not n.startswith("optimizer ")}
    if "average" not in name:  # there it holds what training goes on from
        write_tensors(tmp_path / "whole", whole)
        assert (tmp_path / "whole").read_bytes() == found["file"].read_bytes()


@pytest.mark.parametrize("name", [name for name in ranks.RUNS if "bf16" in name])
def test_bf16_gradients_of_several_micro_batches_are_whole(name, together, alone):
    """Rounding in bf16 is 0.4 %. Weights that autocast kept from an earlier micro-batch lost a sixth of a gradient to
    the step after, and with it what the guard knew of.

    DDP and FSDP2 round as one process does that cuts a step alike, so they equal it. Tensor parallelism rounds sums
    that nobody else makes: over six steps of large weights it leaves another bf16 run's path, and is held to fp32's.
    """
    strategy, settings = ranks.RUNS[name]
    far, close = (3e-2, 5e-3) if strategy == "tensor" else (1e-3, 1e-3)
    expected = alone(**({"precision": "fp32"} if strategy == "tensor" else settings))["rows"]
    for rank in (0, 1):
        found = together(name, rank)["rows"]
        assert len(found) == len(expected) == 6
        for ours, theirs in zip(found, expected, strict=True):
            assert ours["train/loss"] == pytest.approx(theirs["train/loss"], rel=close)
            assert ours["grad_norm/attn"] == pytest.approx(theirs["grad_norm/attn"], rel=far)
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=far)


def test_runs_would_show_what_is_wrong(alone):
    """What the test above compares moves by far more than its tolerance: an unaveraged gradient would be seen."""
    still = alone(steps=1)
    assert apart(alone(), still) > 1e-2
    assert apart(alone(), alone(average=0.9)) > 1e-3


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "tensor"])
@pytest.mark.parametrize("bad", ["loss_nan", "gradient_nan"])
def test_nan_on_one_process_changes_no_weight_of_any(strategy, bad, together):
    start = Llama(LlamaConfig(dim=16, layers=2, heads=4, kv_heads=2, ffn_dim=24, init_std=0.3), ranks.VOCAB)
    start.init_weights(seed=3)
    for rank in (0, 1):
        found = together(f"{strategy} {bad}", rank)
        (row,) = found["rows"]
        assert row["skipped"] == 1 and row["tokens"] == 96 and row["train/loss"] is None
        assert (row["grad_norm"] is None) == (bad == "gradient_nan")
        for name, parameter in start.named_parameters():
            assert torch.equal(found["tensors"][name], parameter.detach().double()), name
        state = [v for k, v in found["tensors"].items() if k.startswith("optimizer") and not k.endswith("step")]
        assert state and not any(v.any() for v in state)


@pytest.mark.parametrize(
    ("tensor", "changes", "said"),
    [
        (2, {"heads": 2, "kv_heads": 1}, "trainer.tensor_parallel=2 does not divide the 1 heads of attn.k"),
        (4, {"heads": 4, "kv_heads": 4, "ffn_dim": 42}, "parallel=4 does not divide the 42 columns of ffn.gate"),
    ],
)
def test_blocks_that_cannot_be_cut_evenly_are_refused(tensor, changes, said):
    model = Llama(LlamaConfig(**{"dim": 16, "layers": 1, "ffn_dim": 24, **changes}), ranks.VOCAB)
    trainer = TrainerConfig(devices=4, strategy="fsdp", tensor_parallel=tensor)
    optim = Component("adamw", AdamWConfig())
    config = RunConfig(data=object(), trainer=trainer, batch=BatchConfig(size=4, micro_size=1), optim=optim)
    shard = sharding(config, World(size=4, tensor=tensor), torch.device("cpu"))
    with pytest.raises(ConfigError, match=re.escape(said)):
        shard(model)
    type(model).tensor_plan, plan = {}, type(model).tensor_plan
    try:
        with pytest.raises(ConfigError, match="Llama has no tensor_plan"):
            shard(model)
    finally:
        type(model).tensor_plan = plan


def test_processes_agree(together):
    for rank in (0, 1):
        facts = together("facts", rank)
        assert facts["any"] == [False, True] and facts["most"] == 2
        assert facts["gather"] == [{"rank": 0, "text": "x"}, {"rank": 1, "text": "xx"}]
        assert facts["read"] == "by the first"
        assert facts["same"] == ""
        assert facts["other"].endswith("different settings: optim.lr is 1.0 on rank 0 and 2.0 on rank 1")
