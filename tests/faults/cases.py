"""What can be wrong with an update on its way, one function a fault: each says whether the new version is out.

Knows the wire, frame by frame; that what is served is whole afterwards is for `test_bad_updates` to check.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import torch
import zstandard
from tests.faults.served import LAYOUT, Stored
from tests.helpers.wire_trainer import Update, Wire, WireTrainer, update_of

from flashrl_wire.codec import chunk_hash
from flashrl_wire.delta import Change
from flashrl_wire.frames import ChunkFrame, Credit, Failed, Frame, Hello, Resend, Staged


@dataclass(frozen=True)
class Case:
    """A service that serves `old`, its trainer, and the `update` of several chunks that leads to `new`."""

    trainer: WireTrainer
    port: int
    old: Stored
    new: Stored
    update: Update

    @property
    def wire(self) -> Wire:
        """The trainer's connection."""
        return self.trainer.wire

    async def begun(self, update: Update | None = None) -> str:
        """The id of the accepted transfer, and a connection with credit."""
        transfer_id = await self.trainer.accepted(update or self.update)
        await self.wire.send(Hello(transfer_id))
        await self.until(Credit)
        return transfer_id

    async def until(self, kind: type[Frame]) -> Frame:
        """The next frame of a kind."""
        while not isinstance(frame := await self.wire.receive(), kind):
            pass
        return frame

    async def failed(self, transfer_id: str, code: str, words: str) -> bool:
        """Never out: the service has ended the transfer for that reason."""
        outcome = await self.wire.receive_last(transfer_id)
        assert isinstance(outcome, Failed), outcome
        assert (outcome.code, words in outcome.message) == (code, True), outcome
        reply = await self.trainer.commit(transfer_id)  # may overtake the end: then it is not staged
        assert reply.json()["error"]["code"] in (code, "not_staged")
        return False

    async def refused(self, update: Update, code: str, *words: str) -> bool:
        """Never out: begin says so."""
        error = (await self.trainer.begin(update)).json()["error"]
        assert (error["code"], [word in error["message"] for word in words]) == (code, [True] * len(words)), error
        return False

    async def finished(self, transfer_id: str) -> bool:
        """Out: it is staged and commits."""
        outcome = await self.wire.receive_last(transfer_id)
        assert isinstance(outcome, Staged), outcome
        reply = await self.trainer.commit(transfer_id)
        assert reply.status_code == 200, reply.text
        return True


async def lost_chunk(case: Case) -> bool:
    """Everything but one chunk arrives; the trainer gives up."""
    transfer_id = await case.begun()
    await case.wire.push(transfer_id, case.update.payloads, range(1, len(case.update.payloads)))
    for _ in case.update.payloads[1:]:
        await case.until(Credit)
    error = (await case.trainer.commit(transfer_id)).json()["error"]
    assert (error["code"], error["missing_chunks"]) == ("not_staged", 1)
    assert (await case.trainer.abort(transfer_id)).status_code == 200
    return False


async def lost_connection(case: Case) -> bool:
    """The second one hears what the first has brought, and sends the rest."""
    transfer_id = await case.begun()
    await case.wire.push(transfer_id, case.update.payloads, [1])
    await case.until(Credit)
    again = Wire(case.port)
    await again.send(Hello(transfer_id))
    window, there = await again.receive(), await again.receive()
    assert isinstance(window, Credit)
    assert (window.num_bytes > 0, there) == (True, Credit(transfer_id, 0, 1))
    await again.push(transfer_id, case.update.payloads, [i for i in range(len(case.update.payloads)) if i != 1])
    assert isinstance(await again.receive_last(transfer_id), Staged)
    again.close()
    return (await case.trainer.commit(transfer_id)).status_code == 200


async def repeated_and_reordered_chunks(case: Case) -> bool:
    """Every one twice, the last first."""
    transfer_id = await case.begun()
    order = [i for i in reversed(range(len(case.update.payloads))) for _ in range(2)]
    await case.wire.push(transfer_id, case.update.payloads, order)
    return await case.finished(transfer_id)


async def endless_bytes(case: Case) -> bool:
    """The service takes three times what was declared, and its window, and no more."""
    transfer_id = await case.begun()
    for index in (0, 0, 0, 1, 1, 1):
        await case.wire.send(ChunkFrame(transfer_id, index), bytes(4 << 20))
    return await case.failed(transfer_id, "too_large", "more than")


