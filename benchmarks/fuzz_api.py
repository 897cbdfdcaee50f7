"""Does a service survive everything that can be sent to its two ports?

    python -m benchmarks.fuzz_api --minutes 10                 # the scripted engine: everything but the model
    python -m benchmarks.fuzz_api --minutes 3 --real           # vLLM on the CPU with the tiny model, and its own routes

A list of bad requests, broken HTTP, noise on the weights port, and for the rest of the time requests drawn from the
OpenAPI description, right and wrong ones (schemathesis). What must not be: a status of 500 or more but a 503 with
Retry-After, a stack trace in a body, no answer in time, another greedy sample or other weights afterwards. Exits with 1
for any of it.
"""

import argparse
import asyncio
import itertools
import json
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from benchmarks import abuse_http, abuse_wire
from benchmarks.bad_requests import bad_requests
from benchmarks.openapi_cases import DEPARTS, OpenApiCases, Sent
from benchmarks.service_process import ServiceProcess, tiny_service

LIMIT_S = 20.0
_SHOWN = 2000  # characters of what was sent or logged
SETTINGS = {
    "request_timeout_s": 1, "admit_timeout_s": 1, "drain_deadline_s": 1, "transfer_deadline_s": 2, "run_idle_s": 1,
    "max_waiting": 4096, "checkpoint_roots": "/no/checkpoints",
}  # fmt: skip


@dataclass
class Report:
    """What was sent and answered; `failures` is what should not have been."""

    bad_requests: Counter[str] = field(default_factory=Counter)
    raw_connections: Counter[str] = field(default_factory=Counter)
    wire_messages: int = 0
    drawn: Counter[str] = field(default_factory=Counter)
    slowest_s: float = 0.0
    slowest: str = ""
    failures: list[str] = field(default_factory=list)

    def fail(self, text: str) -> None:
        """Note what is wrong, the first hundred times."""
        if len(self.failures) < 100:
            self.failures.append(text)
            print(f"FAILED {text}", flush=True)


