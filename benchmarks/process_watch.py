"""What a service uses and reports while it is under load: memory of all its processes, its gauges, how fast it answers.

Knows process trees and /metrics; knows nothing of what the load is.
"""

import asyncio
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import httpx
import psutil  # type: ignore[import-untyped]

LIMIT_S = 30.0
_GAUGE = re.compile(r"^(flashrl_\w+(?:\{[^}]*\})?) ([-+0-9.eE]+)$", re.MULTILINE)
_ANONYMOUS = re.compile(r"^Anonymous: +(\d+) kB$", re.MULTILINE)
_AT_REST = ("running_sequences", "waiting_sequences", "active_requests", "active_sequences")


class ProcessWatch:
    """A service process, its children and its routes for the curious."""

    def __init__(self, pid: int, http: httpx.AsyncClient) -> None:
        self._service, self._http = psutil.Process(pid), http

    def memory(self) -> dict[str, int]:
        """Resident bytes of each process, by name."""
        found: dict[str, int] = {}
        for process in self._processes():
            found[process.name()] = found.get(process.name(), 0) + process.memory_info().rss
        return found

    def anonymous(self) -> dict[str, int]:
        """The part of it that no file backs: what the kernel cannot drop and read again, so what a leak would be in."""
        found: dict[str, int] = {}
        for process in self._processes():
            rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
            kibibytes = int(_ANONYMOUS.findall(rollup)[0])
            found[process.name()] = found.get(process.name(), 0) + (kibibytes << 10)
        return found

    def counts(self) -> tuple[int, int]:
        """Open files and threads of the service's own process."""
        return self._service.num_fds(), self._service.num_threads()

    def _processes(self) -> Iterator[psutil.Process]:
        yield self._service
        yield from self._service.children(recursive=True)

    async def gauges(self) -> Mapping[str, float]:
        """Every number of /metrics that is the service's own, by name without `flashrl_`."""
        text = (await self._http.get("/metrics", timeout=LIMIT_S)).raise_for_status().text
        return {name.removeprefix("flashrl_"): float(value) for name, value in _GAUGE.findall(text)}

    async def health_seconds(self) -> float:
        """How long /health takes."""
        start = time.monotonic()
        (await self._http.get("/health", timeout=LIMIT_S)).raise_for_status()
        return time.monotonic() - start

    async def seconds_to_rest(self, limit_s: float) -> float | None:
        """How long until no sequence runs or waits and no request is active; None after `limit_s`."""
        start = time.monotonic()
        while time.monotonic() - start < limit_s:
            gauges = await self.gauges()
            if not any(gauges.get(name, 0.0) for name in _AT_REST):
                return time.monotonic() - start
            await asyncio.sleep(0.02)
        return None
