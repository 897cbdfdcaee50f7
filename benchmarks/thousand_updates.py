"""A thousand updates in a row: do weights, memory and output stay exactly what they should be?

    python -m benchmarks.thousand_updates --json thousand.json                     # vLLM on the CPU, the tiny model
    python -m benchmarks.thousand_updates --scripted --updates 200                 # without an engine

Each update changes a random share of the weights, from none to all of them; every fourth is committed while a request
is under way. The digest of every commit is compared with the trainer's own, the service audits the engine's tensors
every `--audit-every` commits, and the memory of all its processes is taken on the way. Before, the service sees every
number of tokens that a step will have: on a CPU, oneDNN makes and keeps a product for each of them, up to 2 MB a
number. At the end greedy tokens and log-probs are compared with those of a second service, started from a checkpoint of
the last weights. Ends with 1 where anything differs.
"""

import argparse
import asyncio
import json
import math
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import httpx
from benchmarks.process_watch import ProcessWatch
from benchmarks.service_process import ServiceProcess, scripted_service, service
from benchmarks.updates import State, make_delta
from benchmarks.weight_walk import WeightWalk
from tests.helpers.wire_trainer import Wire, WireTrainer

from flashrl_wire.layout import TensorSpec, WeightLayout

MODEL = Path("examples/tiny_arith/model")
HELDOUT = Path("examples/tiny_arith/data/heldout.jsonl")
MAX_TOKENS = 40
BLOCK_BYTES = 1 << 20
SNAPSHOTS_OF_MEMORY = 10
AUDIT_LIMIT_S = 60.0
MOST_STEP_TOKENS = 200  # two samples of the longest prompt, begun anew after a commit
SMALLEST_VOCABULARY = 512


@dataclass
class Report:
    """What was seen; `failures` is what should not have been."""

    updates: int = 0
    seconds: float = 0.0
    shares: dict[str, int] = field(default_factory=dict)
    changed_elements: list[int] = field(default_factory=list)
    wire_bytes: list[int] = field(default_factory=list)
    pause_ms: list[float] = field(default_factory=list)
    memory_mib: dict[int, dict[str, float]] = field(default_factory=dict)
    audits_passed: int = 0
    requests_meanwhile: int = 0
    completions_over_versions: int = 0
    prompts_compared: int = 0
    prompts_that_differ: int = 0
    failures: list[str] = field(default_factory=list)

    @property
    def growth(self) -> float:
        """Memory of all processes at the end over that after the first tenth, less 1."""
        totals = [sum(each.values()) for _, each in sorted(self.memory_mib.items())]
        return totals[-1] / totals[0] - 1 if totals else math.nan


def draw_share(draw: random.Random) -> float:
    """None, all, or anything between on a scale of logarithms, so that small ones are common."""
    kind = draw.random()
    if kind < 0.1:
        return 0.0
    if kind < 0.2:
        return 1.0
    return float(10 ** draw.uniform(-6, 0))


