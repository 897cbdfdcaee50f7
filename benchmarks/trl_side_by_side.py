"""FlashRL beside TRL's GRPOTrainer (transformers backend) on this CPU: same model, prompts, group size, tokens, dtype.

    python benchmarks/trl_side_by_side.py --trl-python VENV/bin/python --json trl.json

Whole steps: TRL's trainer and `flashrl-trainer` with the INT8 service take turns. Training phase: TRL's steps less
their sampling and rewards, and FlashRL's updates on the samples that TRL drew. The environment with TRL is made by
hand: `python -m venv VENV; VENV/bin/pip install torch trl==1.16.0 datasets`. Knows command lines and what they print;
knows nothing of either trainer's inside.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.process_cpu import cpu_by_process
from scripts.demo import free_ports, stop

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "configs/tiny_arith.toml"
DATA = ROOT / "examples/tiny_arith/data/train.jsonl"
START_DEADLINE_S = 1200.0

Row = dict[str, float]


def main() -> None:
    """Run the rounds, print the table, write the rows."""
    asked = arguments()
    environ = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(asked.threads)}
    rows: dict[str, list[Row]] = {"trl": [], "flashrl": [], "flashrl_update": []}
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        served = None if asked.training_only else stack.enter_context(service(asked, environ, Path(name)))
        for number in range(asked.rounds):
            folder = Path(name) / f"round-{number}"
            folder.mkdir()
            rows["trl"] += trl_steps(asked, environ, folder, number)
            rows["flashrl_update"] += flashrl_updates(asked, environ, folder)
            if served is not None:
                rows["flashrl"] += flashrl_steps(asked, environ, folder, *served, number)
            print(table(rows), flush=True)
    if asked.json:
        asked.json.write_text(
            json.dumps({"asked": {k: str(v) for k, v in vars(asked).items()}, "rows": rows}, indent=1)
        )


def arguments() -> argparse.Namespace:
    """The defaults are the tiny recipe's."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trl-python", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=ROOT / "examples/tiny_arith/model")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--training-only", action="store_true", help="start no service and make no whole steps")
    for name, value in (("rounds", 2), ("steps", 2), ("prompts", 16), ("samples", 8), ("max-tokens", 80)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--max-staleness", type=int, default=0, help="FlashRL samples so many steps ahead of training")
    parser.add_argument("--sequences-at-once", type=int, default=128, help="TRL's batch of one forward")
    return parser.parse_args()


@contextmanager
def service(
    asked: argparse.Namespace, environ: dict[str, str], folder: Path
) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """An INT8 service that is ready, on a port of its own."""
    port, weights_port = free_ports(2)
    command = [
        *(sys.executable, "-m", "flashrl_rollout", "serve", "--model", str(asked.model), "--quantization", "int8"),
        *("--device", "cpu", "--port", str(port), "--weights-port", str(weights_port)),
        *("--threads", str(asked.threads), "--max-model-len", "256", "--max-num-seqs", "128", "--enforce-eager"),
    ]
    log = (folder / "service.log").open("wb")
    process = subprocess.Popen(command, env=environ, stdout=log, stderr=log, start_new_session=True)
    try:
        yield port, process
    finally:
        stop(process)


def trl_steps(asked: argparse.Namespace, environ: dict[str, str], folder: Path, number: int) -> list[Row]:
    """TRL's steps but the first, which warms up; the samples of the last one are left in the folder."""
    numbers = ("prompts", "samples", "max_tokens", "sequences_at_once", "threads")
    options = [word for name in numbers for word in (f"--{name.replace('_', '-')}", str(getattr(asked, name)))]
    command = [str(asked.trl_python), str(ROOT / "benchmarks/trl_worker.py"), "--model", str(asked.model)]
    command += ["--data", str(DATA), "--out", str(folder), "--steps", str(asked.steps + 1), "--seed", str(number)]
    return printed_rows([*command, *options], environ)[1:]


def flashrl_updates(asked: argparse.Namespace, environ: dict[str, str], folder: Path) -> list[Row]:
    """FlashRL's updates on TRL's last samples, but the first one."""
    command = [sys.executable, str(ROOT / "benchmarks/trl_flashrl_worker.py"), "--model", str(asked.model)]
    command += ["--samples", str(folder / "samples.json"), "--updates", str(asked.steps + 1)]
    return printed_rows([*command, "--threads", str(asked.threads)], environ)[1:]


def printed_rows(command: list[str], environ: dict[str, str]) -> list[Row]:
    """The JSON objects that a program prints, a line each."""
    output = subprocess.run(command, env=environ, stdout=subprocess.PIPE, text=True, check=True).stdout
    return [json.loads(line) for line in output.splitlines() if line.startswith('{"')]


def flashrl_steps(
    asked: argparse.Namespace,
    environ: dict[str, str],
    folder: Path,
    port: int,
    process: subprocess.Popen[bytes],
    number: int,
) -> list[Row]:
    """FlashRL's steps but the first, with the CPU seconds of trainer and service together."""
    settings: dict[str, Any] = {
        **{"run.dir": folder, "run.name": "run", "run.seed": number, "run.steps": asked.steps + 1},
        **{"run.threads": asked.threads, "run.wandb": "off", "run.stop_accuracy": 0, "eval.every": 0},
        **{"model.path": asked.model, "data.train": DATA, "data.eval": DATA, "data.shuffle_seed": number},
        **{"rollout.urls": f"http://127.0.0.1:{port}", "rollout.connect_deadline_s": START_DEADLINE_S},
        **{"sampling.prompts_per_step": asked.prompts, "sampling.samples_per_prompt": asked.samples},
        **{"sampling.max_tokens": asked.max_tokens, "sampling.dynamic": "false", "optim.lr": 1e-5},
        **{"algorithm.max_staleness": asked.max_staleness},
        **{"optim.mini_batch_prompts": asked.prompts, "checkpoint.every": 0, "checkpoint.export": "false"},
    }
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", "flashrl_trainer", "train", "--config", str(RECIPE), *words]
    file = folder / "run/metrics.jsonl"
    trainer = subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL)
    cpu: list[float] = []
    while trainer.poll() is None:
        seen = len(file.read_text().splitlines()) if file.exists() else 0
        while len(cpu) < seen:
            cpu.append(cpu_seconds(trainer.pid) + cpu_seconds(process.pid))
        time.sleep(0.02)
    if trainer.returncode:
        raise SystemExit(f"flashrl-trainer ended with {trainer.returncode}")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [
        {
            "step_s": row["perf/step_seconds"],
            "step_cpu_s": after - before,
            "response_tokens": row["response/mean_tokens"] * asked.prompts * asked.samples,
            "mean_abs_logprob": row["mismatch/mean_abs_logprob"],
        }
        for row, before, after in zip(rows[1:], cpu, cpu[1:], strict=False)
    ]


