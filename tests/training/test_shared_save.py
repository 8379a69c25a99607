"""Weights that are shared out among processes: each writes its own part of one file, which is that of one process.

Three real gloo processes, so that no size can be shared out evenly; this file is also what each of them runs.
"""

import errno
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from trivium.errors import TriviumError
from trivium.models.config import LlamaConfig
from trivium.models.llama import Llama
from trivium.models.weights import load_weights, local, read_tensors, shares_of, weights_of
from trivium.training.background import Background
from trivium.training.checkpoint import CheckpointStore, Contents, verify
from trivium.training.config import AdamWConfig
from trivium.training.optim import adamw, load_optimizer, named, optimizer_tensors
from trivium.training.parallel import ALONE, World, join, leave, placed
from trivium.training.shard import Shards
from trivium.training.tensorfile import write_tensors

PROCESSES, CPU = 3, torch.device("cpu")
ODD = {"rows": ((7, 5), 0), "columns": ((5, 7), 1), "middle": ((2, 5, 3), 1), "few": ((2, 3), 0), "line": ((4,), 0)}
"""Shapes, and the dimension that is cut; of two rows the third process has none."""
SIZES = {"dim": 16, "layers": 2, "heads": 4, "kv_heads": 2, "ffn_dim": 24, "context": 12}


def counted(shape):
    return torch.arange(torch.tensor(shape).prod().item(), dtype=torch.float32).reshape(shape)


def trained(seed):
    """A small model and its optimizer after one step, whole."""
    model = Llama(LlamaConfig(**SIZES), 61)
    model.init_weights(seed)
    return model, adamw(AdamWConfig(lr=1e-2), model)


def stepped(model, optimizer):
    """As if trained for a step: every gradient is the weight itself."""
    for parameter in model.parameters():
        parameter.grad = parameter.detach().clone()
    optimizer.step()
    return model, optimizer


def contents(model, optimizer):
    tensors = {n: p.detach() for n, p in model.named_parameters()}
    files = {"model.safetensors": tensors, "optimizer.safetensors": optimizer_tensors(optimizer)}
    return Contents({k: shares_of(v) for k, v in files.items()}, {"state.json": {"step": 1}}, {})


