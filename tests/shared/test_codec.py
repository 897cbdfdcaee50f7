"""Bytes of updates: whole round trips, and every kind of lie a sender could tell."""

import contextlib
import math

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashrl_wire import codec, delta
from flashrl_wire.codec import Encoded
from flashrl_wire.delta import Change
from flashrl_wire.errors import BadUpdateError
from flashrl_wire.layout import PartDtype, PartSpec
from flashrl_wire.messages import Chunk, Segment

SIZES = {"int8": 1, "fp8": 1, "bf16": 2, "fp32": 4}
NUMEL = 300_000  # gaps beyond 16 bits fit in
PARTS: dict[str, PartSpec] = {name: PartSpec(name, name, (NUMEL,)) for name in codec.TORCH_DTYPE}


def values_of(dtype: PartDtype, count: int, seed: int) -> Tensor:
    """Random bits: NaNs, negative zeros and subnormals among them."""
    raw = torch.randint(
        0, 256, (count * SIZES[dtype],), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    return raw.view(codec.TORCH_DTYPE[dtype])


def raw_of(encoded: Encoded) -> codec.Bytes:
    blocks = [codec.decompress(*pair) for pair in zip(encoded.chunks, encoded.payloads, strict=True)]
    return np.frombuffer(b"".join(blocks), dtype=np.uint8)


def decoded(encoded: Encoded) -> list[Change]:
    codec.check_segments(encoded.segments, PARTS)
    return list(codec.decode(encoded.segments, raw_of(encoded), PARTS))


def same(left: Change, right: Change) -> bool:
    indices = (left.indices is None) == (right.indices is None)
    if left.indices is not None and right.indices is not None:
        indices = torch.equal(left.indices, right.indices)
    return (
        indices
        and left.part == right.part
        and left.start == right.start
        and delta.equal_bits(left.values, right.values)
    )


@st.composite
def changes(draw: st.DrawFn) -> Change:
    dtype: PartDtype = draw(st.sampled_from(["int8", "fp8", "bf16", "fp32"]))
    seed = draw(st.integers(0, 2**31))
    if draw(st.booleans()):
        count = draw(st.integers(1, 2000))
        return Change(dtype, values_of(dtype, count, seed), start=draw(st.integers(0, NUMEL - count)))
    near = st.integers(0, 300)
    indices = sorted(draw(st.sets(st.one_of(near, st.integers(0, NUMEL - 1)), min_size=1, max_size=60)))
    return Change(dtype, values_of(dtype, len(indices), seed), torch.tensor(indices))


@given(updates=st.lists(changes(), max_size=5), block_bytes=st.sampled_from([1, 7, 256, 1 << 20]))
@settings(deadline=None, max_examples=80)
def test_round_trip(updates: list[Change], block_bytes: int) -> None:
    if block_bytes < 256:
        updates = updates[:1]
    encoded = codec.encode(updates, block_bytes)
    found = decoded(encoded)
    assert len(found) == len(updates)
    assert all(same(left, right) for left, right in zip(updates, found, strict=True))
    assert all(chunk.raw_bytes <= block_bytes for chunk in encoded.chunks)
    assert sum(chunk.raw_bytes for chunk in encoded.chunks) == sum(map(codec.segment_bytes, encoded.segments))
    assert [chunk.wire_bytes for chunk in encoded.chunks] == [len(payload) for payload in encoded.payloads]


@pytest.mark.parametrize("gap", [0, 1, 65533, 65534, 65535, 65536, 200_000])
def test_gaps_around_the_escape(gap: int) -> None:
    change = Change("bf16", values_of("bf16", 2, 0), torch.tensor([3, 4 + gap]))
    encoded = codec.encode([change])
    assert encoded.segments[0].wide == (gap >= 65535)
    assert same(decoded(encoded)[0], change)


def test_first_and_last_element() -> None:
    change = Change("fp32", values_of("fp32", 2, 1), torch.tensor([0, NUMEL - 1]))
    assert same(decoded(codec.encode([change]))[0], change)


def test_awkward_values_keep_their_bits() -> None:
    values = torch.tensor([math.nan, -0.0, 0.0, math.inf, 1e-40, -1e-40], dtype=torch.bfloat16)
    (found,) = decoded(codec.encode([Change("bf16", values, start=5)]))
    assert found.values.view(torch.int16).tolist() == values.view(torch.int16).tolist()


def test_nothing_is_encoded_as_nothing() -> None:
    encoded = codec.encode([])
    assert (encoded.segments, encoded.chunks, encoded.payloads, decoded(encoded)) == ([], [], [], [])


def test_shard_without_elements_leaves_no_trace() -> None:
    there = Change("bf16", values_of("bf16", 2, 0), start=5)
    encoded = codec.encode([delta.snapshot("bf16", values_of("bf16", 0, 0), 5), there])
    assert [same(found, there) for found in decoded(encoded)] == [True]


def test_threads_change_neither_bytes_nor_order(monkeypatch: pytest.MonkeyPatch) -> None:
    def encoded(threads: int) -> codec.Encoded:
        monkeypatch.setattr(codec, "_num_threads", lambda: threads)
        return codec.encode([Change("int8", values_of("int8", NUMEL, seed)) for seed in range(3)], 5000)

    alone = encoded(1)
    assert len(alone.payloads) > 100
    assert all(encoded(threads) == alone for threads in (2, 7))


def test_sparse_changes_take_few_bytes() -> None:
    indices = torch.arange(0, NUMEL, 100)
    change = Change("int8", torch.ones(indices.numel(), dtype=torch.int8), indices)
    assert sum(map(len, codec.encode([change]).payloads)) < 0.1 * indices.numel()


def test_bytes_are_fixed() -> None:
    # the format is a contract between releases: gaps 4, 2 (little endian, low bytes first, high bytes after), values
    change = Change("bf16", torch.tensor([1.0, -2.0], dtype=torch.bfloat16), torch.tensor([4, 7]))
    assert raw_of(codec.encode([change])).tobytes() == bytes([4, 2, 0, 0, 0x80, 0x00, 0x3F, 0xC0])
    wide = Change("int8", torch.tensor([5], dtype=torch.int8), torch.tensor([70_000]))
    assert raw_of(codec.encode([wide])).tobytes() == b"\xff\xff" + (70_000).to_bytes(8, "little") + b"\x05"


def chunk_of(payload: bytes, raw_bytes: int) -> Chunk:
    return Chunk(raw_bytes=raw_bytes, wire_bytes=len(payload), hash=codec.chunk_hash(payload))


GOOD = zstandard.compress(b"x" * 1000)


@pytest.mark.parametrize(
    ("chunk", "payload", "message"),
    [
        (chunk_of(GOOD, 1000), GOOD[:-1], "chunk has"),
        (chunk_of(GOOD, 1000), GOOD + b"x", "chunk has"),
        (chunk_of(GOOD, 1000), GOOD[:-1] + b"\x01", "hash differs"),
        (chunk_of(GOOD, 999), GOOD, "unpack to 1000 bytes, declared 999"),
        (chunk_of(GOOD, 1001), GOOD, "unpack to 1000 bytes, declared 1001"),
        (chunk_of(b"junk", 4), b"junk", "unpack"),
        (chunk_of(b"x", 1), b"", "chunk has 0 bytes"),
    ],
)
def test_chunk_that_is_not_what_it_says(chunk: Chunk, payload: bytes, message: str) -> None:
    with pytest.raises(BadUpdateError, match=message):
        codec.decompress(chunk, payload)


def test_bomb_is_refused_by_its_own_claim() -> None:
    bomb = zstandard.compress(bytes(1 << 30), 19)
    assert len(bomb) < 1 << 20
    with pytest.raises(BadUpdateError, match="would unpack to 1073741824 bytes"):
        codec.decompress(chunk_of(bomb, 1 << 20), bomb)


def test_bomb_that_claims_no_size_is_refused() -> None:
    bomb = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1 << 22))
    with pytest.raises(BadUpdateError, match="unpack"):
        codec.decompress(chunk_of(bomb, 1 << 10), bomb)


