"""What is measured, as a Protocol and plain values.

Knows what an arm is asked and gives; knows nothing of processes. `service_arm` and `engine_arm` are the real ones.
"""

from dataclasses import dataclass
from typing import Protocol

from flashrl_rollout.bench.settings import ArmName
from flashrl_rollout.bench.workload import Workload


class ArmFailedError(Exception):
    """An arm did not start, died, or did not do what it was asked; the message says which and why."""


@dataclass(frozen=True)
class Launch:
    """How every engine of a benchmark is started, whoever starts it.

    `kv_cache_gib` None: vLLM measures what `gpu_memory_utilization` leaves for the cache.
    """

    folder: str
    max_model_len: int
    max_num_seqs: int
    gpu_memory_utilization: float
    kv_cache_gib: float | None
    device: str
    threads: int
    enforce_eager: bool
    seeded: bool
    timeout_s: float


@dataclass(frozen=True)
class Answer:
    """`seconds` from the first request to the last token; `lengths[i]` are the tokens of prompt i's samples.

    `front_cpu_s` is the CPU time of the process that takes the requests, which is not the engine's.
    """

    seconds: float
    lengths: list[list[int]]
    front_cpu_s: float


class Arm(Protocol):
    """Started, asked once a round, stopped; ArmFailedError from every call that the arm does not survive."""

    @property
    def name(self) -> ArmName:
        """Which one it is."""

    def start(self) -> None:
        """Begin to load the model; returns at once."""

    def is_ready(self) -> bool:
        """Whether it can be asked."""

    def ask(self, workload: Workload) -> Answer:
        """Have it draw everything, and wait for it."""

    def weight_bytes(self) -> int | None:
        """Memory of the weights; None where it does not say."""

    def cache_tokens(self) -> int | None:
        """Tokens whose keys and values fit at a time; None where it does not say."""

    def failed(self, why: str) -> ArmFailedError:
        """The error to raise for an arm that is waited for in vain, with what it said last."""

    def stop(self) -> None:
        """End it and all of its processes; harmless when it has ended."""