def kilobytes(name):
    return int(re.search(name + r":\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def said(action):
    try:
        action()
    except TriviumError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def main(folder: Path) -> None:
    world = join(replace(placed(), local_size=PROCESSES), CPU)
    facts, mesh = {}, init_device_mesh("cpu", (PROCESSES,))

    odd = {k: distribute_tensor(counted(shape), mesh, [Shard(cut)]) for k, (shape, cut) in ODD.items()}
    write_tensors(folder / "odd.safetensors", {**shares_of(odd), "whole": torch.ones(3)}, world)
    back = read_tensors(folder / "odd.safetensors", odd.get)
    facts["read"] = {k: torch.equal(local(back[k]), local(odd[k])) for k in odd}

    model, _ = trained(seed=3)
    Shards(model, world, CPU)
    model, optimizer = stepped(model, adamw(AdamWConfig(lr=1e-2), model))
    store = CheckpointStore(folder / "checkpoints", world=world.apart())
    found, background = contents(model, optimizer), Background()
    held = found.held()
    background.start(lambda: store.save(1, held))  # beside the main thread, which has connections of its own
    counts = [world.most(world.rank + i) for i in range(20)]
    background.wait()
    facts["counts"] = counts
    other, empty = trained(seed=4)  # another start, which takes up the checkpoint
    Shards(other, world, CPU)
    empty = adamw(AdamWConfig(lr=1e-2), other)
    weights, state = dict(other.named_parameters()), named(empty)
    saved = folder / "checkpoints/step-1"
    load_weights(other, read_tensors(saved / "model.safetensors", weights.get), "a test")
    likes = read_tensors(saved / "optimizer.safetensors", lambda key: state[key.rpartition(".")[0]][0])
    load_optimizer(empty, likes, "a test")
    both = stepped(model, optimizer), stepped(other, empty)  # the same step from both: every bit must be there
    facts["resumed"] = all(
        torch.equal(local(a), local(b)) for a, b in zip(*(m.parameters() for m, _ in both), strict=True)
    )
    whole = weights_of(other, keep=world.is_first)
    if world.is_first:
        write_tensors(folder / "after.safetensors", whole)

    bad = contents(model, optimizer)
    if world.rank == 2:
        bad.tensors["model.safetensors"]["embed.weight"].block[-1, -1] = torch.nan
    facts["not finite"] = said(lambda: store.save(2, bad))
    real = os.fsync

    def full(descriptor):
        if world.rank == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    os.fsync = full
    facts["disk full"] = said(lambda: store.save(3, contents(other, empty)))
    os.fsync = real

    big = distribute_tensor(torch.ones(48, 1 << 20), mesh, [Shard(0)])  # 192 MiB, 64 of them here
    world.barrier()
    Path("/proc/self/clear_refs").write_text("5")
    before = kilobytes("VmRSS")
    write_tensors(folder / "big.safetensors", shares_of({"big": big}), world)
    facts["growth"] = (kilobytes("VmHWM") - before) / (192 << 10)
    (folder / f"{world.rank}.json").write_text(json.dumps(facts))
    leave(world)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def facts(folder):
    """What each of three processes saw."""
    place = {"WORLD_SIZE": str(PROCESSES), "TRIVIUM_RENDEZVOUS": str(folder / "meet"), "GLOO_SOCKET_IFNAME": "lo"}
    started = [
        subprocess.Popen(
            [sys.executable, __file__, folder],
            env={**os.environ, "OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank), **place},
            stderr=subprocess.PIPE, text=True,
        )
        for rank in range(PROCESSES)
    ]  # fmt: skip
    told = [process.communicate(timeout=300)[1] for process in started]
    assert [process.returncode for process in started] == [0] * PROCESSES, "\n".join(t[-3000:] for t in told)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(PROCESSES)]


def test_file_is_byte_for_byte_that_of_one_process(facts, folder, tmp_path):
    """Rows, columns, a middle dimension, fewer rows than processes; a trained model and its optimizer."""
    alone = {**{k: counted(shape) for k, (shape, _) in ODD.items()}, "whole": torch.ones(3)}
    size, digest = write_tensors(tmp_path / "odd.safetensors", alone)
    assert (tmp_path / "odd.safetensors").read_bytes() == (folder / "odd.safetensors").read_bytes()
    assert size == (folder / "odd.safetensors").stat().st_size and len(digest) == 64
    store = CheckpointStore(tmp_path / "checkpoints")
    store.save(1, contents(*stepped(*trained(seed=3))))
    for name in ("model.safetensors", "optimizer.safetensors", "CHECKPOINT.json"):
        ours, theirs = (f / "checkpoints/step-1" / name for f in (tmp_path, folder))
        assert ours.read_bytes() == theirs.read_bytes(), name


def test_each_process_reads_its_own_part_and_goes_on_bit_for_bit(facts, folder):
    assert [f["read"] for f in facts] == [dict.fromkeys(ODD, True)] * PROCESSES
    assert all(f["resumed"] for f in facts)
    once, twice = load_file(folder / "checkpoints/step-1/model.safetensors"), load_file(folder / "after.safetensors")
    model, optimizer = stepped(*stepped(*trained(seed=3)))
    assert all(torch.equal(twice[n], p) for n, p in model.named_parameters())
    assert not torch.equal(once["embed.weight"], twice["embed.weight"])


def test_saving_beside_training_keeps_the_processes_words_apart(facts):
    assert [f["counts"] for f in facts] == [[2 + i for i in range(20)]] * PROCESSES


def test_what_fails_on_one_process_fails_on_all_and_leaves_the_last_checkpoint(facts, folder):
    one = "TrainingError: step 2: embed.weight in model.safetensors is no longer finite; it is not saved, the last "
    assert facts[2]["not finite"] == f"{one}checkpoint is sound"
    assert all(re.fullmatch(r"PeerLost: another process could not write \S+", f["not finite"]) for f in facts[:2])
    name = re.escape(str(folder / "checkpoints/step-3"))
    refused = rf"CheckpointError: {name}\.tmp-\d+/model.safetensors cannot be written: No space left on device"
    assert re.fullmatch(refused, facts[1]["disk full"]), facts[1]["disk full"]
    assert all(f["disk full"].startswith("PeerLost: ") for f in (facts[0], facts[2]))
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["LATEST", "step-1"]
    assert verify(folder / "checkpoints/step-1")["step"] == 1


def test_no_process_holds_more_than_its_part(facts):
    """192 MiB shared out: gathered, the first process would grow by all of them."""
    print("growth over the whole's size:", [round(f["growth"], 3) for f in facts])
    assert max(f["growth"] for f in facts) < 0.05


def test_of_one_process_together_is_plain():
    """No connection is needed, and an error passes as it is."""
    with pytest.raises(ZeroDivisionError), ALONE.together("divide"):
        _ = 1 / 0
    assert World().apart() == ALONE


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
    os._exit(0)