def test_frame_that_lies_about_its_size_is_refused() -> None:
    honest = zstandard.compress(bytes(100_000))
    # magic (4), frame header (1): single segment with a 4-byte content size at offset 5
    assert zstandard.frame_content_size(honest) == 100_000
    lying = honest[:5] + (1000).to_bytes(4, "little") + honest[9:]
    assert zstandard.frame_content_size(lying) == 1000
    with pytest.raises(BadUpdateError, match="unpack"):
        codec.decompress(chunk_of(lying, 1000), lying)


@given(data=st.binary(max_size=200), raw_bytes=st.integers(1, 1 << 20))
@settings(deadline=None)
def test_any_bytes_are_refused_or_unpack_to_their_size(data: bytes, raw_bytes: int) -> None:
    if not data:
        return
    with contextlib.suppress(BadUpdateError):
        assert len(codec.decompress(chunk_of(data, raw_bytes), data)) == raw_bytes


def segment(**fields: object) -> Segment:
    return Segment.model_validate({"part": "bf16", "dtype": "bf16", "encoding": "sparse", "count": 3} | fields)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (segment(part="other"), "other: no such part"),
        (segment(dtype="fp32"), "stored as bf16"),
        (segment(count=NUMEL + 1), "it has 300000"),
        (segment(encoding="dense", start=NUMEL - 2), "3 values from 299998"),
        (segment(wide=4), "4 wide gaps for 3 values"),
        (segment(encoding="dense", wide=1), "wide gaps"),
        (segment(start=1), "starts at 0"),
    ],
)
def test_segments_that_cannot_be(wrong: Segment, message: str) -> None:
    with pytest.raises(BadUpdateError, match=message):
        codec.check_segments([wrong], PARTS)


