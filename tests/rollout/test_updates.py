"""Updates over real sockets: what arrives whole is served, and whatever else arrives changes nothing."""

import asyncio
import gc
from pathlib import Path

import pytest
import torch
from tests.helpers.rig import LAYOUT, Rig, running
from tests.helpers.wire_trainer import Wire, update_of

from flashrl_rollout import stored_state
from flashrl_rollout.transfer import Transfer
from flashrl_wire.codec import chunk_hash
from flashrl_wire.delta import Change
from flashrl_wire.frames import ChunkFrame, Credit, Failed, Hello, Resend, Staged

pytestmark = pytest.mark.anyio


def equal(left: stored_state.Parts, right: stored_state.Parts) -> bool:
    return stored_state.digests(left) == stored_state.digests(right)


async def test_delta_becomes_the_served_version(rig: Rig) -> None:
    new = rig.few_changes()
    before = await rig.sample()
    reply = await rig.trainer.publish(rig.delta(new))
    digest = stored_state.combined(LAYOUT, stored_state.digests(new))
    assert reply.status_code == 200
    assert (reply.json()["version"], reply.json()["digest"], reply.json()["changed_elements"]) == (1, digest, 5)
    assert equal(rig.engine.parts, new)
    info = await rig.weights()
    assert (info["version"], info["digest"], info["run_id"]) == (1, digest, "run-a")
    assert await rig.sample() != before
    assert rig.staged_files() == []


async def test_snapshot_replaces_everything_and_may_jump(rig: Rig) -> None:
    new = rig.state(1)
    update = rig.snapshot(new).declaring(version=40, base_version=17, base_digest="0" * 32)
    reply = await rig.trainer.publish(update)
    assert reply.json()["version"] == 40
    assert equal(rig.engine.parts, new)


async def test_many_versions_in_a_row_with_audits(tmp_path: Path) -> None:
    async with running(tmp_path, audit_every=2) as rig:
        for version in range(1, 7):
            new = rig.current()
            new["norm.weight"][version] += 1.0
            assert (await rig.trainer.publish(rig.delta(new))).json()["version"] == version
        metrics = (await rig.http.get("/metrics")).text
        assert 'flashrl_updates_total{result="committed"} 6.0' in metrics
        assert (await rig.http.get("/ready")).status_code == 200


async def test_empty_delta_moves_the_version_only(rig: Rig) -> None:
    before = await rig.weights()
    reply = await rig.trainer.publish(rig.delta(rig.current()))
    assert (reply.json()["version"], reply.json()["wire_bytes"]) == (1, 0)
    assert reply.json()["digest"] == before["digest"]


async def test_commit_is_answered_the_same_when_repeated(rig: Rig) -> None:
    transfer_id = await rig.trainer.staged(rig.delta())
    first, second = await asyncio.gather(rig.trainer.commit(transfer_id), rig.trainer.commit(transfer_id))
    third = await rig.trainer.commit(transfer_id)
    assert first.json() == second.json() == third.json()
    assert rig.version == 1


async def test_abort_can_be_repeated_and_changes_nothing(rig: Rig) -> None:
    before = await rig.weights()
    transfer_id = await rig.trainer.staged(rig.delta())
    assert len(rig.staged_files()) == 1
    assert [(await rig.trainer.abort(transfer_id)).status_code for _ in range(2)] == [200, 200]
    assert rig.staged_files() == []
    assert 'flashrl_updates_total{result="aborted"} 1.0' in (await rig.http.get("/metrics")).text
    reply = await rig.trainer.commit(transfer_id)
    assert (reply.status_code, reply.json()["error"]["code"]) == (404, "unknown_transfer")
    assert await rig.weights() == before | {"run_id": "run-a"}


async def test_abort_of_unknown_and_committed_transfers(rig: Rig) -> None:
    transfer_id = await rig.trainer.staged(rig.delta())
    await rig.trainer.commit(transfer_id)
    for unknown in ("0" * 32, transfer_id):
        assert (await rig.trainer.abort(unknown)).status_code == 404
    assert rig.version == 1


async def test_commit_before_all_chunks_names_how_many_are_missing(rig: Rig) -> None:
    update = rig.snapshot(rig.state(1))
    transfer_id = await rig.trainer.accepted(update)
    await rig.trainer.wire.push(transfer_id, update.payloads, [0])
    assert await rig.trainer.wire.receive() == Credit(transfer_id, len(update.payloads[0]), 0)
    reply = await rig.trainer.commit(transfer_id)
    assert (reply.status_code, reply.json()["error"]["code"]) == (409, "not_staged")
    assert reply.json()["error"]["missing_chunks"] == len(update.payloads) - 1