async def truncated_chunk(case: Case) -> bool:
    """It is asked for again, and comes whole."""
    return await _damaged_once(case, case.update.payloads[1][:-1], "chunk has")


async def flipped_bit(case: Case) -> bool:
    """The same."""
    return await _damaged_once(case, _flipped(case.update.payloads[1]), "chunk hash differs")


async def _damaged_once(case: Case, damaged: bytes, words: str) -> bool:
    transfer_id = await case.begun()
    await case.wire.send(ChunkFrame(transfer_id, 1), damaged)
    asked = await case.until(Resend)
    assert isinstance(asked, Resend)
    assert (asked.index, words in asked.reason) == (1, True)
    await case.wire.push(transfer_id, case.update.payloads)
    return await case.finished(transfer_id)


async def always_truncated_chunk(case: Case) -> bool:
    """After the fourth time it is over."""
    return await _always_damaged(case, case.update.payloads[0][:-1])


async def always_flipped_bit(case: Case) -> bool:
    """The same."""
    return await _always_damaged(case, _flipped(case.update.payloads[0]))


async def _always_damaged(case: Case, damaged: bytes) -> bool:
    transfer_id = await case.begun()
    for _ in range(4):
        await case.wire.send(ChunkFrame(transfer_id, 0), damaged)
    return await case.failed(transfer_id, "bad_update", "damaged 4 times")


def _flipped(payload: bytes) -> bytes:
    return payload[:-1] + bytes([payload[-1] ^ 16])


async def oversize_chunk(case: Case) -> bool:
    """More than a message may have: the connection is cut, and the transfer goes on over another one."""
    transfer_id = await case.begun()
    stranger = Wire(case.port)
    await stranger.send(ChunkFrame(transfer_id, 0), bytes(5 << 20))
    await case.wire.push(transfer_id, case.update.payloads)
    stranger.close()
    return await case.finished(transfer_id)


async def undeclared_chunk(case: Case) -> bool:
    """An index beyond the manifest's."""
    transfer_id = await case.begun()
    await case.wire.send(ChunkFrame(transfer_id, len(case.update.payloads)), b"x")
    return await case.failed(transfer_id, "bad_update", f"chunk {len(case.update.payloads)} of")


async def chunk_of_another_transfer(case: Case) -> bool:
    """Is told so, and nothing else happens."""
    transfer_id = await case.begun()
    await case.wire.send(ChunkFrame("0" * 32, 0), case.update.payloads[0])
    assert await case.wire.receive_last("0" * 32) == Failed("0" * 32, "unknown_transfer", "no such transfer")
    await case.wire.push(transfer_id, case.update.payloads)
    return await case.finished(transfer_id)


async def wrong_base_digest(case: Case) -> bool:
    """A delta from other weights under the same number."""
    return await case.refused(case.update.declaring(base_digest="1" * 32), "stale_base", case.old.digest, "1" * 32)


async def skipped_version(case: Case) -> bool:
    """The delta that leads on from one that never arrived."""
    later = case.new.moved()
    return await case.refused(case.new.delta_to(later), "stale_base", f"from version {case.new.version}")


async def replayed_version(case: Case) -> bool:
    """The same update once more: its base is gone."""
    assert (await case.trainer.publish(case.update)).status_code == 200
    await case.refused(case.update, "stale_base", f"the service has version {case.new.version}")
    return True


async def version_that_goes_back(case: Case) -> bool:
    """A delta to a number that is not above its base's."""
    return await case.refused(
        case.update.declaring(version=case.old.version), "invalid_field", "version: must be above"
    )


async def foreign_run(case: Case) -> bool:
    """The service follows one run at a time."""
    return await case.refused(case.update.declaring(run_id="run-b"), "update_in_progress", "follows run run-a")


async def second_transfer(case: Case) -> bool:
    """One at a time; the first goes on."""
    transfer_id = await case.begun()
    await case.refused(case.update, "update_in_progress", "another transfer")
    await case.wire.push(transfer_id, case.update.payloads)
    return await case.finished(transfer_id)


async def aborted_transfer(case: Case) -> bool:
    """Staged, dropped, and dropped again; a late commit finds nothing."""
    transfer_id = await case.trainer.staged(case.update)
    assert [(await case.trainer.abort(transfer_id)).status_code for _ in range(2)] == [200, 200]
    assert (await case.trainer.commit(transfer_id)).json()["error"]["code"] == "unknown_transfer"
    return False


