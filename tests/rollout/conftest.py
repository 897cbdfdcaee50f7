"""Fixtures of the service's tests; knows which event loop they run on."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.helpers.rig import Rig, running


@pytest.fixture
def anyio_backend() -> str:
    """The service is written for asyncio."""
    return "asyncio"


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    """A service with default settings."""
    async with running(tmp_path) as found:
        yield found
