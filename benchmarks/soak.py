"""Does a service under load for a long time lose anything: a sequence, memory, a version, an answer?

    python -m benchmarks.soak --minutes 15                        # the scripted engine: everything but the model
    python -m benchmarks.soak --minutes 15 --real --clients 48    # vLLM on the CPU with the tiny model

Hundreds of clients ask for random samples, leave, or ask for nonsense, while a trainer commits deltas of all sizes,
snapshots and checkpoints every few seconds and somebody pauses and resumes. After each phase all clients leave at once.
Then sampling with and without an update every second, in turn. Exits with 1 where anything was wrong.
"""

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import httpx
from benchmarks.process_watch import ProcessWatch
from benchmarks.scripted_draws import ScriptedDraws
from benchmarks.service_process import TINY_MODEL, ServiceProcess, tiny_service
from benchmarks.soak_clients import Client, Tally, Versions
from benchmarks.soak_updates import Pauser, Updater
from tests.helpers.wire_trainer import Update

from flashrl_rollout.stored_state import Parts

PROMPTS = Path("examples/tiny_arith/data/heldout.jsonl")
WATCH_EVERY_S = 5.0
REST_LIMIT_S, MEMORY_GROWTH = 1.0, 0.02
WINDOW_S, WINDOWS = 15.0, 4
SETTINGS = {
    "request_timeout_s": 120, "admit_timeout_s": 30, "drain_deadline_s": 5, "transfer_deadline_s": 60,
    "audit_every": 10,
}  # fmt: skip


@dataclass
class Report:
    """What was seen; `failures` is what should not have been."""

    outcomes: dict[str, int] = field(default_factory=dict)
    updates: dict[str, int] = field(default_factory=dict)
    pauses: dict[str, int] = field(default_factory=dict)
    pause_ms_median: float = 0.0
    pause_ms_most: float = 0.0
    tokens: int = 0
    completions_over_versions: int = 0
    seconds_to_rest: list[float] = field(default_factory=list)
    memory_mib: list[float] = field(default_factory=list)
    memory_mib_by_process: list[dict[str, float]] = field(default_factory=list)
    anonymous_mib_by_process: list[dict[str, float]] = field(default_factory=list)
    memory_mib_under_load: list[float] = field(default_factory=list)
    open_files: list[int] = field(default_factory=list)
    slowest_health_s: float = 0.0
    tokens_per_s_without_updates: list[float] = field(default_factory=list)
    tokens_per_s_with_updates: list[float] = field(default_factory=list)
    updates_in_windows: int = 0
    failures: list[str] = field(default_factory=list)

    @property
    def memory_growth(self) -> float:
        """From the end of the first phase, which warms everything up, to the end of the last."""
        return self.memory_mib[-1] / self.memory_mib[0] - 1 if self.memory_mib else 0.0

    @property
    def throughput_ratio(self) -> float:
        """Tokens a second with an update every second, over those without."""
        return sum(self.tokens_per_s_with_updates) / max(1e-9, sum(self.tokens_per_s_without_updates))


