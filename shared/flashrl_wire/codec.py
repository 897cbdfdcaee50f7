"""Changes <-> bytes: gap coding, byte planes, zstd, bounds.

A raw stream is the concatenation of its segments (`messages.Segment`), cut into blocks that are compressed one by
one, so that nothing larger than a block is ever decompressed at once. Knows nothing of sockets or engines.
"""

import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
import xxhash
import zstandard
from numpy.typing import NDArray
from torch import Tensor

from flashrl_wire.delta import Change
from flashrl_wire.digest import bits
from flashrl_wire.errors import BadUpdateError
from flashrl_wire.layout import ITEM_BYTES, PartDtype, PartSpec
from flashrl_wire.messages import Chunk, Segment

TORCH_DTYPE: dict[PartDtype, torch.dtype] = {
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
}
PART_DTYPE = {dtype: name for name, dtype in TORCH_DTYPE.items()}
MAX_BLOCK_BYTES = 4 << 20
_ESCAPE = 0xFFFF  # this gap stands in the wide array instead
_GAP_BYTES, _WIDE_BYTES = 2, 8
_MOST_THREADS = 8
_BLOCKS_WORTH_THREADS = 8

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Encoded:
    """Segments and the compressed chunks that hold them, in order."""

    segments: list[Segment]
    chunks: list[Chunk]
    payloads: list[bytes]
    changed_elements: int


def encode(changes: Iterable[Change], block_bytes: int = 2 << 20) -> Encoded:
    """Encode CPU changes into blocks of at most `block_bytes` raw bytes; one of no elements leaves no trace."""
    segments: list[Segment] = []
    chunks: list[Chunk] = []
    payloads: list[bytes] = []
    changed = 0
    raw: list[Bytes] = []
    for change in changes:
        if not change.values.numel():  # the snapshot of a rank that has no rows of a part
            continue
        segment, planes = _encode_segment(change)
        segments.append(segment)
        raw.extend(planes)
        changed += change.changed
    is_large = sum(array.nbytes for array in raw) >= _BLOCKS_WORTH_THREADS * block_bytes
    for raw_bytes, payload in _compressed(_blocks(raw, block_bytes), _num_threads() if is_large else 1):
        payloads.append(payload)
        chunks.append(Chunk(raw_bytes=raw_bytes, wire_bytes=len(payload), hash=chunk_hash(payload)))
    return Encoded(segments, chunks, payloads, changed)


def _compressed(blocks: Iterator[bytes], threads: int) -> Iterator[tuple[int, bytes]]:
    """Length and frame of each block, in order; few blocks more than threads exist at a time."""
    if threads == 1:
        yield from map(_frame, blocks)
        return
    with ThreadPoolExecutor(threads, thread_name_prefix="flashrl-encode") as pool:
        waiting: deque[Future[tuple[int, bytes]]] = deque()
        for block in blocks:
            waiting.append(pool.submit(_frame, block))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        for frame in waiting:
            yield frame.result()


def _frame(block: bytes) -> tuple[int, bytes]:
    return len(block), zstandard.ZstdCompressor(level=1).compress(block)


def _num_threads() -> int:
    return min(_MOST_THREADS, len(os.sched_getaffinity(0)))


def _encode_segment(change: Change) -> tuple[Segment, list[Bytes]]:
    patterns = bits(change.values.contiguous()).numpy()
    dtype, count = PART_DTYPE[change.values.dtype], patterns.size
    if change.indices is None:
        segment = Segment(part=change.part, dtype=dtype, encoding="dense", start=change.start, count=count)
        return segment, [_planes(patterns)]
    narrow, wide = _gaps(change.indices.numpy())
    segment = Segment(part=change.part, dtype=dtype, encoding="sparse", count=count, wide=wide.size)
    return segment, [_planes(narrow), wide.view(np.uint8), _planes(patterns)]


def _gaps(indices: NDArray[np.int64]) -> tuple[NDArray[np.uint16], NDArray[np.int64]]:
    """Distances to the element behind the previous index, narrow where they fit 16 bits."""
    gaps = np.diff(indices, prepend=-1) - 1
    is_wide = gaps >= _ESCAPE
    return np.where(is_wide, _ESCAPE, gaps).astype("<u2"), gaps[is_wide].astype("<i8")


def _planes(values: NDArray[np.generic]) -> Bytes:
    """All first bytes, then all second bytes, …: zstd finds far more in them than in interleaved values."""
    return np.ascontiguousarray(values.view(np.uint8).reshape(values.size, -1).T).reshape(-1)


def _blocks(arrays: Sequence[Bytes], block_bytes: int) -> Iterator[bytes]:
    """Cut a sequence of byte arrays into blocks without joining it whole."""
    pending: list[Bytes] = []
    room = block_bytes
    for array in arrays:
        while array.size >= room:
            yield b"".join([*(piece.data for piece in pending), array[:room].data])
            pending, array, room = [], array[room:], block_bytes
        if array.size:
            pending.append(array)
            room -= array.size
    if pending:
        yield b"".join(piece.data for piece in pending)


