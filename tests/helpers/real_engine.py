"""A real engine for synchronous tests, and checkpoints and updates to try it with.

Knows the engine protocol; knows nothing of what is tested.
"""

import asyncio
import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save_file

from flashrl_rollout import stored_state
from flashrl_rollout.engine import Engine, EngineCompletion
from flashrl_rollout.staged import StagedUpdate, write_staged
from flashrl_rollout.stored_state import Parts
from flashrl_wire.delta import diff
from flashrl_wire.digest import PartDigest
from flashrl_wire.layout import WeightLayout
from flashrl_wire.messages import Sampling

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ROOT / "tests" / "engine"
T = TypeVar("T")
TIMEOUT_S = 250.0
MAX_MODEL_LEN = 320
PROMPTS = [[7, 19, 222, 30, 15], [400, 401, 402], [5] * 40]
KEPT_BY_FP8 = "*.down_proj"
"""The layers that the engines in fp8 keep in bf16."""
GREEDY = Sampling(temperature=0, max_tokens=24)


class LoopThread:
    """An event loop in a thread: an engine belongs to one loop for its whole life, tests come and go."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T], timeout_s: float = TIMEOUT_S) -> T:
        """The result of a coroutine on the loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout_s)

    def stop(self) -> None:
        """End the loop."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(TIMEOUT_S)
        self._loop.close()


@dataclass(frozen=True)
class Checkpoints:
    """Folders of one model with different weights: the first, and two steps away from it."""

    first: Path
    second: Path
    third: Path


def make_checkpoints(model: Path, folder: Path) -> Checkpoints:
    """The model, and it twice perturbed so strongly that greedy output changes."""
    second = perturbed(model, folder / "second", seed=1, share=0.02)
    return Checkpoints(model, second, perturbed(second, folder / "third", seed=2, share=0.3))


def perturbed(model: Path, folder: Path, seed: int, share: float) -> Path:
    """A copy of a checkpoint with noise of a tenth of its spread on a share of each tensor's elements."""
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(model / "model.safetensors")
    for name, values in tensors.items():
        noise = torch.randn(values.shape, generator=generator) * 0.1 * (values.float().std() + 0.01)
        hit = torch.rand(values.shape, generator=generator) < share
        tensors[name] = torch.where(hit, values.float() + noise, values.float()).bfloat16()
    return save_like(model, folder, tensors)


def save_like(model: Path, folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """A checkpoint of these tensors, with the configuration and tokenizer of another."""
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def delta(layout: WeightLayout, old: Parts, new: Parts, file: Path) -> StagedUpdate:
    """A staged update from one stored state to another."""
    found = [diff(part.name, old[part.name], new[part.name]) for part in layout.parts()]
    return write_staged(file, [change for change, _ in filter(None, found)])


async def load(engine: Engine, folder: Path, version: int) -> dict[str, PartDigest]:
    """Load a checkpoint as a commit does."""
    await engine.pause("keep", 30)
    shifts = await engine.load_checkpoint(folder)
    await engine.adopt(version)
    await engine.resume()
    await engine.keep()
    return shifts


async def greedy(engine: Engine) -> list[tuple[list[int], list[float]]]:
    """Greedy tokens and log-probabilities of every prompt, one at a time: a batch may change the last bit."""
    found = [await engine.generate(f"greedy-{i}", prompt, 1, GREEDY, 0) for i, prompt in enumerate(PROMPTS)]
    return [(completion.token_ids, completion.logprobs) for (completion,) in found]


async def walk(engine: Engine, folders: Sequence[Path], stage: Path) -> list[dict[str, Any]]:
    """Take the engine from checkpoint to checkpoint by deltas; its greedy output and the digests' verdict at each."""
    layout = await engine.layout()
    states = [stored_state.read_parts(folder, layout) for folder in folders]
    digests = await engine.digests()
    report: list[dict[str, Any]] = [
        {"greedy": await greedy(engine), "digests_agree": digests == stored_state.digests(states[0])}
    ]
    for version, (old, new) in enumerate(itertools.pairwise(states), start=1):
        update = delta(layout, old, new, stage / f"{version}.staged")
        await engine.prepare(update)
        await engine.pause("keep", 30)
        shifts, _ = await asyncio.gather(engine.apply(update), engine.adopt(version))
        await engine.resume()
        await engine.keep()
        digests = {name: value + shifts[name] if name in shifts else value for name, value in digests.items()}
        agree = digests == await engine.digests() == stored_state.digests(new)
        report.append({"greedy": await greedy(engine), "digests_agree": agree})
    return report


def spans_cover(completion: EngineCompletion) -> bool:
    """Whether the version spans are ascending and make up the tokens without a gap."""
    spans = completion.weight_versions
    ends = [0, *(end for _, _, end in spans)]
    starts = [*(start for _, start, _ in spans), len(completion.token_ids)]
    versions = [version for version, _, _ in spans]
    return ends == starts and versions == sorted(set(versions))


def command(program: str, arguments: Sequence[str]) -> list[str]:
    """The command line of a program beside the engine tests."""
    return [sys.executable, str(PROGRAMS / program), *arguments]


def environment() -> dict[str, str]:
    """For programs: one thread, and the helpers importable."""
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def output_of(program: str, arguments: Sequence[str]) -> Any:
    """What a program printed last, as JSON."""
    done = subprocess.run(
        command(program, arguments), env=environment(), capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])
