"""What ranks do in the tests of several ranks: whole updates of tiny models, and work of rank 0 that fails or hangs.

Runs in processes of its own. Knows the updater and the ranks; knows nothing of what is expected.
"""

import math
import os
import signal
import threading
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from flashrl_trainer.distributed import Ranks, start_ranks, stop_ranks
from flashrl_trainer.model import Policy, load_policy
from flashrl_trainer.optimizer import SkippedStepsError
from flashrl_trainer.samples import Completion, Group, Prompt, Sample
from flashrl_trainer.settings import AlgorithmSettings, OptimSettings
from flashrl_trainer.update import Updater

VOCABULARY, VERSION, LEARNING_RATE = 61, 7, 1e-4
SHAPES = [(3, [9, 2, 5, 1]), (1, [4, 4, 12]), (5, [7, 1, 3, 6, 2])]  # prompt tokens, then those of each response


@dataclass(frozen=True)
class Outcome:
    """After one step: metrics, weights, and AdamW's mean of the gradients."""

    metrics: dict[str, float | None]
    weights: dict[str, Tensor]
    means: dict[str, Tensor]


def make_groups(reward: float | None = None) -> list[Group]:
    """The same every time; a `reward` given is that of the first sample."""
    random = Random(11)
    groups = [_group(random, *shape) for shape in SHAPES]
    if reward is not None:
        first = groups[0].samples[0]
        groups[0].samples[0] = Sample(first.completion, reward, reward)
    return groups


def _group(random: Random, num_prompt_tokens: int, lengths: list[int]) -> Group:
    prompt = [random.randrange(VOCABULARY) for _ in range(num_prompt_tokens)]
    samples = []
    for index, length in enumerate(lengths):
        ids = [random.randrange(VOCABULARY) for _ in range(length)]
        logprobs = [random.uniform(-5.5, -3) for _ in range(length)]
        middle = length // 2  # the first half was drawn from older weights
        spans = [(VERSION - 1, 0, middle), (VERSION, middle, length)]
        samples.append(Sample(Completion(ids, logprobs, "", "stop", spans), float(index % 2), float(index % 2)))
    return Group(Prompt("p", "", ""), prompt, samples, VERSION)


def make_updater(folder: str, ranks: Ranks, max_tokens: int, mini_batch: int = 3) -> tuple[Policy, Updater]:
    """With one update a step, or with `mini_batch` groups in each."""
    policy = load_policy(folder, ranks, compute_dtype="float32", checkpointing=False, temperature=0.9, chunk_tokens=5)
    settings = AlgorithmSettings(overlong="none")
    optim = OptimSettings(
        lr=LEARNING_RATE, mini_batch_prompts=mini_batch, max_tokens_per_micro_batch=max_tokens, max_skipped_steps=3
    )
    return policy, Updater(policy, ranks, settings, optim)


def whole_tensor(value: Tensor) -> Tensor:
    """On every rank; a collective."""
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()


def outcome(policy: Policy, updater: Updater, ranks: Ranks) -> Outcome:
    """Of one step."""
    totals = updater.step(make_groups(), 1, VERSION)
    named = list(policy.lm.named_parameters())
    means = {name: whole_tensor(updater.optimizer.state[parameter]["exp_avg"]) for name, parameter in named}
    return Outcome(totals.metrics(ranks), {name: whole_tensor(parameter) for name, parameter in named}, means)


def steps(folders: list[str], max_tokens: int, num_replicas: int) -> list[Outcome]:
    """One step of each model on this rank of a job; of the first one also a step of two updates, the last outcome."""
    ranks = _start(num_replicas)
    outcomes = [outcome(*make_updater(folder, ranks, max_tokens), ranks) for folder in folders]
    outcomes.append(outcome(*make_updater(folders[0], ranks, max_tokens, mini_batch=2), ranks))
    stop_ranks()
    return outcomes


def poisoned_steps(folder: str) -> dict[str, Any]:
    """Two steps with a NaN among the rewards of a sample that one rank has, and what this rank did about them."""
    ranks = _start(1)
    policy, updater = make_updater(folder, ranks, 16)
    before = {name: whole_tensor(parameter) for name, parameter in policy.lm.named_parameters()}
    bad = make_groups(math.nan)[:2]
    rows = [updater.step(bad, step, VERSION).metrics(ranks) for step in (1, 2)]
    unharmed = all(torch.equal(whole_tensor(p), before[name]) for name, p in policy.lm.named_parameters())
    updater.check()
    updater.step(bad, 3, VERSION)
    try:
        updater.check()
        stopped = ""
    except SkippedStepsError as error:
        stopped = str(error)
    after = outcome(policy, updater, ranks)
    updater.check()
    stop_ranks()
    return {"rows": rows, "unharmed": unharmed, "stopped": stopped, "after": after}


def shards(folder: str, num_replicas: int) -> list[tuple[str, int, Tensor]]:
    """Name, first row and rows of each parameter as this rank answers for them."""
    ranks = _start(num_replicas)
    policy, _ = make_updater(folder, ranks, 16)
    found = [(shard.name, shard.first_row, shard.local.clone()) for shard in policy.shards(ranks)]
    stop_ranks()
    return found


def wait_for_main(kind: str, limit_s: float) -> str:
    """Rank 0 raises, dies or hangs in work of its own; the others wait for it."""
    ranks = _start(1, limit_s)

    def work() -> str:
        if kind == "raises":
            raise ValueError("data.train: no such file")
        if kind == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "hangs":
            threading.Event().wait()
        return "done"

    return ranks.on_main(work)


def wait_for_rank_one(limit_s: float) -> float:
    """Rank 1 dies before a sum that the others take part in."""
    ranks = _start(1, limit_s)
    if ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return float(ranks.sum(torch.ones(())))


def _start(num_replicas: int, limit_s: float = 60.0) -> Ranks:
    torch.set_num_threads(1)
    return start_ranks("cpu", limit_s, num_replicas)


def save_model(config: Any, folder: Path) -> str:
    """A random model of that shape."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)