class Soak:
    """One run against one service."""

    def __init__(self, running: ServiceProcess, http: httpx.AsyncClient, args: argparse.Namespace) -> None:
        self.report = Report()
        self._running, self._http, self._args = running, http, args
        self._tally, self._versions = Tally(), Versions()
        self._watch = ProcessWatch(running.pid, http)
        lines = PROMPTS.read_text().splitlines()[:256]
        self._prompts = [json.loads(line)["question"] + "\n" for line in lines]
        self._pauser = Pauser(http, args.seed)
        self._updater: Updater
        self._prepared: list[tuple[Update, Parts]] = []

    async def run(self) -> Report:
        """All phases, the comparison, the last look."""
        self._updater = await Updater.of(self._http, TINY_MODEL, self._versions, self._args.seed)
        end = time.monotonic() + self._args.minutes * 60
        phases = max(2, round(self._args.minutes * 60 / self._args.phase_s))
        for phase in range(phases):
            left_s = (end - time.monotonic()) / (phases - phase)
            await self._phase(phase, max(left_s, 10.0))
        await self._compare()
        await self._last_look()
        self._updater.close()
        self._summarize()
        return self.report

    async def _phase(self, phase: int, seconds: float) -> None:
        clients = [self._start(phase * 10_000 + i) for i in range(self._args.clients)]
        others = [
            asyncio.create_task(_repeat(lambda: self._updater.step(self._tally), self._args.update_every)),
            asyncio.create_task(_repeat(lambda: self._pauser.step(self._tally), 8.0)),
            asyncio.create_task(_repeat(self._look, WATCH_EVERY_S)),
        ]
        done, _ = await asyncio.wait([*clients, *others], timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()  # they only end by failing
        await _end(others)  # pauser and updater finish what they are at
        await _end(clients)  # all leave at once
        rest_s = await self._watch.seconds_to_rest(10.0)
        self.report.seconds_to_rest.append(-1.0 if rest_s is None else round(rest_s, 3))
        if rest_s is None or rest_s > REST_LIMIT_S:
            self._tally.problem(f"sequences were left {REST_LIMIT_S:g} s after their clients: {await self._gauges()}")
        if problem := await self._updater.empty():  # a commit gives back what is free, so that only what is held counts
            self._tally.problem(problem)
        self.report.memory_mib.append(self._memory_mib())
        self.report.memory_mib_by_process.append(_mibs(self._watch.memory()))
        self.report.anonymous_mib_by_process.append(_mibs(self._watch.anonymous()))
        self.report.open_files.append(self._watch.counts()[0])
        self._say(f"phase {phase + 1}: at rest after {self.report.seconds_to_rest[-1]} s")

    def _start(self, seed: int) -> "asyncio.Task[None]":
        return asyncio.create_task(self._client(seed).run())

    def _client(self, seed: int) -> Client:
        client = Client(self._http, self._prompts, self._versions, self._tally, seed)
        if not self._args.real:
            client.draws = ScriptedDraws(self._versions).complaint
        return client

    async def _look(self) -> None:
        self.report.memory_mib_under_load.append(self._memory_mib())
        self.report.slowest_health_s = max(self.report.slowest_health_s, await self._watch.health_seconds())
        if len(self.report.memory_mib_under_load) % 6 == 0:
            self._say("")

    async def _compare(self) -> None:
        """Windows without and with an update every second, by clients that always want as many tokens."""
        clients = [asyncio.create_task(self._steady(self._client(90_000 + i))) for i in range(self._args.steady)]
        await asyncio.sleep(5.0)
        for _ in range(WINDOWS):
            self.report.tokens_per_s_without_updates.append(await self._tokens_per_s())
            self._prepared = await self._updater.prepared(round(WINDOW_S))
            before = self._versions.latest
            updates = asyncio.create_task(_repeat(self._next_update, 1.0))
            self.report.tokens_per_s_with_updates.append(await self._tokens_per_s())
            await _end([updates])
            self.report.updates_in_windows += self._versions.latest - before
        await _end(clients)

    async def _steady(self, client: Client) -> None:
        for number in range(1 << 30):
            sampling = {"max_tokens": 64, "temperature": 1.0, "seed": number}
            prompt = self._prompts[number % len(self._prompts)]
            await client.ask({"prompts": [prompt], "n": 4, "sampling": sampling, "min_weight_version": 0})

    async def _next_update(self) -> None:
        if self._prepared and (problem := await self._updater.publish(*self._prepared.pop(0))):
            self._tally.problem(problem)

    async def _tokens_per_s(self) -> float:
        tokens, start = self._tally.tokens, time.monotonic()
        await asyncio.sleep(WINDOW_S)
        return round((self._tally.tokens - tokens) / (time.monotonic() - start), 1)

    async def _last_look(self) -> None:
        """A normal request works, an audit finds the right bits, and nothing was ever poisoned."""
        await self._client(0).ask(
            {"prompts": ["1+1="], "n": 1, "sampling": {"max_tokens": 4, "temperature": 0}, "min_weight_version": 0}
        )
        info = (await self._http.get("/weights")).json()
        if (info["version"], info["digest"]) != (self._versions.latest, self._updater.digest) or info["poisoned"]:
            self._tally.problem(
                f"the service ends with {info['version']} {info['digest']}, poisoned {info['poisoned']}"
            )
        gauges = await self._gauges()
        if 'updates_total{result="audit_failed"}' in gauges or 'updates_total{result="audit_passed"}' not in gauges:
            self._tally.problem(f"audits: {[name for name in gauges if 'audit' in name]}")

    async def _gauges(self) -> dict[str, float]:
        return dict(await self._watch.gauges())

    def _memory_mib(self) -> float:
        return _mib(sum(self._watch.memory().values()))

    def _say(self, text: str) -> None:
        state = (
            f"{sum(self._tally.outcomes.values())} requests, version {self._versions.latest}, {self._memory_mib()} MiB"
        )
        print(f"{time.strftime('%H:%M:%S')} {state}, {len(self._tally.problems)} problems. {text}", flush=True)

    def _summarize(self) -> None:
        report, pauses = self.report, sorted(self._updater.updates.pauses_ms)
        report.outcomes = dict(sorted(self._tally.outcomes.items()))
        report.updates, report.pauses = dict(self._updater.updates.done), dict(self._pauser.done)
        report.pause_ms_median, report.pause_ms_most = round(pauses[len(pauses) // 2], 1), round(pauses[-1], 1)
        report.tokens, report.completions_over_versions = self._tally.tokens, self._tally.crossed
        report.failures = list(self._tally.problems)
        if abs(report.memory_growth) > MEMORY_GROWTH:
            report.failures.append(f"memory changed by {report.memory_growth:.1%}")
        if not report.completions_over_versions:
            report.failures.append("no completion crossed a commit: nothing was shown about spans")


def _mib(num_bytes: int) -> float:
    return round(num_bytes / (1 << 20), 1)


def _mibs(num_bytes: Mapping[str, int]) -> dict[str, float]:
    return {name: _mib(held) for name, held in num_bytes.items()}


async def _repeat(step: Callable[[], Awaitable[None]], every_s: float) -> None:
    """Do a step again and again; once cancelled, the one under way is finished."""
    while True:
        work = asyncio.ensure_future(step())
        try:
            await asyncio.shield(work)
        except asyncio.CancelledError:
            await work
            raise
        await asyncio.sleep(every_s)


async def _end(tasks: "list[asyncio.Task[None]]") -> None:
    for task in tasks:
        task.cancel()
    for outcome in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(outcome, Exception):
            raise outcome


async def soak(running: ServiceProcess, args: argparse.Namespace) -> Report:
    """One run."""
    # a connection for each request: httpx may close a kept one that it has just given to another request
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=running.url, limits=limits, timeout=None) as http:
        return await Soak(running, http, args).run()


def main() -> int:
    """0 where nothing was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=15.0, help="of load; the comparison takes two more")
    parser.add_argument("--real", action="store_true", help="vLLM instead of the scripted engine")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--steady", type=int, default=16, help="clients of the comparison")
    parser.add_argument("--update-every", type=float, default=3.0, help="seconds between updates")
    parser.add_argument("--token-s", type=float, default=0.01, help="seconds a token of the scripted engine")
    parser.add_argument("--quantization", default="int8")
    parser.add_argument("--phase-s", type=float, default=150.0, help="until all clients leave; the first one warms up")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "service.log"
        with tiny_service(
            log,
            real=args.real,
            quantization=args.quantization,
            scripted={"token_s": args.token_s},
            settings=SETTINGS | {"checkpoint_roots": TINY_MODEL.resolve()},
        ) as running:
            report = asyncio.run(soak(running, args))
        text = log.read_text(errors="replace")
        if running.exit_code != 0 or "Traceback" in text:
            report.failures.append(f"the service ended with {running.exit_code}; its log's end: {text[-3000:]}")
    facts = asdict(report) | {"memory_growth": report.memory_growth, "throughput_ratio": report.throughput_ratio}
    print(json.dumps(facts, indent=1))
    if args.json:
        args.json.write_text(json.dumps(facts, indent=1) + "\n")
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
