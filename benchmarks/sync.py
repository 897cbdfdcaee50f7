"""What an update costs: a delta, a snapshot and a reload from disk, by model size and by how much has changed.

    python -m benchmarks.sync --json sync.json                                          # tiny, 30M, 135M shapes
    python -m benchmarks.sync --models qwen2.5-0.5b --changed 0.1%:2% 100% --sequences 64       # on a GPU, as it is
    python -m benchmarks.sync --models 200m --kinds snapshot --curve --scripted   # bulk with and without
    python -m benchmarks.sync --models qwen2.5-0.5b --stock "--quantization fp8_per_channel"   # vLLM's reload beside it

For each model a service is started as a process of its own, and gets updates from the trainer's own publisher over
loopback. `--changed` is the share of stored elements with other bits: of codes, and after a colon of everything else. A
snapshot and a reload cost the same whatever has changed, and are made once. With `--stock`, vLLM's own server is
started after the service and reads the same checkpoint again, while it cannot sample. `make`: compare and encode, in
the trainer, or write the checkpoint; `send`: begin to commit, or the reload; `pause`: sampling at rest, with no request
and with `--sequences` running. Each number is the median of `--repeats`. Knows the publisher and the service's routes;
knows nothing of what is learned.
"""

import argparse
import json
import shlex
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.service_process import stock_server
from benchmarks.sync_arms import CONTEXT, Arms, Cost, Service, changed_shares, write_model

HEADER = (
    "| model | changed | kind | bytes | make s | send s | CPU s of it, trainer + service "
    "| pause ms, idle | pause ms, running |"
)


@dataclass(frozen=True)
class Row:
    """One line of the table; seconds and milliseconds are medians, `full_bytes` is what is stored."""

    model: str
    changed: str
    kind: str
    curve: bool
    wire_bytes: int
    full_bytes: int
    make_s: float
    send_s: float
    trainer_cpu_s: float
    service_cpu_s: float
    idle_pause_ms: float
    running_pause_ms: float | None
    running: int

    @classmethod
    def of(cls, where: tuple[str, str, bool], full_bytes: int, idle: Sequence[Cost], running: Sequence[Cost]) -> "Row":
        """From repeated measurements."""
        pauses = [cost.pause_ms for cost in running]
        return cls(
            model=where[0],
            changed=where[1],
            kind=idle[0].kind,
            curve=where[2],
            wire_bytes=int(statistics.median(cost.wire_bytes for cost in idle)),
            full_bytes=full_bytes,
            make_s=round(statistics.median(cost.make_s for cost in idle), 4),
            send_s=round(statistics.median(cost.send_s for cost in idle), 4),
            trainer_cpu_s=round(statistics.median(cost.trainer_cpu_s for cost in idle), 4),
            service_cpu_s=round(statistics.median(cost.service_cpu_s for cost in idle), 4),
            idle_pause_ms=round(statistics.median(cost.pause_ms for cost in idle), 2),
            running_pause_ms=round(statistics.median(pauses), 2) if pauses else None,
            running=min((cost.running for cost in running), default=0),
        )

    def line(self) -> str:
        """As a line of a Markdown table."""
        share = f"{self.wire_bytes / 1e6:.3f} MB ({self.wire_bytes / self.full_bytes:.2%})"
        running = "" if self.running_pause_ms is None else f"{self.running_pause_ms:.1f} ({self.running})"
        kind = self.kind + (", CURVE" if self.curve else "")
        cpu = f"{self.trainer_cpu_s:.2f} + {self.service_cpu_s:.2f}"
        cells = [self.model, self.changed, kind, share, f"{self.make_s:.3f}", f"{self.send_s:.3f}", cpu]
        return f"| {' | '.join([*cells, f'{self.idle_pause_ms:.1f}', running])} |"


def measure(service: Service, model: str, args: argparse.Namespace) -> list[Row]:
    """All rows of one service."""
    arms = Arms(service, args.block_kib << 10, seed=0)
    rows: list[Row] = []

    def add(changed: str, make: str, share: tuple[float, float]) -> None:
        idle = [arms.cost(make, share) for _ in range(args.repeats)]
        with service.load(args.sequences):
            running = [arms.cost(make, share) for _ in range(args.repeats if args.sequences else 0)]
        rows.append(Row.of((model, changed, service.curve), arms.full_bytes, idle, running))
        print(rows[-1].line(), flush=True)

    arms.cost("delta", (0.01, 0.01))  # the first update warms up
    for changed in args.changed if "delta" in args.kinds else ():
        add(changed, "delta", changed_shares(changed))
    for kind in ("snapshot", "reload"):  # cost the same whatever has changed
        if kind in args.kinds:
            add("", kind, changed_shares(args.changed[-1]))
    return rows


def measure_stock(folder: Path, log: Path, args: argparse.Namespace) -> Row:
    """vLLM's own reload, with its own flags."""
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    flags = ["--dtype", "bfloat16", "--max-model-len", str(CONTEXT), *shlex.split(args.stock)]
    with stock_server(str(folder), log, *flags) as server:
        server.reload()  # the first warms up
        times = [server.reload() for _ in range(args.repeats)]
    costs = [Cost("vLLM's reload", size, 0.0, seconds, 1e3 * seconds, 0) for seconds in times]
    row = Row.of((folder.name, args.stock, False), size, costs, [])
    print(row.line(), flush=True)
    return row


def _write(file: Path | None, rows: Sequence[Row]) -> None:
    if file:
        file.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def main() -> int:
    """0 once everything is measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["tiny", "30m", "135m"], help="shapes, or folders")
    parser.add_argument("--changed", nargs="+", default=["0.01%", "0.1%", "1%", "10%", "100%"], metavar="CODES[:REST]")
    parser.add_argument("--kinds", nargs="+", default=["delta", "snapshot", "reload"])
    parser.add_argument("--quantization", default="int8")
    parser.add_argument("--device", default="auto", help="of the service and of the trainer's side")
    parser.add_argument("--sequences", type=int, default=8, help="running while half of the commits are made; 0: none")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--block-kib", type=int, default=2048)
    parser.add_argument("--curve", action="store_true", help="each service once without and once with encryption")
    parser.add_argument("--scripted", action="store_true", help="the engine that computes no model")
    parser.add_argument("--serve", default="", help="further flags of the service")
    parser.add_argument("--stock", metavar="FLAGS", help="vLLM's own reload too, in its own server with these flags")
    parser.add_argument("--logs", type=Path, help="folder for the services' logs")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows: list[Row] = []
    print(HEADER + "\n" + "|---" * HEADER.count(" | ") + "|---|")
    with tempfile.TemporaryDirectory() as temporary:
        for model in args.models:
            folder = Path(model) if Path(model).is_dir() else write_model(model, Path(temporary) / model, args.device)
            for curve in (False, True) if args.curve else (False,):
                log = (args.logs or Path(temporary)) / f"{folder.name}-{curve}.log"
                with Service.started(folder, log, args, curve=curve) as service:
                    rows += measure(service, folder.name, args)
                _write(args.json, rows)
            if args.stock is not None:
                rows.append(measure_stock(folder, log.with_name(f"{folder.name}-stock.log"), args))
                _write(args.json, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