async def test_wrong_base_is_named_with_what_the_service_has(rig: Rig) -> None:
    update = rig.delta()
    digest = (await rig.weights())["digest"]
    for wrong in ({"base_digest": "1" * 32}, {"base_version": 5, "version": 6}):
        error = (await rig.trainer.begin(update.declaring(**wrong))).json()["error"]
        assert (error["code"], error["version"], error["digest"]) == ("stale_base", 0, digest)


async def test_replayed_delta_is_stale(rig: Rig) -> None:
    update = rig.delta()
    await rig.trainer.publish(update)
    assert (await rig.trainer.begin(update)).json()["error"]["code"] == "stale_base"


async def test_second_transfer_waits_for_the_first(rig: Rig) -> None:
    update = rig.delta()
    transfer_id = await rig.trainer.accepted(update)
    reply = await rig.trainer.begin(update)
    assert (reply.status_code, reply.json()["error"]["code"]) == (409, "update_in_progress")
    assert reply.json()["error"]["transfer_id"] == transfer_id
    await rig.trainer.abort(transfer_id)
    assert (await rig.trainer.publish(update)).status_code == 200


async def test_another_run_waits_until_the_first_is_released(rig: Rig) -> None:
    await rig.trainer.publish(rig.delta())
    update = rig.delta(rig.state(3)).declaring(run_id="run-b")
    reply = await rig.trainer.begin(update)
    assert (reply.status_code, reply.json()["error"]["run_id"]) == (409, "run-a")
    for _ in range(2):
        assert (await rig.http.delete("/runs/run-a")).json() == {"run_id": None}
    assert (await rig.trainer.publish(update)).status_code == 200


async def test_flipped_bit_is_asked_for_again(rig: Rig) -> None:
    update = rig.snapshot(rig.state(1))
    transfer_id = await rig.trainer.accepted(update)
    damaged = bytes([update.payloads[1][0] ^ 4]) + update.payloads[1][1:]
    await rig.trainer.wire.push(transfer_id, [update.payloads[0], damaged])
    assert isinstance(await rig.trainer.wire.receive(), Credit)
    assert await rig.trainer.wire.receive() == Resend(transfer_id, 1, "chunk hash differs")
    await rig.trainer.wire.push(transfer_id, update.payloads, range(1, len(update.payloads)))
    assert isinstance(await rig.trainer.wire.receive_last(transfer_id), Staged)
    assert (await rig.trainer.commit(transfer_id)).status_code == 200


async def test_chunk_that_stays_damaged_ends_the_transfer(rig: Rig) -> None:
    update = rig.snapshot(rig.state(1))
    transfer_id = await rig.trainer.accepted(update)
    for _ in range(4):
        await rig.trainer.wire.send(ChunkFrame(transfer_id, 0), update.payloads[0][:-1])
    outcome = await rig.trainer.wire.receive_last(transfer_id)
    assert isinstance(outcome, Failed)
    assert (outcome.code, "4 times" in outcome.message) == ("bad_update", True)
    assert rig.version == 0


async def test_repeated_and_reordered_chunks_do_no_harm(rig: Rig) -> None:
    new = rig.state(1)
    update = rig.snapshot(new)
    transfer_id = await rig.trainer.accepted(update)
    order = [i for i in reversed(range(len(update.payloads))) for _ in range(2)]
    await rig.trainer.wire.push(transfer_id, update.payloads, order)
    assert isinstance(await rig.trainer.wire.receive_last(transfer_id), Staged)
    await rig.trainer.commit(transfer_id)
    assert equal(rig.engine.parts, new)


async def test_reconnected_trainer_learns_what_is_there(rig: Rig) -> None:
    update = rig.snapshot(rig.state(1))
    transfer_id = await rig.trainer.accepted(update)
    await rig.trainer.wire.push(transfer_id, update.payloads, [2, 0])
    for _ in range(2):
        await rig.trainer.wire.receive()
    again = Wire(rig.port)
    await again.send(Hello(transfer_id))
    found = [await again.receive() for _ in range(3)]
    assert found == [Credit(transfer_id, 16 << 20, -1), Credit(transfer_id, 0, 0), Credit(transfer_id, 0, 2)]
    await again.push(transfer_id, update.payloads, [i for i in range(len(update.payloads)) if i not in (0, 2)])
    assert isinstance(await again.receive_last(transfer_id), Staged)
    again.close()


async def test_hello_is_answered_after_the_end_too(rig: Rig) -> None:
    transfer_id = await rig.trainer.staged(rig.delta())
    again = Wire(rig.port)
    await again.send(Hello(transfer_id))
    assert await again.receive() == Staged(transfer_id)
    await rig.trainer.abort(transfer_id)
    await again.send(Hello(transfer_id))
    assert isinstance(await again.receive_last(transfer_id), Failed)
    again.close()


async def test_chunk_that_was_never_declared_ends_the_transfer(rig: Rig) -> None:
    update = rig.delta()
    transfer_id = await rig.trainer.accepted(update)
    await rig.trainer.wire.send(ChunkFrame(transfer_id, len(update.payloads)), b"x")
    outcome = await rig.trainer.wire.receive_last(transfer_id)
    assert isinstance(outcome, Failed)
    assert outcome.code == "bad_update"


