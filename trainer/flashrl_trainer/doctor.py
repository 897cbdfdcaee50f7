"""What a run needs and what is missing, one line each. Knows where to look; changes nothing."""

import shutil
import socket
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from urllib.parse import urlsplit

import torch
from rich.console import Console

from flashrl_trainer import assemble
from flashrl_trainer.discovery import finder
from flashrl_trainer.fleet_start import replica_maker
from flashrl_trainer.model import dtype_advice
from flashrl_trainer.replica import Replica
from flashrl_trainer.rollout_client import ServiceUnreachableError
from flashrl_trainer.settings import TrainerConfig
from flashrl_wire.errors import WireError

PACKAGES = ("torch", "transformers", "datasets", "pyzmq", "httpx", "wandb")
MIN_FREE_GIB = 4.0

Check = Callable[[TrainerConfig], str]


class MissingError(Exception):
    """Something a run needs is not there; the message says what to do."""


def report(config: TrainerConfig) -> int:
    """Print every check's outcome; the exit code: 0 where nothing is missing, else 1."""
    console = Console(highlight=False, soft_wrap=True)
    failed = 0
    for name, check in CHECKS.items():
        try:
            console.print(f"[green]ok     [/] {name}: {check(config)}")
        except (MissingError, ValueError, OSError, WireError, ServiceUnreachableError) as error:
            failed += 1
            console.print(f"[red]missing[/] {name}: ", end="")
            console.print(str(error), markup=False)
    return 1 if failed else 0


def _versions(config: TrainerConfig) -> str:
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            raise MissingError(f"package {package} is not installed: pip install 'flashrl[trainer]'") from None
    return ", ".join(found)


def _device(config: TrainerConfig) -> str:
    if config.model.device == "cuda" and not torch.cuda.is_available():
        raise MissingError("model.device is cuda and there is no CUDA device")
    if config.model.device == "cpu" or not torch.cuda.is_available():
        advice = dtype_advice("cpu", config.model.compute_dtype)
        return f"CPU, {torch.get_num_threads()} threads" + (f"; {advice}" if advice else "")
    free, total = (num_bytes / 2**30 for num_bytes in torch.cuda.mem_get_info())
    return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, {free:.1f} of {total:.1f} GiB free"


def _memory(config: TrainerConfig) -> str:
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) / 2**20
    if free < MIN_FREE_GIB:
        raise MissingError(f"{free:.1f} GiB of memory are free, {MIN_FREE_GIB:g} are needed")
    return f"{free:.1f} GiB free"


def _shared_memory(config: TrainerConfig) -> str:
    free = shutil.disk_usage("/dev/shm").free / 2**30
    if free < 0.25:
        raise MissingError(f"/dev/shm has {free:.2f} GiB free; start the container with shm_size: 2gb or more")
    return f"/dev/shm has {free:.1f} GiB free"


def _run_folder(config: TrainerConfig) -> str:
    folder = Path(config.run.dir)
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    with tempfile.TemporaryFile(dir=existing):
        free = shutil.disk_usage(existing).free / 2**30
    return f"{folder} can be written, {free:.0f} GiB free"


def _data(config: TrainerConfig) -> str:
    inputs = assemble.read_inputs(config, lambda line: None)
    inputs.scorer.start()
    inputs.scorer.close()
    first = inputs.prompts.next(1)[0]
    return f"{config.data.train} readable (first prompt {first.id}), {len(inputs.eval_prompts)} problems to evaluate on"


def _service(config: TrainerConfig) -> str:
    found = []
    for replica in _replicas(config):
        replica.client.wait_ready(5.0, lambda state: None)
        info = replica.client.weights()
        if info.quantization != config.rollout.quantization:
            raise MissingError(
                f"the service at {replica.url} runs {info.quantization}, rollout.quantization is "
                f"{config.rollout.quantization}"
            )
        found.append(f"{replica.url} serves {info.model} as {info.quantization}, version {info.version}")
    return "; ".join(found)


def _weights_port(config: TrainerConfig) -> str:
    found = []
    for replica in _replicas(config):
        host, port = urlsplit(replica.url).hostname, replica.client.weights().weights_port
        with socket.create_connection((host, port), timeout=5.0):
            found.append(f"{host}:{port}")
    return f"{', '.join(found)} accepts connections"


def _replicas(config: TrainerConfig) -> list[Replica]:
    urls = finder(config.rollout)()
    if not urls:
        raise MissingError(f"rollout.discover: {config.rollout.discover} has no address")
    return [replica_maker(config, "doctor")(url) for url in urls]


CHECKS: dict[str, Check] = {
    "versions": _versions,
    "device": _device,
    "memory": _memory,
    "shared memory": _shared_memory,
    "run folder": _run_folder,
    "model and data": _data,
    "service": _service,
    "weights port": _weights_port,
}
