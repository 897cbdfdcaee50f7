"""Services that are killed, starved and crowded; knows how to start one and how to end what is left."""

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import httpx
import pytest
from tests.helpers.forked import LIMIT_S, ServiceProgram, free_ports


class Start(Protocol):
    """Starts a scripted service on free ports or the ones given; returns once it is ready, or has ended."""

    def __call__(
        self, ports: list[int] | None = None, *, settings: dict[str, object] | None = None, **options: object
    ) -> ServiceProgram: ...


@pytest.fixture
def anyio_backend() -> str:
    """The service is written for asyncio."""
    return "asyncio"


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """For one test, with all stage folders in its own."""
    started: list[ServiceProgram] = []

    def begin(
        ports: list[int] | None = None, *, settings: dict[str, object] | None = None, **options: object
    ) -> ServiceProgram:
        log = tmp_path / f"service-{len(started)}"
        started.append(ServiceProgram(log, ports or free_ports(2), settings=settings, **options))
        while not started[-1].ends_within(0.02) and not started[-1].is_ready:
            pass
        return started[-1]

    yield begin
    for service in started:
        service.kill()


@pytest.fixture
async def http() -> Iterator[httpx.AsyncClient]:
    """A client for any address."""
    async with httpx.AsyncClient(timeout=LIMIT_S) as client:
        yield client
