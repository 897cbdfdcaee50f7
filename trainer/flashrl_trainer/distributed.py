"""The ranks of one training job: start-up, the device of this rank, and the few collectives the trainer uses.

One process on a CPU is a job of one rank with the same calls. Knows nothing of models or data.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process's place in the job; objects go over gloo, tensors over the device's backend."""

    rank: int
    world_size: int
    device: torch.device
    mesh: DeviceMesh

    @property
    def is_main(self) -> bool:
        """Rank 0 talks to the service, the console and the run folder."""
        return self.rank == 0

    def broadcast(self, value: T | None) -> T:
        """Rank 0's picklable `value` on every rank; only processes of this job are on the other end."""
        if self.world_size == 1:
            return value  # type: ignore[return-value]
        holder = [value]
        dist.broadcast_object_list(holder, src=0, device=torch.device("cpu"))
        received = holder[0]
        assert received is not None
        return received

    def on_main(self, work: Callable[[], T]) -> T:
        """Run `work` on rank 0 and give its result to every rank; what it raises is raised everywhere."""
        outcome: tuple[T | None, BaseException | None] | None = None
        if self.is_main:
            try:
                outcome = work(), None
            except BaseException as error:  # the other ranks wait in the broadcast, whatever happened here
                outcome = None, error
        value, raised = self.broadcast(outcome)
        if raised is not None:
            raise raised
        return value  # type: ignore[return-value]

    def gather(self, value: T) -> list[T]:
        """Every rank's value in rank order on rank 0, an empty list elsewhere."""
        gathered: list[T | None] | None = [None] * self.world_size if self.is_main else None
        dist.gather_object(value, gathered, dst=0)
        return [item for item in gathered or [] if item is not None]

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the ranks, for a tensor on the CPU or on the device; int64 wraps modulo 2^64."""
        total = values.clone()
        dist.all_reduce(total)
        return total

    def max(self, values: Tensor) -> Tensor:
        """Largest over the ranks, element by element."""
        largest = values.clone()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return largest


def start_ranks(device: str, timeout_s: float) -> Ranks:
    """Join the job that `torchrun` describes in the environment, or start one of a single rank.

    `device` is auto, cpu or cuda; `timeout_s` is how long a rank waits for the others in a collective. Raises
    ValueError for a CUDA device that does not exist.
    """
    wants_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if wants_cuda and not torch.cuda.is_available():
        raise ValueError("model.device: cuda was asked for and there is no CUDA device")
    world_size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    own_device = torch.device("cuda", local_rank) if wants_cuda else torch.device("cpu")
    if wants_cuda:
        torch.cuda.set_device(own_device)
    backend = "cpu:gloo,cuda:nccl" if wants_cuda else "gloo"
    store = dist.HashStore() if world_size == 1 else None  # type: ignore[attr-defined]
    dist.init_process_group(
        backend,
        store=store,
        rank=rank if store else -1,
        world_size=world_size if store else -1,
        timeout=timedelta(seconds=timeout_s),
        device_id=own_device if wants_cuda else None,
    )
    return Ranks(rank, world_size, own_device, init_device_mesh(own_device.type, (world_size,)))


def stop_ranks() -> None:
    """Leave the job, if one was joined."""
    if dist.is_initialized():
        dist.destroy_process_group()
