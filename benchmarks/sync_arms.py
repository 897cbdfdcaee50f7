"""One service and the trainer's side of it, for `sync`: makes updates of a wanted size, sends them, times both.

Knows the publisher, stored states and processes; knows nothing of tables.
"""

import argparse
import asyncio
import shlex
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil  # type: ignore[import-untyped]
import torch
from benchmarks.service_process import ServiceProcess, scripted_service, service
from benchmarks.updates import Made, State, make_delta, make_snapshot
from safetensors.torch import save_file
from tests.helpers.outgoing import outgoing
from torch import Tensor

from flashrl_rollout import stored_state
from flashrl_rollout.bench.shape_names import SHAPES
from flashrl_rollout.bench.shapes import write_shape
from flashrl_rollout.checkpoint_reader import Checkpoint
from flashrl_rollout.security import write_keys
from flashrl_trainer.publisher import CurveKeys, Publisher, load_curve_keys
from flashrl_trainer.rollout_client import RolloutClient
from flashrl_wire.digest import bits

LIMIT_S = 600.0
CONTEXT = 1024
_CODES = (torch.int8, torch.float8_e4m3fn)


@dataclass(frozen=True)
class Cost:
    """One update. `make_s`: compare and encode, or write the checkpoint; `send_s`: begin to commit, or the reload.

    CPU seconds are those of `send_s`, and tell more than it does where others use the cores too.
    """

    kind: str
    wire_bytes: int
    make_s: float
    send_s: float
    pause_ms: float
    running: int
    trainer_cpu_s: float = 0.0
    service_cpu_s: float = 0.0


@dataclass(frozen=True)
class Service:
    """A running service process, its model's folder and the keys to its weights port."""

    process: ServiceProcess
    folder: Path
    device: str
    keys: CurveKeys | None

    @property
    def curve(self) -> bool:
        """Whether the weights port is encrypted."""
        return self.keys is not None

    @classmethod
    @contextmanager
    def started(cls, folder: Path, log: Path, args: argparse.Namespace, *, curve: bool) -> Iterator["Service"]:
        """With free ports, until the block ends."""
        settings: dict[str, object] = {"audit_every": 0, "checkpoint_roots": folder.parent}
        keys = None
        if curve:
            write_keys(log.with_suffix(".keys"))
            settings["keys_dir"] = log.with_suffix(".keys") / "service"
            keys = load_curve_keys(log.with_suffix(".keys") / "trainer")
        device = "cuda" if torch.cuda.is_available() and args.device in ("auto", "cuda") else "cpu"
        with ExitStack() as stack:
            if args.scripted:
                options = {"folder": str(folder), "token_s": 0.01, "quantization": args.quantization}
                process = stack.enter_context(scripted_service(log, options, **settings))
            else:
                flags = [
                    word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))
                ]
                flags += ["--device", args.device, "--max-model-len", str(CONTEXT), *shlex.split(args.serve)]
                process = stack.enter_context(service(str(folder), args.quantization, log, *flags))
            yield cls(process, folder, device, keys)

    def cpu_seconds(self) -> float:
        """That all its processes have used so far."""
        main = psutil.Process(self.process.pid)
        times = [process.cpu_times() for process in (main, *main.children(recursive=True))]
        return float(sum(each.user + each.system for each in times))

    def running(self) -> int:
        """Sequences that the engine works on now."""
        return int(httpx.get(f"{self.process.url}/status").raise_for_status().json()["load"]["running_sequences"])

    @contextmanager
    def load(self, sequences: int) -> Iterator[None]:
        """So many sequences at work inside the block."""
        if not sequences:
            yield
            return
        with asking(self.process.url, sequences):
            end = time.monotonic() + LIMIT_S
            while self.running() < sequences and time.monotonic() < end:
                time.sleep(0.05)
            yield
        while self.running():
            time.sleep(0.05)


@contextmanager
def asking(url: str, sequences: int) -> Iterator[None]:
    """So many clients ask for long samples, one after another, until the block ends and they leave."""
    stop = threading.Event()
    thread = threading.Thread(target=lambda: asyncio.run(_ask(url, sequences, stop)))
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


async def _ask(url: str, sequences: int, stop: threading.Event) -> None:
    async with httpx.AsyncClient(base_url=url, timeout=LIMIT_S) as http:

        async def one(number: int) -> None:
            for turn in range(1 << 30):
                sampling = {"max_tokens": CONTEXT - 64, "seed": turn}
                await http.post("/generate", json={"prompts": [[7, 5, 3, number]], "sampling": sampling})

        clients = [asyncio.create_task(one(number)) for number in range(sequences)]
        while not stop.is_set():  # noqa: ASYNC110 (an asyncio.Event would belong to this loop)
            await asyncio.sleep(0.05)
        for client in clients:
            client.cancel()
        await asyncio.gather(*clients, return_exceptions=True)


