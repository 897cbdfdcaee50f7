"""Sampled tokens a second while replicas are killed, against the same run without kills, and how fast they come back.

    python benchmarks/goodput.py --seconds 300 --every 30 --json goodput.json

Four service processes around the scripted engine (a fixed rate of tokens a request, so that a start does not take the
samples' time on few cores), a real trainer's fleet, balancer and weight sync; a killed service starts again at once.
"""

import argparse
import itertools
import json
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from benchmarks.service_process import TINY_MODEL, ServiceProcess, free_port, start_scripted

from flashrl_trainer import assemble
from flashrl_trainer.balancer import Balancer
from flashrl_trainer.config import load_config
from flashrl_trainer.distributed import Ranks, start_ranks, stop_ranks
from flashrl_trainer.fleet import Fleet
from flashrl_trainer.fleet_start import open_fleet
from flashrl_trainer.interrupt import Interrupt
from flashrl_trainer.model import Policy
from flashrl_trainer.settings import TrainerConfig
from flashrl_trainer.weight_sync import WeightSync
from flashrl_wire.messages import GenerateRequest, Sampling

TOKEN_S, MAX_TOKENS, REQUESTS = 0.1, 40, 768  # three rounds of 64 requests at each of four replicas
RECIPE = "configs/tiny_arith.toml"


@dataclass
class Arm:
    """One run: samples that arrived, and each kill's seconds from ready to in use."""

    name: str
    seconds: float = 0.0
    tokens: int = 0
    steps: int = 0
    requests_moved: int = 0
    starts: list[float] = field(default_factory=list)
    returns: list[float] = field(default_factory=list)

    @property
    def tokens_per_s(self) -> float:
        """Of the whole run, updates included."""
        return self.tokens / self.seconds


class Replicas:
    """Service processes on ports of their own, killed and started again in turn."""

    def __init__(self, count: int, folder: Path) -> None:
        self._folder = folder
        self._ports = [(free_port(), free_port()) for _ in range(count)]
        self._running = [self._start(index) for index in range(count)]

    @property
    def urls(self) -> list[str]:
        """In order."""
        return [service.url for service in self._running]

    def kill_and_restart(self, index: int) -> ServiceProcess:
        """The new one, once it is ready."""
        self._running[index].kill()
        self._running[index] = self._start(index)
        return self._running[index]

    def _start(self, index: int) -> ServiceProcess:
        options = {"folder": str(TINY_MODEL), "token_s": TOKEN_S}
        return start_scripted(self._folder / f"service-{index}.log", options, *self._ports[index])

    def stop(self) -> None:
        """All of them."""
        for service in self._running:
            service.stop()


@contextmanager
def killing(replicas: Replicas, fleet: Fleet, every_s: float, arm: Arm) -> Iterator[None]:
    """Kill one after the other inside, `every_s` seconds apart or as soon as the last one is back."""
    stop, begin = threading.Event(), time.monotonic()

    def work() -> None:
        for count, index in enumerate(itertools.cycle(range(len(replicas.urls))), start=1):
            if stop.wait(max(0.0, begin + count * every_s - time.monotonic())):
                return
            start = time.monotonic()
            service = replicas.kill_and_restart(index)
            ready = time.monotonic()
            while not is_back(service, fleet) and not stop.wait(0.02):
                pass
            arm.starts.append(ready - start)
            arm.returns.append(time.monotonic() - ready)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def is_back(service: ServiceProcess, fleet: Fleet) -> bool:
    """Whether it holds what everybody should hold, by its own word, and gets prompts."""
    target = fleet.target
    holds_it = target is not None and service.weights()["digest"] == target.digest
    return holds_it and service.url in {replica.url for replica in fleet.in_use()}


def train(policy: Policy, step: int) -> None:
    """As much of a change as a step at a small learning rate makes."""
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for parameter in policy.parameters():
            local = parameter.to_local()  # type: ignore[attr-defined]
            local.add_(0.1 * (torch.rand(local.shape, generator=generator) < 0.002))


def step_of(arm: Arm, balancer: Balancer, sync: WeightSync, policy: Policy) -> None:
    """Sample, move, publish."""
    requests = [
        GenerateRequest(
            prompts=["1 + 1?\n"],
            sampling=Sampling(max_tokens=MAX_TOKENS, seed=arm.steps * REQUESTS + index),
            min_weight_version=sync.version,
        )
        for index in range(REQUESTS)
    ]
    arm.tokens += sum(reply.usage.completion_tokens for reply in balancer.generate(requests))
    train(policy, arm.steps)
    sync.push(policy)
    arm.steps += 1


def measured(name: str, config: TrainerConfig, ranks: Ranks, replicas: Replicas, seconds: float, every_s: float) -> Arm:
    """One arm; `every_s` 0: nobody is killed."""
    arm = Arm(name)
    with ExitStack() as stack:
        fleet = open_fleet(config, name, Interrupt(), print)
        stack.callback(fleet.close, name)
        policy = assemble.make_policy(config, ranks)
        tokenizer = assemble.load_tokenizer(config.model.path)
        sync = assemble.make_sync(config, fleet, ranks, name, Interrupt())
        sync.connect(policy, assemble.identity(config, tokenizer, policy), 0, fresh=False)
        balancer = assemble.make_balancer(config, fleet)
        if every_s:
            stack.enter_context(killing(replicas, fleet, every_s, arm))
        start = time.monotonic()
        while time.monotonic() - start < seconds:
            step_of(arm, balancer, sync, policy)
        arm.seconds, arm.requests_moved = time.monotonic() - start, balancer.moved
    return arm


def report(calm: Arm, killed: Arm) -> dict[str, Any]:
    """As JSON types."""
    ratio = killed.tokens_per_s / calm.tokens_per_s
    arms = [asdict(arm) | {"tokens_per_s": arm.tokens_per_s} for arm in (calm, killed)]
    return {"goodput": ratio, "slowest_return_s": max(killed.returns, default=0.0), "arms": arms}


def main() -> None:
    """Both arms, then the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300.0, help="length of each arm")
    parser.add_argument("--every", type=float, default=30.0, help="seconds between two kills")
    parser.add_argument("--replicas", type=int, default=4)
    parser.add_argument("--json", type=Path, help="write the numbers here")
    options = parser.parse_args()
    ranks = start_ranks("cpu", timeout_s=600)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        replicas = Replicas(options.replicas, Path(folder))
        stack.callback(replicas.stop)
        overrides = {"rollout.urls": ",".join(replicas.urls), "run.threads": "1"}
        config = load_config(Path(RECIPE), [f"{key}={value}" for key, value in overrides.items()], {})
        calm = measured("calm", config, ranks, replicas, options.seconds, 0.0)
        killed = measured("killed", config, ranks, replicas, options.seconds, options.every)
    stop_ranks()
    found = report(calm, killed)
    for arm in (calm, killed):
        print(f"{arm.name:7} {arm.tokens_per_s:8.0f} tokens/s, {arm.steps} steps, {arm.requests_moved} requests moved")
    print(f"goodput {found['goodput']:.3f}; starts {killed.starts}; from ready to in use {killed.returns}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
