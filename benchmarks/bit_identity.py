"""Are the weights after real deltas those of a fresh start, bit for bit, and is the output?

    python benchmarks/bit_identity.py [--quantization int8 fp8 none] [--steps 5] [--json FILE]

For each precision: a service from the recipe's model, `--steps` of training with deltas, greedy tokens and log-probs of
64 held-out prompts before and after; then a second service from the exported checkpoint, and the same prompts again.
"""

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from service_process import ServiceProcess, service

NUM_PROMPTS = 64
MAX_TOKENS = 40

Greedy = list[tuple[list[int], list[float]]]


@dataclass(frozen=True)
class Outcome:
    """What one precision showed."""

    quantization: str
    versions: int
    deltas: int
    trainer_digest: str
    service_digest: str
    fresh_digest: str
    prompts_with_other_tokens: int
    prompts_with_other_logprobs: int
    prompts_changed_by_training: int

    @property
    def is_identical(self) -> bool:
        """Whether digests and outputs agree, and training did change something."""
        same = self.trainer_digest == self.service_digest == self.fresh_digest
        differ = self.prompts_with_other_tokens + self.prompts_with_other_logprobs
        return same and differ == 0 and self.prompts_changed_by_training > 0 and self.deltas == self.versions


def main() -> int:
    """0 where every precision is identical."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/tiny_arith.toml")
    parser.add_argument("--model", default="examples/tiny_arith/model")
    parser.add_argument("--prompts", type=Path, default=Path("examples/tiny_arith/data/heldout.jsonl"))
    parser.add_argument("--quantization", nargs="+", default=["int8", "fp8", "none"])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument(
        "--serve", default="--device cpu --max-model-len 256 --enforce-eager", help="flags of the service"
    )
    parser.add_argument("--set", action="append", default=[], dest="overrides", help="settings of the trainer")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    lines = args.prompts.read_text().splitlines()[:NUM_PROMPTS]
    prompts = [json.loads(line)["question"] + "\n" for line in lines]
    outcomes = []
    for quantization in args.quantization:
        with tempfile.TemporaryDirectory() as folder:
            outcomes.append(compare(quantization, prompts, Path(folder), args))
        print(f"{quantization}: {'identical' if outcomes[-1].is_identical else 'DIFFERENT'} {outcomes[-1]}", flush=True)
    if args.json:
        args.json.write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1) + "\n")
    return 0 if all(outcome.is_identical for outcome in outcomes) else 1


def compare(quantization: str, prompts: list[str], folder: Path, args: argparse.Namespace) -> Outcome:
    """Train one precision in `folder`, and compare with a fresh start."""
    flags = shlex.split(args.serve)
    with service(args.model, quantization, folder / "service.log", *flags) as running:
        before = running.greedy(prompts, MAX_TOKENS)
        train(running, quantization, folder, args)
        after, weights = running.greedy(prompts, MAX_TOKENS), running.weights()
    with service(str(folder / "run/export"), quantization, folder / "fresh.log", *flags) as fresh:
        again, fresh_weights = fresh.greedy(prompts, MAX_TOKENS), fresh.weights()
    rows = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    checkpoint = max((folder / "run/checkpoints").glob("step-*"))
    return Outcome(
        quantization=quantization,
        versions=weights["version"],
        deltas=sum(row["sync/full_bytes"] > 0 and row["sync/kind"] == 0 for row in rows),
        trainer_digest=json.loads((checkpoint / "trainer.json").read_text())["state"]["digest"],
        service_digest=weights["digest"],
        fresh_digest=fresh_weights["digest"],
        prompts_with_other_tokens=count_different(after, again, 0),
        prompts_with_other_logprobs=count_different(after, again, 1),
        prompts_changed_by_training=sum(left != right for left, right in zip(before, after, strict=True)),
    )


def train(running: ServiceProcess, quantization: str, folder: Path, args: argparse.Namespace) -> None:
    """A short run whose every step pushes a delta."""
    settings = [
        *(f"run.dir={folder}", "run.name=run", f"run.steps={args.steps}", "run.wandb=off", "run.stop_accuracy=0"),
        *("eval.every=0", f"rollout.urls={running.url}", f"rollout.quantization={quantization}", *args.overrides),
    ]
    command = [sys.executable, "-m", "flashrl_trainer", "train", "--config", args.config]
    subprocess.run([*command, *(word for each in settings for word in ("--set", each))], check=True)


def count_different(left: Greedy, right: Greedy, field: int) -> int:
    """Prompts whose token ids (0) or log-probs (1) differ."""
    return sum(a[field] != b[field] for a, b in zip(left, right, strict=True))


if __name__ == "__main__":
    sys.exit(main())
