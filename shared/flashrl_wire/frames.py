"""The ZeroMQ frame: a small msgpack header and, for chunks, a payload part.

    trainer -> service   Hello, ChunkFrame (+ payload)
    service -> trainer   Credit, Resend, Staged, Failed

Knows nothing of sockets; a malformed frame is a MalformedError, never anything else.
"""

from dataclasses import asdict, dataclass, fields

import msgpack

from flashrl_wire.errors import MalformedError

MAX_HEADER_BYTES = 4096
MAX_FRAME_BYTES = (4 << 20) + (64 << 10)
"""ZeroMQ's MAXMSGSIZE on both sides: a block that zstd could not shrink, and its overhead."""
# room is made for what a container claims to hold: nested ones could claim megabytes in a few thousand bytes
_LIMITS = {"max_map_len": 8, "max_array_len": 0, "max_bin_len": 0, "max_ext_len": 0}


@dataclass(frozen=True)
class Hello:
    """First frame of a connection, and the heartbeat of a waiting one."""

    transfer_id: str


@dataclass(frozen=True)
class ChunkFrame:
    """Chunk `index` of the manifest; its wire bytes follow in the second part."""

    transfer_id: str
    index: int


@dataclass(frozen=True)
class Credit:
    """The trainer may send `num_bytes` more; chunk `index` has arrived and was verified (-1: none, at the start)."""

    transfer_id: str
    num_bytes: int
    index: int


@dataclass(frozen=True)
class Resend:
    """Chunk `index` arrived damaged; its bytes are the trainer's to spend again."""

    transfer_id: str
    index: int
    reason: str


@dataclass(frozen=True)
class Staged:
    """Every chunk is verified and decoded; commit may follow."""

    transfer_id: str


@dataclass(frozen=True)
class Failed:
    """The transfer is over and nothing changed: `code` is one of `errors.ERRORS`."""

    transfer_id: str
    code: str
    message: str


Frame = Hello | ChunkFrame | Credit | Resend | Staged | Failed
_TYPES: dict[str, type[Frame]] = {
    "hello": Hello,
    "chunk": ChunkFrame,
    "credit": Credit,
    "resend": Resend,
    "staged": Staged,
    "failed": Failed,
}
_NAMES = {kind: name for name, kind in _TYPES.items()}


def pack(frame: Frame) -> bytes:
    """The header bytes of a frame."""
    return bytes(msgpack.packb({"type": _NAMES[type(frame)], **asdict(frame)}))


def unpack(header: bytes | memoryview) -> Frame:
    """The frame of header bytes; MalformedError for anything that `pack` would not have written."""
    if len(header) > MAX_HEADER_BYTES:
        raise MalformedError(f"frame header has {len(header)} bytes, at most {MAX_HEADER_BYTES}")
    try:
        record = msgpack.unpackb(header, strict_map_key=True, **_LIMITS)
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise MalformedError(f"frame header is not msgpack: {error}") from error
    kind = _TYPES.get(str(record.pop("type", ""))) if isinstance(record, dict) else None
    if kind is None:
        raise MalformedError("frame header has no known type")
    expected = {field.name: field.type for field in fields(kind)}
    if record.keys() != expected.keys() or any(type(v) is not expected[k] for k, v in record.items()):
        raise MalformedError(f"frame {_NAMES[kind]} has wrong fields")
    return kind(**record)
