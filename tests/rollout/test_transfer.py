"""The chunk state machine, frame by frame, without sockets."""

import mmap

import numpy as np
import pytest
import torch
from tests.helpers.rig import LAYOUT
from tests.helpers.wire_trainer import Update, snapshot_update

from flashrl_rollout import stored_state
from flashrl_rollout.transfer import RawBuffer, Transfer
from flashrl_wire import codec
from flashrl_wire.frames import ChunkFrame, Credit, Failed, Frame, Hello, Resend, Staged

CREDIT = 1000


@pytest.fixture
def update() -> Update:
    parts = stored_state.random_parts(LAYOUT, 0)
    return snapshot_update(LAYOUT, parts, parts, block_bytes=1000)


@pytest.fixture
def transfer(update: Update) -> Transfer:
    return Transfer("t", update.manifest, CREDIT)


def send(transfer: Transfer, update: Update, index: int, peer: bytes = b"a") -> list[Frame]:
    return transfer.handle(ChunkFrame("t", index), memoryview(update.payloads[index]), peer)


def test_all_chunks_in_any_order_make_the_raw_stream(transfer: Transfer, update: Update) -> None:
    for index in reversed(range(len(update.payloads))):
        assert not transfer.is_complete
        assert send(transfer, update, index) == [Credit("t", len(update.payloads[index]), index)]
    assert transfer.is_complete
    chunks = zip(update.manifest.chunks, update.payloads, strict=True)
    assert transfer.buffer.bytes.tobytes() == b"".join(codec.decompress(*pair) for pair in chunks)


def test_first_hello_of_a_connection_gets_the_window_once(transfer: Transfer) -> None:
    assert transfer.handle(Hello("t"), None, b"a") == [Credit("t", CREDIT, -1)]
    assert transfer.handle(Hello("t"), None, b"a") == [Credit("t", 0, -1)]
    assert transfer.handle(Hello("t"), None, b"b") == [Credit("t", CREDIT, -1)]


def test_new_connection_hears_of_every_present_chunk(transfer: Transfer, update: Update) -> None:
    send(transfer, update, 1)
    send(transfer, update, 0)
    replies = transfer.handle(Hello("t"), None, b"b")
    assert replies == [Credit("t", CREDIT, -1), Credit("t", 0, 0), Credit("t", 0, 1)]


def test_hello_alone_does_not_keep_a_transfer_alive(transfer: Transfer, update: Update) -> None:
    transfer.handle(Hello("t"), None, b"a")
    before = transfer.touched
    transfer.handle(Hello("t"), None, b"a")
    assert transfer.touched == before
    send(transfer, update, 0)
    assert transfer.touched > before


def test_damage_is_asked_for_again_three_times(transfer: Transfer, update: Update) -> None:
    damaged = memoryview(update.payloads[0][:-1] + bytes([update.payloads[0][-1] ^ 1]))
    for _ in range(3):
        (reply,) = transfer.handle(ChunkFrame("t", 0), damaged, b"a")
        assert isinstance(reply, Resend)
    (reply,) = transfer.handle(ChunkFrame("t", 0), damaged, b"a")
    assert isinstance(reply, Failed)
    assert send(transfer, update, 1) == [reply]
    assert transfer.handle(Hello("t"), None, b"b") == [reply]


@pytest.mark.parametrize("index", [-1, 10_000, 2**63])
def test_undeclared_index_fails(transfer: Transfer, index: int) -> None:
    (reply,) = transfer.handle(ChunkFrame("t", index), memoryview(b"x"), b"a")
    assert isinstance(reply, Failed)
    assert (reply.code, transfer.missing_chunks > 0) == ("bad_update", True)


def test_what_arrives_in_all_is_bounded(transfer: Transfer, update: Update) -> None:
    budget = 3 * update.manifest.wire_bytes + CREDIT
    size = len(update.payloads[0])
    for _ in range(budget // size):
        assert send(transfer, update, 0) == [Credit("t", size, 0)]
    (reply,) = send(transfer, update, 0)
    assert isinstance(reply, Failed)
    assert reply.code == "too_large"


def test_staged_is_said_to_every_hello(transfer: Transfer, update: Update) -> None:
    for index in range(len(update.payloads)):
        send(transfer, update, index)
    transfer.outcome = Staged("t")
    assert transfer.handle(Hello("t"), None, b"b") == [Staged("t")]
    assert send(transfer, update, 0) == [Credit("t", len(update.payloads[0]), 0)]


def test_released_pages_are_gone_and_later_ones_stay() -> None:
    buffer = RawBuffer(4 * mmap.PAGESIZE)
    buffer.bytes[:] = 1
    buffer.release(2 * mmap.PAGESIZE + 5)
    buffer.release(mmap.PAGESIZE)
    assert np.flatnonzero(buffer.bytes)[0] == 2 * mmap.PAGESIZE
    assert int(buffer.bytes.sum()) == 2 * mmap.PAGESIZE


def test_empty_buffer_has_no_bytes() -> None:
    buffer = RawBuffer(0)
    buffer.release(0)
    assert buffer.bytes.size == 0
    assert torch.from_numpy(buffer.bytes).numel() == 0