def chunk_hash(payload: bytes | memoryview) -> str:
    """xxh3_64 of a chunk's wire bytes, hex."""
    return xxhash.xxh3_64_hexdigest(payload)


def decompress(chunk: Chunk, payload: bytes | memoryview) -> bytes:
    """The raw block of a chunk; BadUpdateError unless size, hash and declared raw size all agree."""
    if len(payload) != chunk.wire_bytes:
        raise BadUpdateError(f"chunk has {len(payload)} bytes, declared {chunk.wire_bytes}")
    if chunk_hash(payload) != chunk.hash:
        raise BadUpdateError("chunk hash differs")
    try:
        frame_bytes = zstandard.frame_content_size(payload)
        if frame_bytes != chunk.raw_bytes:  # the frame's own claim bounds what is allocated
            raise BadUpdateError(f"chunk would unpack to {frame_bytes} bytes, declared {chunk.raw_bytes}")
        raw = zstandard.ZstdDecompressor().decompress(payload, max_output_size=chunk.raw_bytes)
    except zstandard.ZstdError as error:
        raise BadUpdateError(f"chunk does not unpack: {error}") from error
    return raw


def segment_bytes(segment: Segment) -> int:
    """Raw bytes of a segment."""
    values = segment.count * ITEM_BYTES[segment.dtype]
    if segment.encoding == "dense":
        return values
    return segment.count * _GAP_BYTES + segment.wide * _WIDE_BYTES + values


def check_segments(segments: Sequence[Segment], parts: Mapping[str, PartSpec]) -> None:
    """BadUpdateError unless every segment names a known part, fits it, and declares possible counts."""
    for segment in segments:
        part = parts.get(segment.part)
        if part is None:
            raise BadUpdateError(f"{segment.part}: no such part")
        if part.dtype != segment.dtype:
            raise BadUpdateError(f"{segment.part}: stored as {part.dtype}, the update has {segment.dtype}")
        if segment.start + segment.count > part.numel:
            raise BadUpdateError(f"{segment.part}: {segment.count} values from {segment.start}, it has {part.numel}")
        if segment.wide > segment.count or (segment.encoding == "dense" and segment.wide):
            raise BadUpdateError(f"{segment.part}: {segment.wide} wide gaps for {segment.count} values")
        if segment.encoding == "sparse" and segment.start:
            raise BadUpdateError(f"{segment.part}: a sparse segment starts at 0, not {segment.start}")


def decode(segments: Sequence[Segment], raw: Bytes, parts: Mapping[str, PartSpec]) -> Iterator[Change]:
    """The changes in a raw stream whose segments `check_segments` accepted.

    Raises BadUpdateError for a stream of another length, an index beyond its part and inconsistent gaps.
    """
    needed = sum(map(segment_bytes, segments))
    if needed != raw.size:
        raise BadUpdateError(f"segments need {needed} raw bytes, the chunks hold {raw.size}")
    offset = 0
    for segment in segments:
        end = offset + segment_bytes(segment)
        yield _decode_segment(segment, raw[offset:end], parts[segment.part].numel)
        offset = end


def _decode_segment(segment: Segment, raw: Bytes, numel: int) -> Change:
    item = ITEM_BYTES[segment.dtype]
    values = _unplane(raw[raw.size - segment.count * item :], item)
    tensor = torch.from_numpy(values).view(TORCH_DTYPE[segment.dtype])
    if segment.encoding == "dense":
        return Change(segment.part, tensor, start=segment.start)
    narrow = _unplane(raw[: segment.count * _GAP_BYTES], _GAP_BYTES).view("<u2")
    wide_end = segment.count * _GAP_BYTES + segment.wide * _WIDE_BYTES
    wide = raw[segment.count * _GAP_BYTES : wide_end].copy().view("<i8")
    return Change(segment.part, tensor, _indices(segment, narrow, wide, numel))


def _indices(segment: Segment, narrow: NDArray[np.uint16], wide: NDArray[np.int64], numel: int) -> Tensor:
    is_wide = narrow == _ESCAPE
    if int(is_wide.sum()) != wide.size or bool(((wide < _ESCAPE) | (wide >= numel)).any()):
        raise BadUpdateError(f"{segment.part}: wide gaps are inconsistent")
    gaps = narrow.astype(np.int64)
    gaps[is_wide] = wide
    indices = np.cumsum(gaps + 1) - 1
    # every gap is below numel and count is too, so the sum cannot wrap before it passes numel
    if bool((indices >= numel).any()) or bool((indices < 0).any()):
        raise BadUpdateError(f"{segment.part}: index {int(indices.max())} out of range, it has {numel} elements")
    return torch.from_numpy(indices)


def _unplane(raw: Bytes, item: int) -> Bytes:
    return np.array(raw.reshape(item, -1).T, order="C").reshape(-1)  # a copy: torch wants memory it may write
