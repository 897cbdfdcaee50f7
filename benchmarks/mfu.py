"""The update phase alone on a GPU: model FLOPs a second against the card's peak, memory, and where the time goes.

    python -m benchmarks.mfu --model qwen2.5-0.5b --tokens 16384 --json mfu.json

Random weights of a shape (or a folder), random samples: `--group` responses of `--response` tokens after a prompt of
`--prompt` tokens, as many groups as fill a micro-batch of `--tokens` packed tokens, `--micro-batches` of them in an
optimizer step. Each variant is the trainer's own policy and updater; the profile is of one step by kernel, joined to
kinds. Knows the trainer; knows nothing of the service.
"""

import argparse
import json
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from flashrl_rollout.bench.shape_names import SHAPES
from flashrl_rollout.bench.shapes import write_shape
from flashrl_trainer.distributed import Ranks, start_ranks, stop_ranks
from flashrl_trainer.model import load_policy
from flashrl_trainer.samples import Completion, Group, Prompt, Sample
from flashrl_trainer.settings import AlgorithmSettings, OptimSettings
from flashrl_trainer.update import Updater

VARIANTS = ("eager", "compiled", "recomputed")
KINDS = {
    "compiled": ("triton",),
    "attention": ("flash", "fmha", "varlen"),
    "matrix products": ("gemm", "nvjet", "cutlass", "sm90_xmma", "cublas"),
    "optimizer": ("adam", "multi_tensor", "foreach"),
    "reductions (norms, log-softmax)": ("reduce", "softmax", "norm"),
    "copies and casts": ("copy", "memcpy", "cat", "memset"),
    "elementwise": ("elementwise", "index", "gather", "scatter"),
}


def groups(args: argparse.Namespace, vocab_size: int) -> Iterator[Group]:
    """As many groups as `--micro-batches` micro-batches hold, with random tokens and advantages of both signs."""
    generator = torch.Generator().manual_seed(0)
    packed = args.prompt + args.group * args.response
    for number in range(args.micro_batches * (args.tokens // packed)):
        ids = torch.randint(0, vocab_size, (args.group + 1, max(args.prompt, args.response)), generator=generator)
        samples = [
            Sample(_completion(ids[1 + i, : args.response].tolist()), float(i % 2), float(i % 2))
            for i in range(args.group)
        ]
        yield Group(Prompt(str(number), "", ""), ids[0, : args.prompt].tolist(), samples, 0)


def _completion(ids: Sequence[int]) -> Completion:
    return Completion(list(ids), [-1.0] * len(ids), "", "stop", [(0, 0, len(ids))])


def kind_of(kernel: str) -> str:
    """The first of KINDS with a word that its name has."""
    name = kernel.lower()
    return next((kind for kind, words in KINDS.items() if any(word in name for word in words)), "other")


def measure(folder: Path, ranks: Ranks, variant: str, args: argparse.Namespace) -> dict[str, Any]:
    """Median step of one variant, and the time of its kernels by kind."""
    if ranks.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    policy = load_policy(
        str(folder),
        ranks,
        compute_dtype="bfloat16",
        temperature=1.0,
        chunk_tokens=args.chunk,
        checkpointing=variant == "recomputed",
        compiled=variant == "compiled",
    )
    lm: Any = policy.lm
    batch = list(groups(args, lm.config.vocab_size))
    optim = OptimSettings(mini_batch_prompts=len(batch), max_tokens_per_micro_batch=args.tokens)
    updater = Updater(policy, ranks, AlgorithmSettings(), optim)
    rows: list[Any] = [updater.step(batch, 1, 0).metrics(ranks) for _ in range(args.steps)]
    rows = sorted(rows[2:], key=lambda row: row["perf/train_tokens_per_s"])
    on = ProfilerActivity.CUDA if ranks.device.type == "cuda" else ProfilerActivity.CPU
    with profile(activities=[on]) as profiled:
        updater.step(batch, 1, 0)
    kinds: dict[str, float] = defaultdict(float)
    for event in profiled.key_averages():
        spent = event.self_cpu_time_total if ranks.device.type == "cpu" else event.self_device_time_total
        kinds[kind_of(event.key)] += spent / 1e3
    if args.kernels:
        print(profiled.key_averages().table("self_device_time_total", row_limit=args.kernels, max_name_column_width=90))
    parameters = sum(parameter.numel() for parameter in policy.parameters())
    return {
        "variant": variant,
        **{key: rows[len(rows) // 2][key] for key in ("perf/train_tokens_per_s", "perf/mfu", "perf/peak_memory_gib")},
        "states_gib": 16 * parameters / 2**30,  # fp32 weights, gradients and two moments
        "kernels_ms": {name: round(ms, 1) for name, ms in sorted(kinds.items(), key=lambda item: -item[1])},
    }


def main() -> None:
    """Measure each variant, print a line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen2.5-0.5b", help=f"a folder, or one of {', '.join(SHAPES)}")
    parser.add_argument("--tokens", type=int, default=16384, help="packed tokens of a micro-batch")
    parser.add_argument("--micro-batches", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--response", type=int, default=384)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--chunk", type=int, default=1024, help="model.logprob_chunk_tokens")
    parser.add_argument("--steps", type=int, default=8, help="the first two warm up")
    parser.add_argument("--variants", nargs="+", default=VARIANTS, choices=VARIANTS)
    parser.add_argument("--kernels", type=int, default=0, help="print so many of the longest kernels")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    ranks = start_ranks("auto", timeout_s=600)
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.model)
        if args.model in SHAPES:
            folder = Path(temporary)
            write_shape(args.model, folder, ranks.device.type)
        for variant in args.variants:
            results.append(measure(folder, ranks, variant, args))
            print(json.dumps(results[-1]), flush=True)
            if args.json:
                args.json.write_text(json.dumps(results, indent=1))
    stop_ranks()


if __name__ == "__main__":
    main()
