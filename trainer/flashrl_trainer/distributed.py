"""The ranks of one training job: start-up, the device of this rank, and the few collectives the trainer uses.

One process on a CPU is a job of one rank with the same calls. Knows nothing of models or data.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from flashrl_trainer.main_signal import MainSignal, RankLostError

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process's place in the job; objects go over gloo, tensors over the device's backend.

    Rows of parameters are sharded over `num_shards` ranks; with HSDP there are `world_size / num_shards` copies.
    """

    rank: int
    world_size: int
    device: torch.device
    mesh: DeviceMesh  # (world,), or (copies, shards)
    num_shards: int
    signal: MainSignal | None  # None in a job of one

    @property
    def is_main(self) -> bool:
        """Rank 0 talks to the service, the console and the run folder."""
        return self.rank == 0

    @property
    def shard(self) -> int:
        """Which rows this rank holds, of `num_shards`."""
        return self.rank % self.num_shards

    @property
    def replica(self) -> int:
        """Which copy of the model this rank is part of."""
        return self.rank // self.num_shards

    def first_row(self, num_rows: int) -> int:
        """Where the rows begin that this rank answers for; `num_rows` where it answers for none.

        FSDP2 cuts dimension 0 as torch.chunk does; the rows of further copies are the first one's.
        """
        rows = -(-num_rows // self.num_shards)
        return num_rows if self.replica else min(self.shard * rows, num_rows)

    def beat(self) -> None:
        """Rank 0, in the middle of work for `on_main`, shows that it gets on: the others' limit begins anew."""
        if self.signal is not None and self.is_main:
            self.signal.beat()

    def broadcast(self, value: T | None) -> T:
        """Rank 0's picklable `value` on every rank; only processes of this job are on the other end."""
        if self.world_size == 1:
            return value  # type: ignore[return-value]
        holder = [value]
        with self._naming_the_loss():
            dist.broadcast_object_list(holder, src=0, device=torch.device("cpu"))
        received = holder[0]
        assert received is not None
        return received

    def on_main(self, work: Callable[[], T]) -> T:
        """Run `work` on rank 0 and give its result to every rank; what it raises is raised everywhere.

        The others raise RankLostError where rank 0 shows no sign of life for as long as a collective may take.
        """
        outcome: tuple[T | None, BaseException | None] | None = None
        if self.is_main:
            try:
                outcome = work(), None
            except BaseException as error:  # the other ranks wait in the broadcast, whatever happened here
                outcome = None, error
            if self.signal is not None:
                self.signal.announce()
        elif self.signal is not None:
            self.signal.wait()
        value, raised = self.broadcast(outcome)
        if raised is not None:
            raise raised
        return value  # type: ignore[return-value]

    def gather(self, value: T) -> list[T]:
        """Every rank's value in rank order on rank 0, an empty list elsewhere."""
        gathered: list[T | None] | None = [None] * self.world_size if self.is_main else None
        with self._naming_the_loss():
            dist.gather_object(value, gathered, dst=0)
        return [item for item in gathered or [] if item is not None]

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the ranks, for a tensor on the CPU or on the device; int64 wraps modulo 2^64."""
        total = values.clone()
        with self._naming_the_loss():
            dist.all_reduce(total)
        return total

    def max(self, values: Tensor) -> Tensor:
        """Largest over the ranks, element by element."""
        largest = values.clone()
        with self._naming_the_loss():
            dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return largest

    @contextmanager
    def _naming_the_loss(self) -> Iterator[None]:
        """gloo and NCCL say "connection closed" or "timed out", not what to look at."""
        try:
            yield
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise RankLostError(
                f"rank {self.rank}: another rank has ended or hangs; see its output ({reason})"
            ) from error


def start_ranks(device: str, timeout_s: float, num_replicas: int = 1) -> Ranks:
    """Join the job that `torchrun` describes in the environment, or start one of a single rank.

    `device` is auto, cpu or cuda; `timeout_s` is how long a rank waits for the others in a collective, and for rank 0
    to get on with work of its own; `num_replicas` is the number of copies of the model. Raises ValueError for a CUDA
    device that does not exist, and for ranks that the copies cannot share.
    """
    wants_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if wants_cuda and not torch.cuda.is_available():
        raise ValueError("model.device: cuda was asked for and there is no CUDA device")
    world_size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if world_size % num_replicas:
        raise ValueError(f"model.hsdp_replicas: {world_size} ranks are no multiple of {num_replicas}")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    own_device = torch.device("cuda", local_rank) if wants_cuda else torch.device("cpu")
    if wants_cuda:
        torch.cuda.set_device(own_device)
    limit = timedelta(seconds=timeout_s)
    store = _job_store(limit) if world_size > 1 else dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if wants_cuda else "gloo",
        store=dist.PrefixStore("job", store),  # type: ignore[attr-defined]
        rank=rank,
        world_size=world_size,
        timeout=limit,
        device_id=own_device if wants_cuda else None,
    )
    main_store = dist.PrefixStore("main", store)  # type: ignore[attr-defined]
    signal = MainSignal(main_store, rank, timeout_s) if world_size > 1 else None
    num_shards = world_size // num_replicas
    return Ranks(rank, world_size, own_device, _mesh(own_device.type, num_replicas, num_shards), num_shards, signal)


def _job_store(limit: timedelta) -> Any:
    """The one that MASTER_ADDR and MASTER_PORT name: torchrun's, or one that rank 0 opens."""
    store, _, _ = next(dist.rendezvous("env://", timeout=limit))  # type: ignore[attr-defined]
    return store


def _mesh(device_type: str, num_replicas: int, num_shards: int) -> DeviceMesh:
    if num_replicas == 1:
        return init_device_mesh(device_type, (num_shards,))
    # neighbours share a copy, so that its all-gathers stay on a host
    return init_device_mesh(device_type, (num_replicas, num_shards), mesh_dim_names=("replicate", "shard"))


def stop_ranks() -> None:
    """Leave the job, if one was joined."""
    if dist.is_initialized():
        dist.destroy_process_group()