def stream(narrow: list[int], wide: list[int], count: int) -> codec.Bytes:
    low, high = bytes(gap & 255 for gap in narrow), bytes(gap >> 8 for gap in narrow)
    far = b"".join(gap.to_bytes(8, "little", signed=True) for gap in wide)
    return np.frombuffer(low + high + far + bytes(2 * count), dtype=np.uint8)


SMALL = {"bf16": PartSpec("bf16", "bf16", (10,))}


@pytest.mark.parametrize(
    ("narrow", "wide", "message"),
    [
        ([0, 9], [], "index 10 out of range"),
        ([0, 65534], [], "out of range"),
        ([0, 65535], [], "wide gaps are inconsistent"),
        ([0, 1], [65535], "wide gaps are inconsistent"),
        ([0, 65535], [3], "wide gaps are inconsistent"),
        ([0, 65535], [-1], "wide gaps are inconsistent"),
        ([0, 65535], [2**62], "wide gaps are inconsistent"),
        ([65535, 65535], [2**63 - 1, 2**63 - 1], "wide gaps are inconsistent"),
    ],
)
def test_indices_out_of_range_are_never_decoded(narrow: list[int], wide: list[int], message: str) -> None:
    lying = segment(count=2, wide=len(wide))
    with pytest.raises(BadUpdateError, match=message):
        list(codec.decode([lying], stream(narrow, wide, 2), SMALL))


def test_sums_of_wide_gaps_do_not_wrap() -> None:
    part = {"bf16": PartSpec("bf16", "bf16", (2**40,))}
    gaps = [2**40 - 1] * 50
    with pytest.raises(BadUpdateError, match="out of range"):
        list(codec.decode([segment(count=50, wide=50)], stream([65535] * 50, gaps, 50), part))


@pytest.mark.parametrize("extra", [-1, 1])
def test_stream_of_another_length_is_refused(extra: int) -> None:
    encoded = codec.encode([Change("bf16", values_of("bf16", 9, 0), start=0)])
    raw = np.resize(raw_of(encoded), raw_of(encoded).size + extra)
    with pytest.raises(BadUpdateError, match=f"need 18 raw bytes, the chunks hold {18 + extra}"):
        list(codec.decode(encoded.segments, raw, PARTS))


@given(raw=st.binary(min_size=22, max_size=22))
@settings(deadline=None)
def test_any_stream_decodes_in_range_or_is_refused(raw: bytes) -> None:
    try:
        (change,) = codec.decode(
            [segment(count=3, wide=1, dtype="bf16")], np.frombuffer(raw[:20], dtype=np.uint8), SMALL
        )
    except BadUpdateError:
        return
    assert change.indices is not None
    assert 0 <= int(change.indices.min()) <= int(change.indices.max()) < 10