def cpu_seconds(pid: int) -> float:
    """Of a process and what it started, so far."""
    try:
        return sum(cpu_by_process(pid).threads.values())
    except OSError:  # a thread that ended meanwhile
        return cpu_seconds(pid) if Path(f"/proc/{pid}").exists() else 0.0


def table(rows: dict[str, list[Row]]) -> str:
    """Medians, and TRL over FlashRL."""
    trl, whole, update = rows["trl"], rows["flashrl"], rows["flashrl_update"]
    lines = ["| | TRL | FlashRL | ratio |", "|---|---|---|---|"]
    for name, key in (("training tokens/s", "train_s"), ("training tokens per CPU second", "train_cpu_s")):
        theirs = statistics.median(row["tokens"] / row[key] for row in trl)
        ours = statistics.median(row["tokens"] / row[key.replace("train_cpu", "cpu")] for row in update)
        lines.append(f"| {name} | {theirs:,.0f} | {ours:,.0f} | {ours / theirs:.2f} |")
    for name, key in (("whole step, s", "step_s"), ("whole step, CPU s", "step_cpu_s")) if whole else ():
        theirs, ours = (statistics.median(row[key] for row in each) for each in (trl, whole))
        lines.append(f"| {name} | {theirs:.2f} | {ours:.2f} | {theirs / ours:.2f} |")
    if whole:
        tokens = [statistics.median(row["response_tokens"] for row in each) for each in (trl, whole)]
        lines.append(f"| response tokens a step | {tokens[0]:,.0f} | {tokens[1]:,.0f} | |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
