"""What a stranger's bytes reach first, as functions of bytes: they refuse, or what they accept is within its limits.

Knows the wire and the service's checks; knows nothing of how the bytes are found (`fuzz_wire`).
"""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
import torch
import zstandard
from pydantic import TypeAdapter, ValidationError

from flashrl_rollout import stored_state
from flashrl_rollout.manifest_checks import Base, check_manifest
from flashrl_rollout.transfer import MAX_REPEATS, Transfer
from flashrl_wire import codec, delta, frames
from flashrl_wire.errors import WireError
from flashrl_wire.frames import ChunkFrame, Credit, Failed, Hello
from flashrl_wire.layout import PartDtype, TensorSpec, WeightLayout
from flashrl_wire.messages import Chunk, LoadCheckpoint, LoadWeights, Manifest, Segment

LAYOUT = WeightLayout.of(
    [
        TensorSpec(name="a.weight", shape=(64, 32), storage="int8_rows"),
        TensorSpec(name="b.weight", shape=(16, 8), storage="fp8_rows"),
        TensorSpec(name="n.weight", shape=(100_000,), storage="bf16"),
    ]
)
PARTS = {part.name: part for part in LAYOUT.parts()}
NAMES = [*PARTS, "no.weight"]
DTYPES: list[PartDtype] = ["int8", "fp8", "bf16", "fp32"]
MAX_UPDATE_BYTES = 1 << 20
CREDIT_BYTES = 4096
_REQUEST: TypeAdapter[Manifest | LoadCheckpoint] = TypeAdapter(LoadWeights)


class Draw(Protocol):
    """`atheris.FuzzedDataProvider`, as far as it is used: numbers and bytes off the front and back of the input."""

    def ConsumeIntInRange(self, low: int, high: int) -> int: ...  # noqa: N802
    def ConsumeBytes(self, count: int) -> bytes: ...  # noqa: N802
    def ConsumeBool(self) -> bool: ...  # noqa: N802
    def remaining_bytes(self) -> int: ...


def base() -> Base:
    """What the service serves in all of this."""
    return Base(3, "0" * 32, LAYOUT.hash, PARTS, poisoned=False)


def frame(data: bytes) -> None:
    """A ZeroMQ header: what is accepted packs to something that is read as the same."""
    with contextlib.suppress(WireError):
        found = frames.unpack(data)
        assert frames.unpack(frames.pack(found)) == found


def manifest(data: bytes) -> None:
    """A body of POST /load_weights: what is accepted needs no more memory than it may."""
    try:
        request = _REQUEST.validate_json(data)
    except ValidationError:
        return
    if isinstance(request, Manifest):
        with contextlib.suppress(WireError):
            check_manifest(request, base(), MAX_UPDATE_BYTES)
            assert request.raw_bytes <= MAX_UPDATE_BYTES
            assert all(chunk.raw_bytes <= codec.MAX_BLOCK_BYTES for chunk in request.chunks)
            assert sum(map(codec.segment_bytes, request.segments)) == request.raw_bytes


def chunk(draw: Draw) -> None:
    """A compressed block with the right hash and any declared size: refused, or exactly of that size."""
    is_honest, raw_bytes = draw.ConsumeBool(), draw.ConsumeIntInRange(1, MAX_UPDATE_BYTES)
    payload = draw.ConsumeBytes(draw.remaining_bytes())
    if is_honest:
        raw_bytes = min(_claim(payload), codec.MAX_BLOCK_BYTES)  # the manifest's checks let no more through
    if payload and raw_bytes:
        with contextlib.suppress(WireError):
            assert len(codec.decompress(_chunk(payload, raw_bytes), payload)) == raw_bytes


def _claim(payload: bytes) -> int:
    """The size that a zstd frame says it has; 0 where it says none."""
    try:
        return max(0, zstandard.frame_content_size(payload))
    except zstandard.ZstdError:
        return 0


def stream(draw: Draw) -> None:
    """Segments and a raw stream: refused, or changes that can be written where they say."""
    segments = [_segment(draw) for _ in range(draw.ConsumeIntInRange(0, 6))]
    raw = np.frombuffer(draw.ConsumeBytes(draw.remaining_bytes()), dtype=np.uint8)
    with contextlib.suppress(WireError):
        codec.check_segments(segments, PARTS)
        # `check_manifest` has compared the two before any byte arrives
        if sum(map(codec.segment_bytes, segments)) > MAX_UPDATE_BYTES:
            return
        for change in codec.decode(segments, raw, PARTS):
            _written(change)


def _written(change: delta.Change) -> None:
    part = PARTS[change.part]
    flat = torch.zeros(part.numel, dtype=codec.TORCH_DTYPE[part.dtype])
    delta.write(change, flat)
    if change.indices is not None:
        steps = change.indices.diff()
        assert not steps.numel() or int(steps.min()) > 0, "indices ascend"
        assert delta.equal_bits(delta.read(change, flat), change.values)


def transfer(draw: Draw) -> None:
    """Frames of a transfer in any order, whole and broken: what is complete is what was sent, and it ends."""
    encoded, sent = _small_update()
    under_test = Transfer("t", sent, CREDIT_BYTES)
    received = 0
    while draw.remaining_bytes() and not isinstance(under_test.outcome, Failed):
        received += _frame(draw, under_test, encoded)
    assert received <= MAX_REPEATS * sent.wire_bytes + CREDIT_BYTES + codec.MAX_BLOCK_BYTES
    if under_test.is_complete:
        blocks = (codec.decompress(*pair) for pair in zip(encoded.chunks, encoded.payloads, strict=True))
        assert under_test.buffer.bytes.tobytes() == b"".join(blocks)


