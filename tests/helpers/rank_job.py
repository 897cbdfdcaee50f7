"""Jobs of several ranks on this machine, forked from one process that has imported torch and transformers.

Knows how to start ranks and what they returned; knows nothing of what they do.
"""

import multiprocessing
import os
import pickle
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tests.helpers.forked import free_ports

LIMIT_S = 120.0
_context = multiprocessing.get_context("forkserver")


@dataclass(frozen=True)
class RankEnd:
    """What a rank's function returned, or the error that ended it, as `Name: text`."""

    value: Any
    error: str


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any) -> list[RankEnd]:
    """`function(*args)` in `world_size` processes that each know their place as under torchrun."""
    job = RankJob(function, world_size, *args)
    try:
        return [job.end(rank) for rank in range(world_size)]
    finally:
        job.kill()


class RankJob:
    """Running ranks, which end one by one; `kill` ends what is left."""

    def __init__(self, function: Callable[..., Any], world_size: int, *args: Any) -> None:
        os.environ["OMP_NUM_THREADS"] = "1"  # the fork server inherits it
        _context.set_forkserver_preload(["flashrl_trainer.update", "transformers.models.qwen2.modeling_qwen2"])
        variables = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports(1)[0])}
        self._pipes, self._processes = [], []
        for rank in range(world_size):
            ours, theirs = _context.Pipe()
            own = variables | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = _context.Process(target=_be_a_rank, args=(theirs, own, function, args), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def end(self, rank: int) -> RankEnd:
        """How that rank ended; AssertionError if it does not, or without a word."""
        assert self._pipes[rank].poll(LIMIT_S), f"rank {rank} is still running after {LIMIT_S:g} s"
        found = pickle.loads(self._pipes[rank].recv_bytes())
        assert isinstance(found, RankEnd)
        return found

    def kill(self, ranks: Sequence[int] | None = None) -> None:
        """Leave no process behind, or end some ranks as a machine's failure would."""
        for rank in range(len(self._processes)) if ranks is None else ranks:
            self._processes[rank].kill()
            self._processes[rank].join(LIMIT_S)


def _be_a_rank(pipe: Any, variables: dict[str, str], function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.update(variables)
    try:
        end = RankEnd(function(*args), "")
    except Exception as error:
        traceback.print_exc()
        end = RankEnd(None, f"{type(error).__name__}: {error}")
    # plain pickle: torch's own would send file descriptors of tensors that are gone with this process
    pipe.send_bytes(pickle.dumps(end))