class Arms:
    """The three ways to new weights, timed."""

    def __init__(self, service: Service, block_bytes: int, seed: int) -> None:
        self._service, self._block_bytes = service, block_bytes
        self._client = RolloutClient(service.process.url, None, request_timeout_s=LIMIT_S)
        self._publisher = Publisher(self._client, "run-a", deadline_s=LIMIT_S, keys=service.keys)
        self._layout = self._client.layout()
        self._first = stored_state.read_parts(service.folder, self._layout)
        self._state = State.of(self._layout, {name: part.to(service.device) for name, part in self._first.items()})
        assert self._state.digest == self._client.weights().digest, "the service holds other weights than its folder"
        self._generator = torch.Generator(service.device).manual_seed(seed)

    @property
    def full_bytes(self) -> int:
        """Of the whole stored form."""
        return self._state.num_bytes

    def cost(self, kind: str, share: tuple[float, float]) -> Cost:
        """One update of a kind, with `share` of the codes and of the rest changed."""
        if kind == "reload":
            return self._reload()
        new = {name: self._changed(values, share) for name, values in self._state.parts.items()}
        made = make_delta(self._state, new, self._block_bytes) if kind == "delta" else self._snapshot(new)
        running = self._service.running()
        cpu = time.process_time(), self._service.cpu_seconds()
        sent = self._publisher.publish(outgoing(made.update))
        used = time.process_time() - cpu[0], self._service.cpu_seconds() - cpu[1]
        self._state = made.state
        return Cost(kind, sent.wire_bytes, made.seconds, sent.seconds, sent.reply.pause_ms, running, *used)

    def _snapshot(self, new: dict[str, Tensor]) -> Made:
        started = time.monotonic()
        state = State.of(self._layout, new)
        digested = time.monotonic() - started
        made = make_snapshot(self._state, state, self._block_bytes)
        return Made(made.update, made.state, made.seconds + digested)

    def _changed(self, values: Tensor, share: tuple[float, float]) -> Tensor:
        """Other lowest bits in a share of the elements."""
        wanted = share[0] if values.dtype in _CODES else share[1]
        changed = values.clone()
        flat = bits(changed.view(-1))
        if wanted >= 1:
            flat.bitwise_xor_(1)
        else:
            count = int(wanted * flat.numel() + float(torch.rand(1, generator=self._generator, device=flat.device)))
            hit = torch.randint(flat.numel(), (count,), generator=self._generator, device=flat.device)
            flat[hit] = flat[hit] ^ 1
        return changed

    def _reload(self) -> Cost:
        """Write a checkpoint of the first weights and have the service read it."""
        tensors = dict(Checkpoint(self._service.folder).tensors([spec.name for spec in self._layout.tensors]))
        file = self._service.folder / "model.safetensors"
        index = self._service.folder / "model.safetensors.index.json"
        started = time.monotonic()
        save_file(tensors, file.with_suffix(".new"), metadata={"format": "pt"})
        make_s = time.monotonic() - started
        for old in self._service.folder.glob("*.safetensors"):
            old.unlink()
        index.unlink(missing_ok=True)
        file.with_suffix(".new").rename(file)
        running, started, cpu = self._service.running(), time.monotonic(), self._service.cpu_seconds()
        reply = self._client.load_checkpoint(str(self._service.folder), self._state.version + 1, LIMIT_S)
        send_s, used = time.monotonic() - started, self._service.cpu_seconds() - cpu
        on_device = {name: part.to(self._service.device) for name, part in self._first.items()}
        self._state = State.of(self._layout, on_device, reply.version)
        assert self._state.digest == reply.digest, "the service read something else"
        return Cost("reload", file.stat().st_size, make_s, send_s, reply.pause_ms, running, 0.0, used)


def changed_shares(text: str) -> tuple[float, float]:
    """`0.1%:2%` -> (0.001, 0.02): of codes and of the rest; one number stands for both."""
    shares = [float(each.removesuffix("%")) / (100 if each.endswith("%") else 1) for each in text.split(":")]
    if len(shares) > 2 or not all(0 <= share <= 1 for share in shares):
        raise ValueError(f"--changed: {text} is no share, or pair of shares, from 0% to 100%")
    return shares[0], shares[-1]


def write_model(name: str, folder: Path, device: str) -> Path:
    """Random weights in one of SHAPES."""
    if name not in SHAPES:
        raise SystemExit(f"--models: no folder and no shape {name}; shapes are {', '.join(SHAPES)}")
    folder.mkdir()
    write_shape(name, folder, "cuda" if torch.cuda.is_available() and device != "cpu" else "cpu")
    return folder