class Run:
    """One service and the trainer that knows what it should hold."""

    def __init__(self, running: ServiceProcess, http: httpx.AsyncClient, args: argparse.Namespace) -> None:
        self.report = Report()
        self._running, self._http, self._args = running, http, args
        self._watch = ProcessWatch(running.pid, http)
        specs = httpx.get(f"{running.url}/weights/layout").raise_for_status().json()
        self._layout = WeightLayout.of(TensorSpec.model_validate(spec) for spec in specs)
        self.walk = WeightWalk(Path(args.model), self._layout, args.seed)
        self.state = State.of(self._layout, self.walk.stored())
        self._draw = random.Random(args.seed)
        self._prompts = read_prompts(64)

    async def go(self) -> None:
        """All updates, each with a request under way."""
        if self.state.digest != self._running.weights()["digest"]:
            self.report.failures.append("the service does not hold the checkpoint that it was started from")
            return
        await self._visit_step_sizes()
        trainer = WireTrainer(self._http, Wire(self._running.weights_port))
        started = time.monotonic()
        try:
            for number in range(1, self._args.updates + 1):
                await self._update(trainer, number)
        finally:
            trainer.wire.close()
            self.report.seconds = time.monotonic() - started
        await self._read_counts()

    async def _visit_step_sizes(self) -> None:
        draw = random.Random(self._args.seed)  # prompts that share no beginning: what is cached is not computed
        for length in range(1, MOST_STEP_TOKENS + 1):
            prompt = [draw.randrange(SMALLEST_VOCABULARY) for _ in range(length)]
            body = {"prompts": [prompt], "sampling": {"max_tokens": 1}}
            (await self._http.post("/generate", json=body)).raise_for_status()

    async def _update(self, trainer: WireTrainer, number: int) -> None:
        share = draw_share(self._draw)
        new = await asyncio.to_thread(self.walk.step, share)
        made = await asyncio.to_thread(make_delta, self.state, new, BLOCK_BYTES)
        sampling = asyncio.create_task(self._sample(number)) if number % self._args.sample_every == 0 else None
        reply = (await trainer.publish(made.update)).raise_for_status().json()
        if sampling is not None:
            await sampling
        if (reply["version"], reply["digest"]) != (number, made.state.digest):
            self.report.failures.append(f"update {number}: {reply}, should have digest {made.state.digest}")
        self.state = made.state
        self._note(share, made.update.manifest.wire_bytes, reply)
        if number % max(1, self._args.updates // SNAPSHOTS_OF_MEMORY) == 0:
            self._note_memory(number)
            self._check_state(number)

    def _check_state(self, number: int) -> None:
        """The digest that followed from the changes is that of the tensors."""
        whole, held = State.of(self._layout, self.state.parts).digest, self._running.weights()["digest"]
        if not whole == held == self.state.digest:
            self.report.failures.append(f"update {number}: digest {held}, of all tensors it is {whole}")

    def _note(self, share: float, wire_bytes: int, reply: dict[str, float]) -> None:
        report = self.report
        report.updates += 1
        decade = "0" if share == 0 else f"<= 1e{math.ceil(math.log10(share))}"
        report.shares[decade] = report.shares.get(decade, 0) + 1
        report.changed_elements.append(int(reply["changed_elements"]))
        report.wire_bytes.append(wire_bytes)
        report.pause_ms.append(reply["pause_ms"])

    def _note_memory(self, number: int) -> None:
        memory = {name: round(held / (1 << 20), 1) for name, held in self._watch.memory().items()}
        self.report.memory_mib[number] = memory
        print(f"{number} updates: {memory}, {len(self.report.failures)} failures", flush=True)

    async def _sample(self, number: int) -> None:
        """A few completions of one prompt, begun under the version before `number`; their spans must be possible."""
        prompt = self._prompts[number % len(self._prompts)]
        body = {"prompts": [prompt], "n": 2, "sampling": {"max_tokens": MAX_TOKENS, "seed": number}}
        reply = await self._http.post("/generate", json=body)
        if reply.status_code != 200:
            self.report.failures.append(f"sampling: {reply.status_code} {reply.text[:200]}")
            return
        self.report.requests_meanwhile += 1
        for completion in reply.json()["results"][0]["completions"]:
            spans = completion["weight_versions"]
            self.report.completions_over_versions += len(spans) > 1
            versions = [version for version, _, _ in spans]
            if versions not in ([number - 1], [number], [number - 1, number]):
                self.report.failures.append(f"update {number}: tokens of versions {spans}")

    async def _read_counts(self) -> None:
        due = self._args.updates // self._args.audit_every
        end = time.monotonic() + AUDIT_LIMIT_S
        while self.report.audits_passed < due and time.monotonic() < end:  # the last one runs behind its commit
            counts = await self._watch.gauges()
            self.report.audits_passed = int(counts.get('updates_total{result="audit_passed"}', 0))
        if self.report.audits_passed != due:
            self.report.failures.append(f"{self.report.audits_passed} audits passed of {due}")
        info = self._running.weights()
        if (info["version"], info["digest"]) != (self._args.updates, self.state.digest):
            self.report.failures.append(f"at the end the service holds {info}")
        if self.report.growth > self._args.max_growth:
            self.report.failures.append(f"memory grew by {self.report.growth:.1%}")


def read_prompts(count: int) -> list[str]:
    """Held-out questions as the tiny model knows them."""
    return [json.loads(line)["question"] + "\n" for line in HELDOUT.read_text().splitlines()[:count]]


@contextmanager
def started(model: Path, log: Path, args: argparse.Namespace) -> Iterator[ServiceProcess]:
    """A service with a checkpoint's weights."""
    if args.scripted:
        with scripted_service(log, {"folder": str(model)}, audit_every=args.audit_every) as running:
            yield running
        return
    flags = ["--device", args.device, "--max-model-len", "256", "--enforce-eager", "--threads", "1"]
    every = ["--audit-every", str(args.audit_every)]
    with service(str(model), args.quantization, log, *flags, *every) as running:
        yield running


async def run(folder: Path, args: argparse.Namespace) -> Report:
    """Updates against one service, then the comparison with another."""
    prompts = read_prompts(args.prompts)
    with started(args.model, folder / "service.log", args) as running:
        async with httpx.AsyncClient(base_url=running.url, timeout=600.0) as http:
            under_test = Run(running, http, args)
            await under_test.go()
        left = running.greedy(prompts, MAX_TOKENS)
    exported = under_test.walk.export(folder / "export")
    with started(exported, folder / "fresh.log", args) as fresh:
        right = fresh.greedy(prompts, MAX_TOKENS)
        same = fresh.weights()["digest"] == under_test.state.digest
    report = under_test.report
    report.prompts_compared = len(prompts)
    report.prompts_that_differ = sum(a != b for a, b in zip(left, right, strict=True))
    if report.prompts_that_differ or not same:
        report.failures.append(f"a fresh start differs: {report.prompts_that_differ} prompts, digest equal: {same}")
    return report


def main() -> int:
    """0 where nothing differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=1000)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--quantization", default="int8")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--scripted", action="store_true", help="the engine that computes no model")
    parser.add_argument("--audit-every", type=int, default=25)
    parser.add_argument("--sample-every", type=int, default=4, help="updates between those with a request under way")
    parser.add_argument("--prompts", type=int, default=32, help="how many are compared at the end")
    parser.add_argument("--max-growth", type=float, default=0.02, help="of memory, from a tenth of the run to its end")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = asyncio.run(run(Path(folder), args))
    print(f"{report.updates} updates in {report.seconds:.0f} s, {sum(report.wire_bytes) / 1e6:.0f} MB sent")
    print(f"shares changed: {dict(report.shares)}")
    print(
        f"pause in ms: median {sorted(report.pause_ms)[len(report.pause_ms) // 2]:.1f}, most {max(report.pause_ms):.1f}"
    )
    print(
        f"memory: {report.growth:+.2%}; {report.audits_passed} audits passed; "
        f"{report.completions_over_versions} completions went over a commit; "
        f"{report.prompts_that_differ} of {report.prompts_compared} prompts differ from a fresh start"
    )
    for failure in report.failures[:20]:
        print(f"FAILED: {failure}")
    summary = asdict(report) | {"growth": report.growth}
    if args.json:
        args.json.write_text(json.dumps(summary, indent=1) + "\n")
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
