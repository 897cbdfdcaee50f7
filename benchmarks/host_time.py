"""What a step costs on the host: tokens/s, the GPU's busy share, the CPU time of every process.

    python benchmarks/host_time.py --shape qwen2.5-0.5b --engines 1,2,3,4 --output-interval 1,32 --json FILE
    python benchmarks/host_time.py --model examples/tiny_arith/model --device cpu --requests 64 --tokens 64

For each pair of the two settings a service of its own: a round to warm up, `--rounds` that are counted, and, where
py-spy is on the PATH, one more under it, which says which part of vLLM the time of a process goes to.
"""

import argparse
import asyncio
import itertools
import json
import math
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gpu_busy import GpuBusy
from host_profile import profiled
from process_cpu import cpu_by_process
from service_process import ServiceProcess, service

from flashrl_rollout.bench.service_arm import ask
from flashrl_rollout.bench.settings import TRAINER_PROMPTS

_VOCABULARY = 500  # the tiny model has few more


@dataclass(frozen=True)
class Round:
    """What was drawn in how long; the longest answer has a token of every step."""

    seconds: float
    tokens: int
    steps: int


@dataclass(frozen=True)
class Row:
    """One pair of settings; CPU in cores, on average over the counted rounds."""

    engines: int
    output_interval: int
    tokens_per_s: float
    rounds_s: list[float]
    step_ms: float
    gpu_busy: float | None
    front_cores: float
    engine_cores: list[float]
    busiest_threads: dict[str, float]
    parts: dict[str, dict[str, float]] | None


def main() -> int:
    """Measure every pair, print a line each."""
    args = _arguments()
    with tempfile.TemporaryDirectory() as folder:
        model = args.model or str(_shape(args.shape, Path(args.shape_dir or folder)))
        rows = [_measured(args, model, *pair, Path(folder)) for pair in _pairs(args)]
    if args.json:
        machine = json.loads(json.dumps(vars(args), default=str))
        args.json.write_text(json.dumps({"settings": machine, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", help="folder of a model")
    model.add_argument("--shape", help="random weights in a shape that `flashrl-rollout bench` knows")
    parser.add_argument("--shape-dir", help="where these are kept, to be made once")
    parser.add_argument("--quantization", default="none")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--engines", default="1", help="numbers of engines, with commas")
    parser.add_argument("--output-interval", default="32", help="numbers of tokens, with commas")
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--unseeded", action="store_true", help="requests without seeds")
    parser.add_argument("--serve", default="", help="more flags of the service")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def _pairs(args: argparse.Namespace) -> Iterator[tuple[int, int]]:
    numbers = ([int(number) for number in text.split(",")] for text in (args.engines, args.output_interval))
    return itertools.product(*numbers)


def _shape(name: str, folder: Path) -> Path:
    target = folder / name
    if not (target / "config.json").is_file():
        subprocess.run([sys.executable, "-m", "flashrl_rollout.bench.shapes", name, str(target)], check=True)
    return target


def _measured(args: argparse.Namespace, model: str, engines: int, interval: int, folder: Path) -> Row:
    flags = ["--engines", engines, "--output-interval", interval, "--device", args.device]
    flags += ["--max-num-seqs", args.requests, "--max-model-len", args.prompt_tokens + args.tokens]
    log = folder / f"service-{engines}-{interval}.log"
    with service(model, args.quantization, log, *map(str, flags), *args.serve.split()) as running:
        _round(args, running, 0)
        before, began = cpu_by_process(running.pid), time.perf_counter()
        with GpuBusy() as gpu:
            rounds = [_round(args, running, index + 1) for index in range(args.rounds)]
        cpu = cpu_by_process(running.pid).since(before, time.perf_counter() - began)
        parts = profiled(cpu.pids, rounds[-1].seconds, folder, lambda: _round(args, running, args.rounds + 1))
    row = Row(
        engines=engines,
        output_interval=interval,
        tokens_per_s=statistics.median(round.tokens / round.seconds for round in rounds),
        rounds_s=[round.seconds for round in rounds],
        step_ms=statistics.median(round.seconds / round.steps for round in rounds) * 1e3,
        gpu_busy=gpu.share,
        front_cores=cpu.front_cores,
        engine_cores=cpu.engine_cores,
        busiest_threads=cpu.busiest_threads,
        parts=parts,
    )
    _show(row)
    return row


def _round(args: argparse.Namespace, running: ServiceProcess, index: int) -> Round:
    """All requests at once, until the last is answered."""
    draw = random.Random(index)
    firsts = range(0, args.requests, TRAINER_PROMPTS)
    bodies = [_body(args, draw, first, index * args.requests + first) for first in firsts]
    return asyncio.run(_ask(running.url, bodies))


def _body(args: argparse.Namespace, draw: random.Random, first: int, seed: int) -> dict[str, Any]:
    """A request as the trainer sends it: prompts `first` to `first + 8`."""
    count = min(TRAINER_PROMPTS, args.requests - first)
    prompts = [[draw.randrange(_VOCABULARY) for _ in range(args.prompt_tokens)] for _ in range(count)]
    sampling = {"max_tokens": args.tokens} | ({} if args.unseeded else {"seed": seed})
    return {"prompts": prompts, "sampling": sampling}


async def _ask(url: str, bodies: list[dict[str, Any]]) -> Round:
    seconds, replies = await ask(url, bodies, 600.0)  # over many clients: one alone would be the slowest part
    lengths = [len(result["completions"][0]["token_ids"]) for reply in replies for result in reply["results"]]
    return Round(seconds, sum(lengths), max(lengths))


def _show(row: Row) -> None:
    busy = "-" if row.gpu_busy is None or math.isnan(row.gpu_busy) else f"{row.gpu_busy:.0%}"
    cores = " ".join(f"{each:.2f}" for each in row.engine_cores)
    print(
        f"engines {row.engines}  interval {row.output_interval:3d}  {row.tokens_per_s:9,.0f} tokens/s  "
        f"step {row.step_ms:6.2f} ms  GPU busy {busy:>4}  cores: service {row.front_cores:.2f}, engines {cores}",
        flush=True,
    )
    for process, parts in (row.parts or {}).items():
        print(f"    {process}: " + ", ".join(f"{part} {share:.0%}" for part, share in parts.items()), flush=True)


if __name__ == "__main__":
    sys.exit(main())
