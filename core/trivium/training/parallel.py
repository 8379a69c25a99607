"""Several processes that train one model: which of them this is, and what they agree on.

Every process makes the same run of the same settings; the first (rank 0) alone writes the run folder and fills caches.
Two groups of connections: `nccl` (GPU) or `gloo` (CPU) for tensors of the step, and a `gloo` group of its own for what
the hosts tell each other: who waits for whom, who got a signal. That one never touches the GPU's stream.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy

from trivium.errors import ConfigError, TriviumError
from trivium.lineage.manifest import digest_of
from trivium.training.processes import RENDEZVOUS

PATIENCE = timedelta(days=7)
"""How long a process waits for the first, which may be tokenising a large corpus. A death is noticed at once."""


class PeerLost(TriviumError):
    """Another process of this run has ended; its own error is the one to read."""

    exit_code = 75


@dataclass(frozen=True)
class World:
    """Which of `size` processes this one is. All methods of a world of one do nothing, at no cost."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1  # processes on each machine
    control: Any = None
    tensor: int = 1  # neighbours that compute each block together, on the same rows

    @property
    def is_first(self) -> bool:
        """Whether this process writes the run folder."""
        return self.rank == 0

    @property
    def share(self) -> int:
        """Whose share of a step's rows this process has, of `shares`."""
        return self.rank // self.tensor

    @property
    def shares(self) -> int:
        """Among how many processes, or groups of them, a step's rows are shared out."""
        return self.size // self.tensor

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            dist.barrier(self.control)

    @contextmanager
    def first(self) -> Iterator[None]:
        """The first process runs the body before the others do: it fills a cache, they read it."""
        if not self.is_first:
            self.barrier()
        yield
        if self.is_first:
            self.barrier()

    @contextmanager
    def together(self, what: str) -> Iterator[None]:
        """Every process runs the body; where it fails on one, the others raise PeerLost instead of waiting for it."""
        failure = None
        try:
            yield
        except Exception as error:
            failure = error
        try:
            failed = self.any(failure is not None)
        finally:
            if failure is not None:
                raise failure
        if failed:
            raise PeerLost(f"another process could not {what}")

    def apart(self) -> World:
        """The same world with connections of its own, for another thread. All processes make it at the same time."""
        return replace(self, control=dist.new_group(backend="gloo", timeout=PATIENCE)) if self.size > 1 else self

    def any(self, flag: bool) -> bool:
        """Whether `flag` holds on any process; the same answer on all."""
        return self.most(int(flag)) > 0

    def most(self, number: int) -> int:
        """The largest `number` of all processes."""
        if self.size == 1:
            return number
        value = torch.tensor([number])
        dist.all_reduce(value, dist.ReduceOp.MAX, self.control)
        return int(value)

    def gather(self, value: Any) -> list[Any]:
        """What each process has, by rank; plain data, which travels as JSON."""
        if self.size == 1:
            return [value]
        mine = json.dumps(value).encode()
        room = self.most(len(mine))
        padded = torch.frombuffer(bytearray(mine.ljust(room)), dtype=torch.uint8)
        all_of_them = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(all_of_them, padded, self.control)
        return [json.loads(bytes(x.tolist())) for x in all_of_them]

    def agree(self, what: Mapping[str, Any]) -> None:
        """Refuse to go on unless every process has the same settings. Raises ConfigError on all of them."""
        flat = dict(_flat("", what))
        told = self.gather(digest_of(flat))
        if len(set(told)) == 1:
            return
        other = next(rank for rank, digest in enumerate(told) if digest != told[0])
        ours, theirs = (self.gather(flat)[rank] for rank in (0, other))
        key = next(k for k in {**ours, **theirs} if ours.get(k) != theirs.get(k))
        raise ConfigError(
            f"the processes of one run were started with different settings: {key} is {ours.get(key)} on rank 0 and "
            f"{theirs.get(key)} on rank {other}"
        )


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(f"{prefix}.{key}" if prefix else key, inner)
    else:
        yield prefix, value


ALONE = World()


