"""FlashRL's update on samples from a file, timed: one JSON object an update on standard output.

Runs in FlashRL's own environment. Knows the updater; knows nothing of services or of TRL.
"""

import argparse
import json
import time
from pathlib import Path

import torch

from flashrl_trainer.distributed import start_ranks, stop_ranks
from flashrl_trainer.model import load_policy
from flashrl_trainer.samples import Completion, Group, Prompt, Sample
from flashrl_trainer.settings import AlgorithmSettings, OptimSettings
from flashrl_trainer.update import Updater


def groups(rows: list[list[dict[str, list[int]]]]) -> list[Group]:
    """Samples by group, with rewards in turn and log-probs that are near enough not to be masked."""
    return [_group(samples) for samples in rows]


def _group(samples: list[dict[str, list[int]]]) -> Group:
    answers = [
        Sample(Completion(s["completion"], [-0.1] * len(s["completion"]), "", "stop", []), index % 2, index % 2)
        for index, s in enumerate(samples)
    ]
    return Group(Prompt("p", "", ""), samples[0]["prompt"], answers, 0)


def main() -> None:
    """Train on the same samples a few times."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--samples", required=True)
    parser.add_argument("--updates", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--max-tokens", type=int, default=16384)
    parser.add_argument("--compile", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    learned = groups(json.loads(Path(asked.samples).read_text()))
    ranks = start_ranks("cpu", 600)
    policy = load_policy(
        asked.model,
        ranks,
        compute_dtype="float32",
        checkpointing=False,
        temperature=1.0,
        chunk_tokens=1024,
        compiled=asked.compile,
    )
    optim = OptimSettings(
        lr=1e-5, mini_batch_prompts=len(learned), max_tokens_per_micro_batch=asked.max_tokens, weight_decay=0.1
    )
    updater = Updater(policy, ranks, AlgorithmSettings(overlong="none"), optim)
    for step in range(1, asked.updates + 1):
        start, cpu = time.perf_counter(), time.process_time()
        totals = updater.step(learned, step, 0)
        row = {"train_s": time.perf_counter() - start, "cpu_s": time.process_time() - cpu, "tokens": totals.tokens}
        print(json.dumps(row), flush=True)
    stop_ranks()


if __name__ == "__main__":
    main()