async def test_index_out_of_range_is_refused_and_never_written(rig: Rig) -> None:
    before = rig.current()
    beyond = Change("norm.weight", torch.ones(2, dtype=torch.bfloat16), torch.tensor([5, 100]))
    outcome = await rig.trainer.failed(update_of([beyond], rig.delta()))
    assert (outcome.code, "norm.weight: index 100" in outcome.message) == ("bad_update", True)
    assert equal(rig.engine.parts, before)
    assert rig.staged_files() == []


async def test_failed_transfers_hold_no_memory(rig: Rig) -> None:
    beyond = Change("norm.weight", torch.ones(2, dtype=torch.bfloat16), torch.tensor([5, 100]))
    for _ in range(5):
        await rig.trainer.failed(update_of([beyond], rig.delta()))
    gc.collect()
    assert [found.id for found in gc.get_objects() if type(found) is Transfer] == []  # nor their buffers


async def test_bomb_is_refused_before_it_unpacks(rig: Rig) -> None:
    zeros = Change("down.weight", torch.zeros(2048, dtype=torch.int8), start=0)
    honest = update_of([zeros], rig.delta(), block_bytes=4096)
    small = honest.manifest.chunks[0].model_copy(update={"raw_bytes": 8})
    segment = honest.manifest.segments[0].model_copy(update={"count": 8})
    outcome = await rig.trainer.failed(honest.declaring(chunks=[small], segments=[segment]))
    assert "unpack to 2048 bytes, declared 8" in outcome.message


async def test_chunk_that_is_no_zstd_ends_the_transfer(rig: Rig) -> None:
    update, junk = rig.delta(), b"no zstd frame at all"
    chunk = update.manifest.chunks[0].model_copy(update={"wire_bytes": len(junk), "hash": chunk_hash(junk)})
    transfer_id = await rig.trainer.accepted(update.declaring(chunks=[chunk, *update.manifest.chunks[1:]]))
    await rig.trainer.wire.send(ChunkFrame(transfer_id, 0), junk)
    assert isinstance(await rig.trainer.wire.receive_last(transfer_id), Failed)


async def test_transfer_that_does_not_get_on_is_dropped(tmp_path: Path) -> None:
    async with running(tmp_path, transfer_deadline_s=1.0) as rig:
        transfer_id = await rig.trainer.accepted(rig.snapshot(rig.state(1)))
        await rig.trainer.wire.send(Hello(transfer_id))
        assert isinstance(await rig.trainer.wire.receive(), Credit)
        outcome = await rig.trainer.wire.receive_last(transfer_id)
        assert isinstance(outcome, Failed)
        assert (outcome.code, "for 1 s" in outcome.message) == ("unknown_transfer", True)
        assert (await rig.trainer.publish(rig.delta())).status_code == 200


async def test_staged_transfer_is_dropped_too_if_nobody_commits(tmp_path: Path) -> None:
    async with running(tmp_path, transfer_deadline_s=1.0) as rig:
        transfer_id = await rig.trainer.staged(rig.delta())
        assert isinstance(await rig.trainer.wire.receive_last(transfer_id), Failed)
        assert (await rig.trainer.commit(transfer_id)).status_code == 404
        assert rig.staged_files() == []


async def test_garbage_is_counted_and_dropped(rig: Rig) -> None:
    for parts in ([b""], [b"\xc1"], [b"\x93" * 100], [b"x" * 5000], [b"\x80", b"", b"", b""], [b"\x80", b"payload"]):
        await rig.trainer.wire.send_parts(*parts)
    await rig.trainer.wire.send(Staged("not for a service"))
    await rig.trainer.wire.send(Hello("nobody's"))
    assert await rig.trainer.wire.receive() == Failed("nobody's", "unknown_transfer", "no such transfer")
    assert rig.parts.receiver.malformed_frames == 7
    assert (await rig.trainer.publish(rig.delta())).status_code == 200


async def test_oversize_frame_costs_the_connection_only(rig: Rig) -> None:
    stranger = Wire(rig.port)
    await stranger.send(ChunkFrame("x", 0), bytes(5 << 20))
    with pytest.raises(TimeoutError):
        await stranger.receive(0.3)
    stranger.close()
    assert (await rig.trainer.publish(rig.delta())).status_code == 200


async def test_large_delta_of_every_kind_of_value(rig: Rig) -> None:
    new = rig.current()
    norm = new["norm.weight"]
    norm[:5] = torch.tensor([float("nan"), -0.0, float("inf"), 1e-40, 0.0], dtype=torch.bfloat16)
    new["down.weight"].neg_()
    assert (await rig.trainer.publish(rig.delta(new))).status_code == 200
    assert equal(rig.engine.parts, new)
