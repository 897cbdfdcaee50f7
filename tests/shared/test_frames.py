"""ZeroMQ headers: what was packed comes back, anything else is a MalformedError."""

import contextlib
import tracemalloc

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashrl_wire import frames
from flashrl_wire.errors import MalformedError
from flashrl_wire.frames import ChunkFrame, Credit, Failed, Frame, Hello, Resend, Staged

TEXT = st.text(max_size=50)
NUMBER = st.integers(-(2**63), 2**64 - 1)
FRAMES = st.one_of(
    st.builds(Hello, TEXT),
    st.builds(ChunkFrame, TEXT, NUMBER),
    st.builds(Credit, TEXT, NUMBER, NUMBER),
    st.builds(Resend, TEXT, NUMBER, TEXT),
    st.builds(Staged, TEXT),
    st.builds(Failed, TEXT, TEXT, TEXT),
)


@given(frame=FRAMES)
def test_round_trip(frame: Frame) -> None:
    assert frames.unpack(frames.pack(frame)) == frame
    assert frames.unpack(memoryview(frames.pack(frame))) == frame


@given(data=st.binary(max_size=300))
def test_any_bytes_are_a_frame_or_malformed(data: bytes) -> None:
    with contextlib.suppress(MalformedError):
        assert isinstance(frames.unpack(data), Frame)


@pytest.mark.parametrize(
    "record",
    [
        None,
        5,
        [],
        {},
        {"type": "hello"},
        {"type": "bye", "transfer_id": "x"},
        {"type": ["hello"], "transfer_id": "x"},
        {"type": "hello", "transfer_id": 5},
        {"type": "hello", "transfer_id": b"x"},
        {"type": "hello", "transfer_id": "x", "more": 1},
        {"type": "chunk", "transfer_id": "x", "index": "0"},
        {"type": "chunk", "transfer_id": "x", "index": True},
        {"type": "chunk", "transfer_id": "x", "index": 1.0},
        {"type": "chunk", "transfer_id": "x", "index": None},
        {1: 2},
    ],
)
def test_wrong_records_are_malformed(record: object) -> None:
    with pytest.raises(MalformedError):
        frames.unpack(msgpack.packb(record))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"\x91" * 4000,
        frames.pack(Hello("x")) + b"x",
        frames.pack(Hello("x"))[:-1],
        b"\xdf\xff\xff\xff\xff",
        b"\xc7\xff\x01",
        b"\xd9\x04\xff\xff\xff\xff",
    ],
)
def test_bytes_that_are_no_msgpack_are_malformed(data: bytes) -> None:
    with pytest.raises(MalformedError):
        frames.unpack(data)


def test_long_headers_are_not_even_parsed() -> None:
    with pytest.raises(MalformedError, match=r"5\d{3} bytes, at most 4096"):
        frames.unpack(frames.pack(Hello("x" * 5000)))


def test_headers_that_claim_to_hold_much_cost_little() -> None:
    """A thousand arrays in each other, of 3,840 items each as they say, would be 31 MB of empty room."""
    header = b"\xdc\x0f\x00" * 1360
    tracemalloc.start()
    try:
        with pytest.raises(MalformedError, match="not msgpack"):
            frames.unpack(header)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()
