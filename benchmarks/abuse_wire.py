"""Bytes on a weights port that no trainer sends: other protocols, random and oversize frames, hundreds of connections.

Knows sockets and frames; knows nothing of what a service should make of them, but that it goes on.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable

import msgpack
import zmq
import zmq.asyncio

from flashrl_wire import frames
from flashrl_wire.frames import ChunkFrame, Hello

HOST = "127.0.0.1"
NUM_CONNECTIONS = 300
_GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(48)
_MIB = 1 << 20


async def abuse(port: int, seed: int) -> int:
    """Do all of it; the number of messages and connections that were tried."""
    draw = random.Random(seed)
    attempts: list[Callable[[int, random.Random], Awaitable[int]]] = [
        _foreign_protocols, _random_frames, _frames_like_ours, _too_large, _other_sockets, _crowd,
    ]  # fmt: skip
    return sum([await attempt(port, draw) for attempt in attempts])


async def _foreign_protocols(port: int, draw: random.Random) -> int:
    """Raw TCP: HTTP, noise, half a greeting and a greeting followed by noise."""
    contents = [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", draw.randbytes(1000), _GREETING[:20], _GREETING + draw.randbytes(1000),
        _GREETING + b"\x04\xff\xff\xff\xff\xff\xff\xff\xff", b"", b"\x00" * 100_000, _GREETING * 50,
    ]  # fmt: skip
    writers = []
    for content in contents * 3:
        _, writer = await asyncio.open_connection(HOST, port)
        writer.write(content)
        writers.append(writer)
    await asyncio.sleep(0.5)
    for writer in writers:
        writer.close()
    return len(writers)


async def _random_frames(port: int, draw: random.Random) -> int:
    """Messages of one to six parts of anything."""
    messages = [
        [draw.randbytes(draw.choice([0, 1, 10, 5000])) for _ in range(draw.randrange(1, 7))] for _ in range(500)
    ]
    return await _send(port, zmq.DEALER, messages)


async def _frames_like_ours(port: int, draw: random.Random) -> int:
    """Msgpack maps with types, fields and values that are nearly right."""
    values = [0, -1, 1 << 63, "", "x" * 3000, None, [], {}, b"bytes", 1.5, True, "\U0001f600"]
    kinds = ["hello", "chunk", "credit", "resend", "staged", "failed", "stop", 7, None]
    messages = []
    for _ in range(500):
        record = {"type": draw.choice(kinds)}
        for name in draw.sample(["transfer_id", "index", "num_bytes", "reason", "code", "message"], draw.randrange(4)):
            record[name] = draw.choice(values)
        messages.append([msgpack.packb(record), *[draw.randbytes(10)] * draw.randrange(2)])
    messages += [[frames.pack(Hello(name))] for name in ("", "x" * 2000, "\n", "'; --")]
    messages += [[frames.pack(ChunkFrame("0" * 32, index)), b"payload"] for index in (0, -1, 1 << 62)]
    return await _send(port, zmq.DEALER, messages)


async def _too_large(port: int, draw: random.Random) -> int:
    """Frames at and beyond the limit, for a transfer that is not there."""
    total = 0
    for size in (4 * _MIB, frames.MAX_FRAME_BYTES + 1, 64 * _MIB):
        total += await _send(port, zmq.DEALER, [[frames.pack(ChunkFrame("none", 0)), bytes(size)]] * 3)
    return total


async def _other_sockets(port: int, draw: random.Random) -> int:
    """Kinds of sockets that do not go with the service's."""
    kinds = (zmq.REQ, zmq.SUB, zmq.PUSH, zmq.PAIR, zmq.ROUTER, zmq.XPUB)
    return sum([await _send(port, kind, [[b"x"]], may_block=True) for kind in kinds])


async def _crowd(port: int, draw: random.Random) -> int:
    """Hundreds of connections that ask and never read, dropped all at once."""
    context = zmq.asyncio.Context()
    context.set(zmq.MAX_SOCKETS, NUM_CONNECTIONS + 16)
    for number in range(NUM_CONNECTIONS):
        socket = context.socket(zmq.DEALER)
        socket.connect(f"tcp://{HOST}:{port}")
        for _ in range(5):
            await socket.send(frames.pack(Hello(f"nobody's {number}")))
    await asyncio.sleep(1.0)
    context.destroy(linger=0)
    return NUM_CONNECTIONS


async def _send(port: int, kind: int, messages: list[list[bytes]], may_block: bool = False) -> int:
    context = zmq.asyncio.Context()
    socket = context.socket(kind)
    socket.connect(f"tcp://{HOST}:{port}")
    for parts in messages:
        try:
            await asyncio.wait_for(socket.send_multipart(parts), 0.2 if may_block else 5.0)
        except (TimeoutError, zmq.ZMQError):
            if not may_block:
                raise
    await asyncio.sleep(0.3)
    context.destroy(linger=0)
    return len(messages)
