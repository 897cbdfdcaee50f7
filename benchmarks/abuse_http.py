"""Bytes on an HTTP port that no HTTP client sends: broken heads, heads and bodies without end, connections without use.

Knows sockets; knows nothing of routes. Every attempt has to end, with an answer below 500 or a closed connection.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

HOST = "127.0.0.1"
PATIENCE_S = 75.0  # a body may take 60 s, a head 30 s
_QUIET_S = 5.0
_MIB = 1 << 20
_HEAD = b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
_GOOD = b'{"prompts": ["hi"], "sampling": {"max_tokens": 1}}'


@dataclass(frozen=True)
class Attempt:
    """Bytes to send, piece by piece; `statuses` a good answer may have, where only closing would be no answer."""

    name: str
    pieces: Callable[[], AsyncIterator[bytes]]
    statuses: tuple[int, ...] = ()


@dataclass(frozen=True)
class Ended:
    """How an attempt ended: the status of the first answer (0: none), and its bytes."""

    attempt: Attempt
    status: int
    content: bytes
    seconds: float

    @property
    def complaint(self) -> str:
        """What is wrong with that, or nothing."""
        if self.seconds >= PATIENCE_S:
            return f"{self.attempt.name}: no end after {PATIENCE_S:g} s"
        if b"Traceback" in self.content or b'File "' in self.content:
            return f"{self.attempt.name}: says too much: {self.content[:300]!r}"
        if self.status >= 500 or (self.attempt.statuses and self.status not in self.attempt.statuses):
            return f"{self.attempt.name}: {self.status} {self.content[:300]!r}"
        return ""


async def abuse(port: int) -> list[Ended]:
    """All attempts, at the same time."""
    return list(await asyncio.gather(*(_try(port, attempt) for attempt in attempts())))


def attempts() -> list[Attempt]:
    """Every kind once."""
    return [*_broken_heads(), *_broken_bodies(), *_long(), *_slow(), *_odd()]


def _whole(content: bytes) -> Callable[[], AsyncIterator[bytes]]:
    async def pieces() -> AsyncIterator[bytes]:
        yield content

    return pieces


def _repeated(first: bytes, piece: bytes, count: int, pause_s: float = 0.0) -> Callable[[], AsyncIterator[bytes]]:
    async def pieces() -> AsyncIterator[bytes]:
        yield first
        for _ in range(count):
            await asyncio.sleep(pause_s)
            yield piece

    return pieces


def _broken_heads() -> list[Attempt]:
    heads = {
        "garbage": b"\x00\x01\x02\xff\xfe" * 50 + b"\r\n\r\n",
        "TLS hello": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
        "no version": b"GET /\r\n\r\n",
        "version 9.9": b"GET /health HTTP/9.9\r\nHost: x\r\n\r\n",
        "no path": b"GET  HTTP/1.1\r\nHost: x\r\n\r\n",
        "path of high bytes": b"GET /\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n",
        "header without colon": b"GET /health HTTP/1.1\r\nHost x\r\n\r\n",
        "header with a NUL": b"GET /health HTTP/1.1\r\nHost: x\x00y\r\n\r\n",
        "space in a name": b"GET /health HTTP/1.1\r\nHo st: x\r\n\r\n",
        "negative length": _HEAD + b"Content-Length: -1\r\n\r\n",
        "two lengths": _HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n[1,2]",
        "length and chunks": _HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "length of 5000 digits": _HEAD + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n",
        "unknown method": b"FROB /generate HTTP/1.1\r\nHost: x\r\n\r\n",
        "unknown encoding": _HEAD + b"Transfer-Encoding: gzip\r\n\r\nxxxx",
    }
    return [Attempt(name, _whole(content)) for name, content in heads.items()]


def _broken_bodies() -> list[Attempt]:
    chunked = _HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
    return [
        Attempt("chunk size that is none", _whole(chunked + b"zz\r\n{}\r\n0\r\n\r\n")),
        Attempt("chunk of 2^70", _whole(chunked + b"ffffffffffffffffff\r\n")),
        Attempt("declared 10 GB", _whole(_HEAD + b"Content-Length: 10000000000\r\n\r\n"), (413,)),
        Attempt("half a body, then silence", _whole(_HEAD + b"Content-Length: 100\r\n\r\n" + _GOOD), (400,)),
        Attempt("half a chunk, then silence", _whole(chunked + b"fff\r\n{"), (400,)),
        Attempt("asks first, sends nothing", _whole(_HEAD + b"Expect: 100-continue\r\nContent-Length: 50\r\n\r\n")),
        Attempt("gzip", _whole(_HEAD + b"Content-Encoding: gzip\r\nContent-Length: 4\r\n\r\n\x1f\x8b\x08\x00"), (400,)),
    ]


def _long() -> list[Attempt]:
    header = b"X-Long: " + b"a" * 8000 + b"\r\n"
    chunk = b"100000\r\n" + b" " * _MIB + b"\r\n"
    return [
        Attempt("headers without end", _repeated(b"GET /health HTTP/1.1\r\n", header, 5000), (413, 0)),
        Attempt("a header of 40 MB", _repeated(b"GET /health HTTP/1.1\r\nX: ", b"a" * 8000, 5000), (413, 0)),
        Attempt("a path of 40 MB", _repeated(b"GET /", b"a" * 8000, 5000), (413, 400, 0)),
        Attempt("chunks without end", _repeated(_HEAD + b"Transfer-Encoding: chunked\r\n\r\n", chunk, 200), (413, 0)),
    ]


def _slow() -> list[Attempt]:
    return [
        Attempt("a head in no hurry", _repeated(b"GET /health HTTP/1.1\r\n", b"X: y\r\n", 200, 0.5)),
        Attempt("a body in no hurry", _repeated(_HEAD + b"Content-Length: 500\r\n\r\n", b" ", 200, 0.5), (400,)),
        Attempt("a connection without a word", _whole(b"")),
    ]


def _odd() -> list[Attempt]:
    get = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    upgrade = b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    upgrade += b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
    length = f"Content-Length: {len(_GOOD)}\r\n\r\n".encode()
    return [
        Attempt("HTTP/1.0", _whole(b"GET /health HTTP/1.0\r\n\r\n"), (200,)),
        Attempt("a hundred at once", _whole(get * 100), (200,)),
        Attempt("generate at once", _whole((_HEAD + length + _GOOD) * 5), (200,)),
        Attempt("websocket", _whole(b"GET /generate HTTP/1.1\r\nHost: x\r\n" + upgrade + b"\r\n")),
        Attempt(
            "unknown upgrade", _whole(b"GET /health HTTP/1.1\r\nUpgrade: h2c\r\nConnection: Upgrade\r\n\r\n"), (200,)
        ),
        Attempt("OPTIONS *", _whole(b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n")),
        Attempt("CONNECT", _whole(b"CONNECT example:80 HTTP/1.1\r\nHost: x\r\n\r\n")),
        Attempt("HEAD", _whole(b"HEAD /health HTTP/1.1\r\nHost: x\r\n\r\n")),
        Attempt("absolute address", _whole(b"GET http://elsewhere/health HTTP/1.1\r\nHost: x\r\n\r\n")),
    ]


async def _try(port: int, attempt: Attempt) -> Ended:
    loop = asyncio.get_running_loop()
    start = loop.time()
    reader, writer = await asyncio.open_connection(HOST, port)
    reading = asyncio.create_task(_read(reader))
    sending = asyncio.create_task(_send(writer, attempt))
    try:
        await asyncio.wait({reading}, timeout=PATIENCE_S)
    finally:
        reading.cancel()
        sending.cancel()
        await asyncio.gather(reading, sending, return_exceptions=True)
        writer.close()
    content = b"" if reading.cancelled() else reading.result()
    return Ended(attempt, _status(content), content, loop.time() - start)


async def _send(writer: asyncio.StreamWriter, attempt: Attempt) -> None:
    try:
        async for piece in attempt.pieces():
            writer.write(piece)
            await writer.drain()
    except ConnectionError:
        return  # the answer came first


async def _read(reader: asyncio.StreamReader) -> bytes:
    """What comes until the connection is closed, or nothing more comes after an answer."""
    content = b""
    try:
        while True:
            is_answered = _status(content) >= 200
            piece = await asyncio.wait_for(reader.read(1 << 16), _QUIET_S if is_answered else None)
            if not piece:
                return content
            content += piece
    except (ConnectionError, TimeoutError):
        return content


def _status(content: bytes) -> int:
    words = content.split(b" ", 2)
    return int(words[1]) if content.startswith(b"HTTP/") and len(words) > 1 and words[1].isdigit() else 0
