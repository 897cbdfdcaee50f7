"""Heads that have no end, in bytes or in time, over real connections."""

import asyncio
import json
from collections.abc import AsyncIterator

import pytest
import uvicorn
from starlette.responses import PlainTextResponse

from flashrl_rollout.http_limits import MAX_HEAD_BYTES, LimitedHttp

pytestmark = pytest.mark.anyio
LIMIT_S = 10.0


class Impatient(LimitedHttp):
    """Gives up soon."""

    _head_timeout_s = 0.5


@pytest.fixture
async def port(request: pytest.FixtureRequest) -> AsyncIterator[int]:
    """Where a server listens that greets everybody."""
    kind = getattr(request, "param", LimitedHttp)
    config = uvicorn.Config(PlainTextResponse("hello"), port=0, http=kind, lifespan="off", log_config=None)
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    async with asyncio.timeout(LIMIT_S):
        while not server.started:  # noqa: ASYNC110 (uvicorn has no event for it)
            await asyncio.sleep(0.001)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    await serving


async def answer(port: int, *pieces: bytes) -> bytes:
    """All that comes back until the connection is closed."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for piece in pieces:
        writer.write(piece)
    try:
        return await asyncio.wait_for(reader.read(), LIMIT_S)
    finally:
        writer.close()


GET = b"GET / HTTP/1.1\r\nHost: x\r\n"
CLOSE = b"Connection: close\r\n\r\n"


@pytest.mark.parametrize("piece", [b"X: " + b"a" * 1000 + b"\r\n", b"a" * 1000])
async def test_head_without_end_is_refused(port: int, piece: bytes) -> None:
    """Many headers, or one."""
    reply = await answer(port, GET + b"X: ", piece * (MAX_HEAD_BYTES // len(piece) + 1))
    head, _, body = reply.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 413 ")
    assert json.loads(body)["error"]["code"] == "too_large"


async def test_requests_within_the_limit_are_answered(port: int) -> None:
    long = b"X: " + b"a" * (MAX_HEAD_BYTES // 2) + b"\r\n"
    assert (await answer(port, GET + long + CLOSE)).endswith(b"hello")
    several = await answer(port, GET + b"\r\n", GET + b"\r\n", GET + CLOSE)
    assert several.count(b"hello") == 3


@pytest.mark.parametrize("port", [Impatient], indirect=True)
@pytest.mark.parametrize("sent", [b"", GET, GET + b"\r\n" + GET])
async def test_connection_that_never_gets_to_the_end_of_a_head_is_closed(port: int, sent: bytes) -> None:
    """Before the first request and after one."""
    assert (await answer(port, sent)).count(b"hello") == sent.count(b"\r\n\r\n")
