"""What the bytes of a snapshot cost on their way, stage by stage, without an engine: is encryption the slow one?

    python -m benchmarks.bulk_wire --mb 200 --json bulk.json

Encode (planes and zstd), send over loopback without and with CURVE, verify and unpack (`transfer`), decode into shared
memory (`staging`). Seconds on the clock and of CPU, in one process; the CPU's tell more on a busy machine. Knows the
stages of an update; knows nothing of engines or of deltas.
"""

import argparse
import json
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import zmq

from flashrl_rollout import stored_state
from flashrl_rollout.receiver import Receiver
from flashrl_rollout.security import read_keys, write_keys
from flashrl_rollout.staging import stage
from flashrl_rollout.transfer import Transfer
from flashrl_trainer.publisher import load_curve_keys
from flashrl_wire import codec, delta, frames
from flashrl_wire.frames import ChunkFrame, Hello
from flashrl_wire.layout import TensorSpec, WeightLayout
from flashrl_wire.messages import Manifest

CREDIT_BYTES = 16 << 20
LIMIT_S = 600.0


@dataclass(frozen=True)
class Stage:
    """One stage; `gb_per_cpu_s` is of wire bytes."""

    name: str
    seconds: float
    cpu_s: float
    gb_per_cpu_s: float


class Bench:
    """Times stages of one snapshot."""

    def __init__(self, num_bytes: int) -> None:
        rows = num_bytes // 1030  # codes and their scales
        self.layout = WeightLayout.of([TensorSpec(name="w.weight", shape=(rows, 1024), storage="int8_rows")])
        self._parts = stored_state.random_parts(self.layout, 0)
        self.stages: list[Stage] = []
        with self.timed("encode"):
            changes = [delta.snapshot(name, values) for name, values in self._parts.items()]
            self._encoded = codec.encode(changes)
        self.wire_bytes = sum(map(len, self._encoded.payloads))
        self.stages = [_with_rate(each, self.wire_bytes) for each in self.stages]

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """A stage is what happens in the block."""
        started = time.monotonic(), time.process_time()
        yield
        stage = Stage(name, time.monotonic() - started[0], time.process_time() - started[1], 0.0)
        self.stages.append(_with_rate(stage, getattr(self, "wire_bytes", 1)))

    def transfer(self, transfer_id: str) -> Transfer:
        """Its chunks awaited."""
        manifest = Manifest(
            kind="snapshot",
            run_id="run-a",
            base_version=0,
            base_digest="0" * 32,
            version=1,
            digest="0" * 32,
            layout_hash=self.layout.hash,
            changed_elements=self._encoded.changed_elements,
            segments=self._encoded.segments,
            chunks=self._encoded.chunks,
        )
        return Transfer(transfer_id, manifest, CREDIT_BYTES)

    def unpack(self, folder: Path) -> None:
        """Without a socket: what the receiver and the stager do with the chunks."""
        transfer = self.transfer("t")
        with self.timed("verify and unpack"):
            for index, payload in enumerate(self._encoded.payloads):
                transfer.handle(ChunkFrame("t", index), memoryview(payload), b"a")
        with self.timed("decode into shared memory"):
            stage(transfer, folder / "update.staged", {part.name: part for part in self.layout.parts()})
        (folder / "update.staged").unlink()

    def send(self, name: str, folder: Path, *, curve: bool) -> None:
        """Over the service's own socket, verified and unpacked at its end."""
        keys = read_keys(folder / "keys/service") if curve else None
        receiver, done = Receiver("127.0.0.1", 0, keys), threading.Event()
        receiver.start()
        context = zmq.Context()
        dealer = context.socket(zmq.DEALER)
        if curve:
            own = load_curve_keys(folder / "keys/trainer")
            dealer.curve_publickey, dealer.curve_secretkey, dealer.curve_serverkey = own.public, own.secret, own.server
        dealer.connect(f"tcp://127.0.0.1:{receiver.port}")
        receiver.open(self.transfer("t"), lambda _: done.set())
        dealer.send(frames.pack(Hello("t")))
        assert dealer.poll(LIMIT_S * 1000)
        with self.timed(name):
            for index, payload in enumerate(self._encoded.payloads):
                dealer.send(frames.pack(ChunkFrame("t", index)), zmq.SNDMORE)
                dealer.send(payload, copy=False)
            assert done.wait(LIMIT_S)
        context.destroy(linger=0)
        receiver.stop()


def _with_rate(stage: Stage, num_bytes: int) -> Stage:
    return Stage(stage.name, stage.seconds, stage.cpu_s, num_bytes / 1e9 / max(1e-9, stage.cpu_s))


def main() -> int:
    """0 once everything is measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=int, default=200, help="stored bytes, random INT8 rows")
    parser.add_argument("--repeats", type=int, default=3, help="of the sends; the one with the least CPU time counts")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    bench = Bench(args.mb * 10**6)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as temporary:
        folder = Path(temporary)
        write_keys(folder / "keys")
        bench.unpack(folder)
        for _ in range(args.repeats):
            bench.send("plain, verified and unpacked", folder, curve=False)
            bench.send("CURVE, verified and unpacked", folder, curve=True)
    best = {each.name: each for each in sorted(bench.stages, key=lambda each: -each.cpu_s)}
    print(f"{bench.wire_bytes / 1e6:.0f} MB on the wire\n| stage | s | CPU s | GB a CPU second |\n|---|---|---|---|")
    for each in best.values():
        print(f"| {each.name} | {each.seconds:.2f} | {each.cpu_s:.2f} | {each.gb_per_cpu_s:.2f} |")
    if args.json:
        args.json.write_text(json.dumps([asdict(each) for each in best.values()], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