@functools.cache
def _small_update() -> tuple[codec.Encoded, Manifest]:
    parts = stored_state.random_parts(LAYOUT, 0)
    changes = [delta.snapshot(name, values) for name, values in parts.items() if values.numel() < 1000]
    encoded = codec.encode(changes, block_bytes=100)
    return encoded, _manifest(encoded)


def _frame(draw: Draw, under_test: Transfer, encoded: codec.Encoded) -> int:
    """One frame from one of two connections; its payload's bytes."""
    peer = b"a" if draw.ConsumeBool() else b"b"
    if draw.ConsumeIntInRange(0, 5) == 0:
        replies = under_test.handle(Hello("t"), None, peer)
        assert sum(reply.num_bytes for reply in replies if isinstance(reply, Credit)) <= CREDIT_BYTES
        return 0
    index = draw.ConsumeIntInRange(-1, len(encoded.payloads))
    payload = bytearray(encoded.payloads[index % len(encoded.payloads)])
    if draw.ConsumeBool():
        payload[draw.ConsumeIntInRange(0, len(payload) - 1)] ^= draw.ConsumeIntInRange(0, 255)
        payload = payload[: draw.ConsumeIntInRange(0, len(payload))]
    under_test.handle(ChunkFrame("t", index), memoryview(bytes(payload)), peer)
    return len(payload)


def _segment(draw: Draw) -> Segment:
    name = NAMES[draw.ConsumeIntInRange(0, len(NAMES) - 1)]
    own = PARTS[name].dtype if name in PARTS else "int8"
    dtype = own if draw.ConsumeIntInRange(0, 7) else DTYPES[draw.ConsumeIntInRange(0, 3)]
    is_dense = draw.ConsumeBool()
    large = draw.ConsumeIntInRange(0, 7) == 0
    most = (1 << 63) - 1 if large else 300
    return Segment(
        part=name,
        dtype=dtype,
        encoding="dense" if is_dense else "sparse",
        start=draw.ConsumeIntInRange(0, most) if is_dense or large else 0,
        count=draw.ConsumeIntInRange(1, most),
        wide=0 if is_dense and not large else draw.ConsumeIntInRange(0, most),
    )


def _chunk(payload: bytes, raw_bytes: int) -> Chunk:
    return Chunk(raw_bytes=raw_bytes, wire_bytes=len(payload), hash=codec.chunk_hash(payload))


def _manifest(encoded: codec.Encoded) -> Manifest:
    return Manifest(
        kind="delta",
        run_id="run-a",
        base_version=3,
        base_digest="0" * 32,
        version=4,
        digest="1" * 32,
        layout_hash=LAYOUT.hash,
        changed_elements=encoded.changed_elements,
        segments=encoded.segments,
        chunks=encoded.chunks,
    )


def seeds() -> Iterator[tuple[str, bytes]]:
    """Good inputs of each target, to begin from."""
    parts = stored_state.random_parts(LAYOUT, 0)
    whole = codec.encode([delta.snapshot(name, values) for name, values in parts.items()], 1 << 18)
    norm = parts["n.weight"]
    far = delta.Change("n.weight", norm[:3], torch.tensor([0, 5, 99_999]), changed=3)
    few = codec.encode([far, delta.Change("a.weight", parts["a.weight"].view(-1)[:9], start=2)], 1 << 18)
    for name in ("hello", "chunk", "credit", "resend", "staged", "failed"):
        yield "frame", frames.pack(_EXAMPLES[name])
    for encoded in (whole, few):
        yield "manifest", _manifest(encoded).model_dump_json().encode()
        yield "manifest", _manifest(encoded).model_copy(update={"kind": "snapshot"}).model_dump_json().encode()
        raw = b"".join(itertools.starmap(codec.decompress, zip(encoded.chunks, encoded.payloads, strict=True)))
        yield "stream", raw[:4096]
    blocks = codec.encode([delta.snapshot(name, values) for name, values in parts.items()], 3000).payloads
    blocks += [zstandard.compress(bytes(size)) for size in (1, 1 << 20, 4 << 20, 5 << 20)]
    for payload in blocks[-40:]:
        yield "chunk", b"\x01" + payload + b"\xff" * 3  # a flag, and a number that stands at the end
    yield "manifest", LoadCheckpoint(kind="checkpoint", path="/models/a", version=4).model_dump_json().encode()
    yield "transfer", bytes(range(256))


_EXAMPLES: dict[str, frames.Frame] = {
    "hello": Hello("0" * 32),
    "chunk": ChunkFrame("0" * 32, 7),
    "credit": Credit("0" * 32, 1 << 24, -1),
    "resend": frames.Resend("0" * 32, 3, "chunk hash differs"),
    "staged": frames.Staged("0" * 32),
    "failed": Failed("0" * 32, "bad_update", "chunk 3"),
}
BYTES: dict[str, Callable[[bytes], None]] = {"frame": frame, "manifest": manifest}
DRAWS: dict[str, Callable[[Draw], None]] = {"chunk": chunk, "stream": stream, "transfer": transfer}