async def repeated_commit(case: Case) -> bool:
    """Gets the first one's answer."""
    transfer_id = await case.trainer.staged(case.update)
    replies = [(await case.trainer.commit(transfer_id)).json() for _ in range(3)]
    assert replies[0] == replies[1] == replies[2]
    assert replies[0]["version"] == case.new.version
    return True


async def decompression_bomb(case: Case) -> bool:
    """A chunk that says outright that it is larger than declared."""
    return await _bomb(case, zstandard.compress(bytes(1 << 30)), "unpack to 1073741824 bytes, declared 2048")


async def bomb_without_a_size(case: Case) -> bool:
    """One that does not say how large it is."""
    payload = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(4 << 20))
    return await _bomb(case, payload, "unpack")


async def _bomb(case: Case, payload: bytes, words: str) -> bool:
    dense = update_of([Change("layers.0.up.weight", torch.zeros(2048, dtype=torch.int8))], case.update, 4096)
    chunk = dense.manifest.chunks[0].model_copy(update={"wire_bytes": len(payload), "hash": chunk_hash(payload)})
    transfer_id = await case.begun(dense.declaring(chunks=[chunk]))
    await case.wire.send(ChunkFrame(transfer_id, 0), payload)
    return await case.failed(transfer_id, "bad_update", words)


async def index_out_of_range(case: Case) -> bool:
    """In a stream that is intact otherwise: never written."""
    beyond = Change("norm.weight", torch.ones(2, dtype=torch.bfloat16), torch.tensor([5, 64]))
    update = update_of([beyond], case.update)
    transfer_id = await case.begun(update)
    await case.wire.push(transfer_id, update.payloads)
    return await case.failed(transfer_id, "bad_update", "norm.weight: index 64 out of range")


async def part_that_is_not_there(case: Case) -> bool:
    """A tied head by its second name, say."""
    head = Change("lm_head.weight", torch.ones(2, dtype=torch.bfloat16), torch.tensor([5, 6]))
    return await case.refused(update_of([head], case.update), "bad_update", "lm_head.weight: no such part")


async def other_layout(case: Case) -> bool:
    """A model of other names, shapes or storage."""
    return await case.refused(case.update.declaring(layout_hash="2" * 32), "bad_update", LAYOUT.hash, "2" * 32)


async def newer_codec(case: Case) -> bool:
    """Both versions are named."""
    return await case.refused(case.update.declaring(codec=2), "bad_update", "codec version is 1 here, 2 in the update")


async def newer_protocol(case: Case) -> bool:
    """Both versions are named."""
    newer = case.update.declaring(protocol=9)
    return await case.refused(newer, "bad_update", "protocol version is 1 here, 9 in the update")


async def too_large_update(case: Case) -> bool:
    """Chunks that would unpack to more than a block, before one of them is sent."""
    chunk = case.update.manifest.chunks[0].model_copy(update={"raw_bytes": (4 << 20) + 1})
    return await case.refused(
        case.update.declaring(chunks=[chunk]), "too_large", "raw bytes in a chunk, at most 4194304"
    )


async def wrong_digest(case: Case) -> bool:
    """Found after the write, which is undone."""
    reply = await case.trainer.publish(case.update.declaring(digest="f" * 32))
    assert (reply.status_code, reply.json()["error"]["code"]) == (422, "digest_mismatch")
    return False


async def garbage(case: Case) -> bool:
    """Frames that are none, in the middle of a transfer."""
    transfer_id = await case.begun()
    for parts in ([b""], [b"\xc1"], [b"\x93" * 100], [b"x" * 5000], [b"\x80", b"", b""], [b"\xdc\x0f\x00" * 1360]):
        await case.wire.send_parts(*parts)
    await case.wire.push(transfer_id, case.update.payloads)
    return await case.finished(transfer_id)


FAULTS: tuple[Callable[[Case], Awaitable[bool]], ...] = (
    lost_chunk, lost_connection, repeated_and_reordered_chunks, endless_bytes, truncated_chunk, flipped_bit,
    always_truncated_chunk, always_flipped_bit, oversize_chunk, undeclared_chunk, chunk_of_another_transfer,
    wrong_base_digest, skipped_version, replayed_version, version_that_goes_back, foreign_run, second_transfer,
    aborted_transfer, repeated_commit, decompression_bomb, bomb_without_a_size, index_out_of_range,
    part_that_is_not_there, other_layout, newer_codec, newer_protocol, too_large_update, wrong_digest, garbage,
)  # fmt: skip