class Fuzz:
    """One run against one service."""

    def __init__(self, running: ServiceProcess, args: argparse.Namespace) -> None:
        self.report = Report()
        self._running, self._args = running, args
        self._http = httpx.Client(base_url=running.url, timeout=LIMIT_S)
        self._before = self._state()

    def run(self) -> Report:
        """All kinds of abuse, with a look at the service's health after each."""
        end = time.monotonic() + self._args.minutes * 60
        for part in (self._listed, self._broken_http, self._noise)[: None if self._args.abuse else 0]:
            part()
            self._check_health(part.__name__)
        self._drawn(end)
        self._check_health("drawn")
        self._check_wire()
        return self.report

    def _listed(self) -> None:
        for request in bad_requests():
            start = time.monotonic()
            reply = self._http.request(
                request.method, request.path, content=request.body, headers={"content-type": request.content_type}
            )
            self.report.bad_requests[str(reply.status_code)] += 1
            if reply.status_code not in request.statuses:
                self.report.fail(f"{request.name}: {reply.status_code} {reply.text[:200]}")
            self._judge(Sent(request.name, reply.status_code, dict(reply.headers), reply.content, _since(start)))

    def _broken_http(self) -> None:
        port = httpx.URL(self._running.url).port
        assert port is not None
        for ended in asyncio.run(abuse_http.abuse(port)):
            self.report.raw_connections[str(ended.status or "closed")] += 1
            if ended.complaint:
                self.report.fail(ended.complaint)

    def _noise(self) -> None:
        self.report.wire_messages += asyncio.run(abuse_wire.abuse(self._running.weights_port, self._args.seed))

    def _drawn(self, end: float) -> None:
        cases = OpenApiCases(self._running.url, LIMIT_S, with_standard=self._args.real)
        for number in itertools.count(self._args.seed * 1_000_000):
            for name, outcomes in cases.round(number, end):
                for sent in outcomes:
                    self.report.drawn[f"{name} {sent.status}"] += 1
                    self._judge(sent)
                self._http.post("/resume")  # a pause was among them
            if time.monotonic() > end:
                return
            self._check_health(f"round {number}")
            print(f"{time.strftime('%H:%M:%S')} {sum(self.report.drawn.values())} drawn requests", flush=True)

    def _judge(self, sent: Sent) -> None:
        if sent.seconds > self.report.slowest_s:
            self.report.slowest_s, self.report.slowest = round(sent.seconds, 2), sent.name[:200]
        if sent.seconds > LIMIT_S or not sent.status:
            self.report.fail(f"no answer within {LIMIT_S:g} s: {sent.name[:_SHOWN]}")
        elif sent.status >= 500 and not (sent.status == 503 and sent.headers.get("retry-after", "").isdigit()):
            self.report.fail(f"{sent.status} {sent.content[:300]!r} for {sent.name[:_SHOWN]}")
        elif b"Traceback (most" in sent.content or b'File "/' in sent.content:
            self.report.fail(f"a stack trace for {sent.name[:_SHOWN]}: {sent.content[:500]!r}")
        elif DEPARTS in sent.name:
            self.report.fail(sent.name[-800:])
        elif sent.status >= 400 and sent.method != "HEAD" and not _is_error(sent.content):
            self.report.fail(f"{sent.status} with no error in {sent.content[:300]!r} for {sent.name[:_SHOWN]}")

    def _state(self) -> dict[str, Any]:
        """A greedy sample and the weights."""
        body = {"prompts": ["1+1=", [5, 6, 7]], "sampling": {"temperature": 0, "max_tokens": 16}}
        reply = self._http.post("/generate", json=body).raise_for_status().json()
        info = self._http.get("/weights").raise_for_status().json()
        return {
            "tokens": [result["completions"][0]["token_ids"] for result in reply["results"]],
            "weights": {name: info[name] for name in ("version", "digest", "poisoned", "last_update")},
        }

    def _check_health(self, after: str) -> None:
        try:
            self._http.post("/resume").raise_for_status()
            self._http.get("/ready").raise_for_status()
            found = self._state()
        except httpx.HTTPError as error:
            self.report.fail(f"unhealthy after {after}: {error}")
        else:
            if found != self._before:
                self.report.fail(f"changed by {after}: {found}, was {self._before}")

    def _check_wire(self) -> None:
        """A transfer still gets through, and is dropped again."""
        info = self._http.get("/weights").json()
        manifest = {
            "kind": "delta", "run_id": "fuzz", "base_version": info["version"], "base_digest": info["digest"],
            "version": info["version"] + 1, "digest": info["digest"], "layout_hash": info["layout_hash"],
            "changed_elements": 0, "segments": [], "chunks": [],
        }  # fmt: skip
        begun = self._http.post("/load_weights", json=manifest)
        aborted = self._http.delete(f"/load_weights/{begun.json().get('transfer_id')}")
        if (begun.status_code, aborted.status_code) != (202, 200):
            self.report.fail(f"a transfer afterwards: {begun.status_code} {begun.text}, {aborted.status_code}")


def _since(start: float) -> float:
    return time.monotonic() - start


def _is_error(content: bytes) -> bool:
    try:
        return bool(json.loads(content)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return content == b"Invalid HTTP request received."


def facts(report: Report) -> dict[str, Any]:
    """The report as JSON takes it."""
    counters = ("bad_requests", "raw_connections", "drawn")
    return vars(report) | {name: dict(sorted(getattr(report, name).items())) for name in counters}


def main() -> int:
    """0 where nothing was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--real", action="store_true", help="vLLM instead of the scripted engine")
    parser.add_argument("--quantization", default="int8")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--abuse", action=argparse.BooleanOptionalAction, default=True, help="the first two minutes")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "service.log"
        scripted = {"token_s": 0.001}
        with tiny_service(
            log, real=args.real, quantization=args.quantization, scripted=scripted, settings=SETTINGS
        ) as running:
            report = Fuzz(running, args).run()
        text = log.read_text(errors="replace")
        if running.exit_code != 0 or "Traceback" in text:
            at = text.find("Traceback")
            shown = text[-_SHOWN:] if at < 0 else text[max(0, at - 500) : at + _SHOWN]
            report.fail(f"the service ended with {running.exit_code}; of its log: {shown}")
    print(json.dumps(facts(report), indent=1))
    if args.json:
        args.json.write_text(json.dumps(facts(report), indent=1) + "\n")
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
