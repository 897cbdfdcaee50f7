"""`make demo`: the INT8 service and the trainer as two processes on this machine's CPU, from start to report.

Knows two command lines and a run folder; everything it shows comes from them.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODEL = "examples/tiny_arith/model"
RECIPE = "configs/tiny_arith.toml"
MIN_FREE_GIB = 4.0
MAX_THREADS = 4  # matrices of 256 x 256 gain nothing from more, and threads that wait for each other cost the most
STOP_DEADLINE_S = 30.0


def main() -> int:
    """The exit code: the trainer's, or 1 for a machine that cannot run it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    seed = parser.parse_args().seed
    os.chdir(ROOT)
    free_gib = available_gib()
    if free_gib < MIN_FREE_GIB:
        print(f"demo: {free_gib:.1f} GiB of memory are free, {MIN_FREE_GIB:g} are needed", file=sys.stderr)
        return 1
    folder = Path("runs") / f"demo-{datetime.now():%Y%m%d-%H%M%S}"
    folder.mkdir(parents=True)
    cores = len(os.sched_getaffinity(0))
    # they take turns, but the service's engine, workers and routes are processes of their own
    service_threads, trainer_threads = (max(1, min(MAX_THREADS, number)) for number in (cores // 2, cores))
    http_port, weights_port = free_ports(2)
    print(
        f"Demo: a 3-million-parameter model that is often sloppy with two-step sums learns to be careful.\n"
        f"  service: vLLM, INT8 weights, port {http_port}, {service_threads} thread(s), log in {folder}/service.log\n"
        f"  trainer: full precision, DAPO with truncated importance sampling, {trainer_threads} thread(s)\n"
        f"The service needs about a minute to start.",
        flush=True,
    )
    start = time.monotonic()
    with (folder / "service.log").open("wb") as log:
        service = subprocess.Popen(
            service_command(http_port, weights_port, service_threads), stdout=log, stderr=log, start_new_session=True
        )
        try:
            code = train(folder, http_port, trainer_threads, seed, service)
        finally:
            stop(service)
    if code == 0:
        print(summary(folder, time.monotonic() - start))
    return code


def service_command(http_port: int, weights_port: int, threads: int) -> list[str]:
    """The command line a person would type."""
    return [
        *(sys.executable, "-m", "flashrl_rollout", "serve", "--model", MODEL, "--quantization", "int8"),
        *("--device", "cpu", "--port", str(http_port), "--weights-port", str(weights_port)),
        *("--threads", str(threads), "--max-model-len", "256", "--max-num-seqs", "128", "--enforce-eager"),
    ]


def train(folder: Path, port: int, threads: int, seed: int, service: subprocess.Popen[bytes]) -> int:
    """Run the trainer in the foreground; stop it when the service dies."""
    settings = {
        "run.dir": str(folder.parent),
        "run.name": folder.name,
        "run.seed": seed,
        "run.threads": threads,
        "data.shuffle_seed": seed,
        "rollout.urls": f"http://127.0.0.1:{port}",
    }
    overrides = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    trainer = subprocess.Popen([sys.executable, "-m", "flashrl_trainer", "train", "--config", RECIPE, *overrides])
    try:
        while trainer.poll() is None:
            if service.poll() is not None:
                trainer.terminate()
                trainer.wait(STOP_DEADLINE_S)
                print(
                    f"demo: the service ended with code {service.returncode}; see {folder}/service.log", file=sys.stderr
                )
                return 1
            time.sleep(0.2)
    except KeyboardInterrupt:  # the trainer got it too, and saves a checkpoint
        trainer.wait(STOP_DEADLINE_S)
    return trainer.returncode


def stop(service: subprocess.Popen[bytes]) -> None:
    """Ask the service to finish, and make sure that it has."""
    if service.poll() is None:
        service.send_signal(signal.SIGTERM)
        try:
            service.wait(STOP_DEADLINE_S)
        except subprocess.TimeoutExpired:
            service.kill()
            service.wait()
            print("demo: the service did not stop by itself and was killed", file=sys.stderr)


def summary(folder: Path, seconds: float) -> str:
    """What happened, for someone who sees it for the first time."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["step"] > 0]
    scored = [row for row in rows if row["eval/accuracy"] is not None]
    first, last = scored[0], scored[-1]
    deltas = [row for row in steps if row["sync/full_bytes"] and row["sync/kind"] == 0]

    def mean(key: str, among: list[dict[str, float]]) -> float:
        return sum(row[key] for row in among) / max(1, len(among))

    return (
        f"\nDone in {seconds / 60:.1f} minutes, {len(steps)} steps.\n"
        f"  Held-out problems solved    {first['eval/accuracy']:.0%} -> {last['eval/accuracy']:.0%}"
        f"   (sampled from the INT8 copy; greedy {first['eval/greedy']:.0%} -> {last['eval/greedy']:.0%})\n"
        f"  Weight updates              {len(deltas)} deltas, {mean('sync/wire_bytes', deltas) / 1e6:.2f} MB each of "
        f"{mean('sync/full_bytes', deltas) / 1e6:.2f} MB; sampling paused {mean('sync/pause_ms', deltas):.1f} ms\n"
        f"  INT8 against full precision {mean('mismatch/mean_abs_logprob', steps):.4f} mean difference in log-prob, "
        f"corrected by weights of {mean('tis/weight_mean', steps):.3f} on average\n"
        f"  Report with curves          {folder}/report/index.html\n"
        f"  The trained model           {folder}/export (loads in transformers and vLLM)"
    )


def available_gib() -> float:
    """Memory that can be used without swapping, GiB."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) / 2**20


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on at this moment."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


if __name__ == "__main__":
    sys.exit(main())