def placed(environment: Mapping[str, str] = os.environ) -> World:
    """The place that a launcher (ours, torchrun, srun) gave this process; a world of one where none did.

    >>> placed({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"})
    World(rank=3, size=4, local_rank=1, local_size=1, control=None, tensor=1)
    >>> placed({"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1"}).rank
    5
    >>> placed({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}) == World()
    True
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    elif int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1 and "SLURM_PROCID" in environment:
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
    else:
        return World()
    rank, size = int(environment[names[0]]), int(environment[names[1]])
    return World(rank, size, int(environment.get(names[2], rank))) if size > 1 else World()


def join(world: World, device: torch.device) -> World:
    """Meet the other processes. With a GPU each takes the one of its own local number."""
    if world.size == 1:
        return world
    store = None
    if RENDEZVOUS in os.environ:
        store = dist.FileStore(os.environ[RENDEZVOUS], world.size)  # type: ignore[reportPrivateImportUsage]
    elif "MASTER_ADDR" not in os.environ:  # srun sets none
        os.environ |= meeting_place(os.environ)
    if device.type == "cuda":
        if world.local_rank >= torch.cuda.device_count():
            raise ConfigError(f"trainer.devices={world.local_size}: this machine has {torch.cuda.device_count()} GPUs")
        torch.cuda.set_device(world.local_rank)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size)
    return replace(world, control=dist.new_group(backend="gloo", timeout=PATIENCE))


def meeting_place(slurm: Mapping[str, str]) -> dict[str, str]:
    """Where the tasks of a Slurm step meet: on its first machine, at a port that follows from job and step.

    >>> meeting_place({"SLURM_STEP_NODELIST": "gpu[07-09],gpu12", "SLURM_JOB_ID": "123456", "SLURM_STEP_ID": "1"})
    {'MASTER_ADDR': 'gpu07', 'MASTER_PORT': '19561'}
    """
    nodes = slurm.get("SLURM_STEP_NODELIST") or slurm.get("SLURM_JOB_NODELIST")
    if not nodes or not slurm.get("SLURM_JOB_ID"):
        raise ConfigError(
            "several processes, but neither MASTER_ADDR nor Slurm says where they meet; use torchrun or srun"
        )
    step = slurm.get("SLURM_STEP_ID", "0")
    port = 15000 + (10 * int(slurm["SLURM_JOB_ID"]) + (int(step) if step.isdigit() else 0)) % 10000
    address = SLURMEnvironment.resolve_root_node_address(nodes)
    return {"MASTER_ADDR": address, "MASTER_PORT": slurm.get("MASTER_PORT", str(port))}


def leave(world: World) -> None:
    """Part from the others, once all is done. After an error there is no parting: the process ends."""
    if world.size > 1:
        world.barrier()
        dist.destroy_process_group()


def lost_peer(error: BaseException) -> bool:
    """Whether `error` is what a process sees of another's death."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())


class Placed(ClusterEnvironment):
    """Tells Lightning what a world is; the connections are made already."""

    def __init__(self, world: World) -> None:
        self.world = world

    creates_processes_externally = True  # type: ignore[assignment]
    main_address = "127.0.0.1"  # type: ignore[assignment]
    main_port = 0  # type: ignore[assignment]

    @staticmethod
    def detect() -> bool:
        """Never by itself."""
        return False

    def world_size(self) -> int:
        return self.world.size

    def set_world_size(self, size: int) -> None:
        assert size == self.world.size, f"Lightning counts {size} processes of {self.world.size}"

    def global_rank(self) -> int:
        return self.world.rank

    def set_global_rank(self, rank: int) -> None:
        assert rank == self.world.rank, f"Lightning takes rank {self.world.rank} for {rank}"

    def local_rank(self) -> int:
        return self.world.local_rank

    def node_rank(self) -> int:
        return self.world.rank // self.world.local_size


def strategy_of(world: World, name: str) -> Strategy | str:
    """How Lightning runs this world: alone, with gradients averaged by DDP (Li et al. 2020, 2006.15704), or sharded."""
    if world.size == 1:
        return "auto"
    if name == "fsdp":
        return ModelParallelStrategy(data_parallel_size=world.shares, tensor_parallel_size=world.tensor)
    return DDPStrategy(broadcast_buffers=False, gradient_as_bucket_view=True)
