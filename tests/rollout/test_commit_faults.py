"""Commits in which the engine fails at every step: the old weights are served again, or nothing is."""

import asyncio
from pathlib import Path

import pytest
from tests.helpers.rig import Rig, running

from flashrl_rollout import stored_state
from flashrl_rollout.engine import EngineDeadError, EngineError
from flashrl_wire.digest import PartDigest
from flashrl_wire.frames import Staged

pytestmark = pytest.mark.anyio


def digests(rig: Rig) -> dict[str, object]:
    return dict(stored_state.digests(rig.engine.parts))


async def failing_commit(rig: Rig, fault: str, status: int, code: str) -> None:
    """A commit that fails leaves digest, version and samples; the next one, without the fault, works."""
    weights, sample = digests(rig), await rig.sample()
    setattr(rig.engine.faults, fault, True)
    reply = await rig.trainer.publish(rig.delta())
    assert (reply.status_code, reply.json()["error"]["code"]) == (status, code)
    assert (digests(rig), rig.version, await rig.sample()) == (weights, 0, sample)
    assert rig.staged_files() == []
    setattr(rig.engine.faults, fault, False)
    assert (await rig.trainer.publish(rig.delta())).status_code == 200


async def test_what_cannot_be_prepared_is_committed_all_the_same(rig: Rig) -> None:
    rig.engine.faults.fail_prepare = True
    assert (await rig.trainer.publish(rig.delta())).status_code == 200
    assert rig.version == 1


async def test_apply_fails(rig: Rig) -> None:
    await failing_commit(rig, "fail_apply", 500, "engine_failed")


async def test_written_element_reads_back_otherwise(rig: Rig) -> None:
    await failing_commit(rig, "corrupt_write", 422, "digest_mismatch")


async def test_adopt_fails(rig: Rig) -> None:
    await failing_commit(rig, "fail_adopt", 500, "engine_failed")


async def test_a_write_that_fails_beside_an_adopted_version_takes_it_back(rig: Rig) -> None:
    """The version's name goes out at the same time as the write, and so may be in place when the write fails."""
    rig.engine.faults.apply_delay_s, rig.engine.faults.fail_apply = 0.01, True
    assert (await rig.trainer.publish(rig.delta())).status_code == 500
    body = {"prompts": ["hi"], "sampling": {"max_tokens": 4}}
    (result,) = (await rig.http.post("/generate", json=body)).json()["results"]
    assert result["completions"][0]["weight_versions"] == [[0, 0, 4]]


async def test_old_values_are_dropped_once_requests_are_admitted(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    keep, admitted = rig.engine.keep, []

    async def watched() -> None:
        rig.parts.gate.check()
        admitted.append(await rig.sample(max_tokens=1))
        await keep()

    monkeypatch.setattr(rig.engine, "keep", watched)
    assert (await asyncio.wait_for(rig.trainer.publish(rig.delta()), 10)).status_code == 200
    assert len(admitted) == 1


async def test_old_values_that_are_still_held_are_dropped_before_the_next_write(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A commit that was written, and whose engine then did not go on, was not kept: the next one must not undo it."""
    resume = rig.engine.resume

    async def failing() -> None:
        monkeypatch.setattr(rig.engine, "resume", resume)
        raise EngineError("resume failed once")

    monkeypatch.setattr(rig.engine, "resume", failing)
    assert (await rig.trainer.publish(rig.delta())).status_code == 500
    assert rig.version == 1
    rig.engine.faults.fail_apply = True
    weights = digests(rig)
    assert (await rig.trainer.publish(rig.delta())).status_code == 500
    assert digests(rig) == weights
    rig.engine.faults.fail_apply = False
    assert (await rig.trainer.publish(rig.delta())).status_code == 200
    assert (rig.version, len(await rig.sample())) == (2, 8)


async def test_old_values_that_cannot_be_dropped_end_the_engine(rig: Rig) -> None:
    rig.engine.faults.fail_keep = True
    reply = await rig.trainer.publish(rig.delta())
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "not_ready")
    assert not rig.engine.is_alive


async def test_wrong_digest_is_found_after_writing_and_undone(rig: Rig) -> None:
    weights = digests(rig)
    update = rig.delta().declaring(digest="f" * 32)
    transfer_id = await rig.trainer.staged(update)
    for _ in range(2):  # a repeated commit gets the same answer
        reply = await rig.trainer.commit(transfer_id)
        assert (reply.status_code, reply.json()["error"]["code"]) == (422, "digest_mismatch")
    assert (digests(rig), rig.version) == (weights, 0)


async def poison(rig: Rig) -> None:
    rig.engine.faults.corrupt_write = rig.engine.faults.fail_revert = True
    reply = await rig.trainer.publish(rig.delta())
    assert (reply.status_code, reply.json()["error"]["poisoned"]) == (503, True)
    rig.engine.faults.corrupt_write = rig.engine.faults.fail_revert = False


async def test_poisoned_service_samples_nothing_and_takes_no_delta(rig: Rig) -> None:
    update = rig.delta()
    await poison(rig)
    generate = await rig.http.post("/generate", json={"prompts": ["hi"]})
    ready = await rig.http.get("/ready")
    for reply in (generate, ready):
        assert (reply.status_code, reply.json()["error"]["poisoned"]) == (503, True)
        assert int(reply.headers["retry-after"]) > 0
    assert (await rig.weights())["poisoned"] is True
    assert (await rig.trainer.begin(update)).json()["error"]["code"] == "stale_base"
    assert "flashrl_poisoned 1.0" in (await rig.http.get("/metrics")).text
    # /resume lifts a pause, not a doubt about the weights
    await rig.http.post("/resume")
    assert (await rig.http.get("/ready")).status_code == 503


async def test_snapshot_heals_a_poisoned_service(rig: Rig) -> None:
    await poison(rig)
    new = rig.state(5)
    assert (await rig.trainer.publish(rig.snapshot(new))).status_code == 200
    assert digests(rig) == stored_state.digests(new)
    assert (await rig.http.get("/ready")).json() == {"ready": True, "version": 1}
    assert len(await rig.sample()) > 0


async def test_snapshot_that_fails_leaves_it_poisoned(rig: Rig) -> None:
    await poison(rig)
    reply = await rig.trainer.publish(rig.snapshot(rig.state(5)).declaring(digest="0" * 32))
    assert reply.json()["error"]["code"] == "digest_mismatch"
    assert (await rig.http.get("/ready")).status_code == 503


async def test_running_requests_end_when_the_weights_are_poisoned(tmp_path: Path) -> None:
    async with running(tmp_path, token_s=0.02) as rig:
        body = {"prompts": ["hi"], "sampling": {"max_tokens": 100}}
        waiting = asyncio.create_task(rig.http.post("/generate", json=body))
        await rig.until(lambda: rig.engine.running_requests > 0)
        await poison(rig)
        reply = await waiting
        assert (reply.status_code, reply.json()["error"]["poisoned"]) == (503, True)
        assert rig.engine.cancelled_requests == 1


async def test_audit_finds_what_no_commit_wrote(tmp_path: Path) -> None:
    async with running(tmp_path, audit_every=1) as rig:
        rig.engine.faults.corrupt_untouched = True
        assert (await rig.trainer.publish(rig.delta())).status_code == 200  # its own elements are right
        await asyncio.wait_for(rig.parts.gate.fenced(), 10)
        assert (await rig.http.get("/ready")).json()["error"]["poisoned"] is True
        assert 'result="audit_failed"} 1.0' in (await rig.http.get("/metrics")).text


async def test_running_sequence_goes_on_under_the_new_weights(tmp_path: Path) -> None:
    async with running(tmp_path, token_s=0.005) as rig:
        body = {"prompts": ["hi"], "sampling": {"max_tokens": 100, "seed": 3, "temperature": 1.0}}
        waiting = asyncio.create_task(rig.http.post("/generate", json=body))
        await rig.until(lambda: rig.engine.running_requests > 0)
        assert (await rig.trainer.publish(rig.delta())).status_code == 200
        reply = (await waiting).json()
        completion = reply["results"][0]["completions"][0]
        (first, start, middle), (second, middle_again, end) = completion["weight_versions"]
        assert (first, second, start, end) == (0, 1, 0, len(completion["token_ids"]))
        assert 0 < middle == middle_again
        assert reply["weight_version"] == 0


async def test_drain_finishes_running_sequences_first(tmp_path: Path) -> None:
    async with running(tmp_path, token_s=0.002, commit_mode="drain") as rig:
        body = {"prompts": ["hi"], "sampling": {"max_tokens": 50, "seed": 3}}
        waiting = asyncio.create_task(rig.http.post("/generate", json=body))
        await rig.until(lambda: rig.engine.running_requests > 0)
        assert (await rig.trainer.publish(rig.delta())).status_code == 200
        completion = (await waiting).json()["results"][0]["completions"][0]
        assert completion["weight_versions"] == [[0, 0, len(completion["token_ids"])]]


async def test_drain_gives_up_at_its_deadline_and_may_be_tried_again(tmp_path: Path) -> None:
    async with running(tmp_path, token_s=0.01, commit_mode="drain", drain_deadline_s=0.05) as rig:
        body = {"prompts": ["hi"], "sampling": {"max_tokens": 100, "seed": 3}}
        waiting = asyncio.create_task(rig.http.post("/generate", json=body))
        await rig.until(lambda: rig.engine.running_requests > 0)
        transfer_id = await rig.trainer.staged(rig.delta())
        reply = await rig.trainer.commit(transfer_id)
        assert (reply.status_code, reply.json()["error"]["code"]) == (409, "drain_timeout")
        assert (await waiting).status_code == 200
        assert (await rig.trainer.commit(transfer_id)).json()["version"] == 1


async def test_commit_goes_on_when_its_client_leaves(rig: Rig) -> None:
    rig.engine.faults.apply_delay_s = 0.05
    transfer_id = await rig.trainer.staged(rig.delta())
    first = asyncio.create_task(rig.trainer.commit(transfer_id))
    await rig.until(lambda: rig.parts.gate.is_closed_by("commit"))
    first.cancel()
    abort = await rig.trainer.abort(transfer_id)
    assert (abort.status_code, abort.json()["error"]["code"]) == (409, "update_in_progress")
    assert (await rig.trainer.commit(transfer_id)).json()["version"] == 1


async def test_who_asks_during_a_write_hears_of_the_last_version_and_no_doubt(rig: Rig) -> None:
    rig.engine.faults.apply_delay_s = 0.3
    before = await rig.weights()
    transfer_id = await rig.trainer.staged(rig.delta())
    commit = asyncio.create_task(rig.trainer.commit(transfer_id))
    await rig.until(lambda: rig.parts.gate.is_closed_by("commit"))
    await asyncio.sleep(0.1)
    during = await rig.weights()
    assert not commit.done()
    assert [during[name] for name in ("version", "digest", "poisoned")] == [0, before["digest"], False]
    assert "flashrl_poisoned 0.0" in (await rig.http.get("/metrics")).text
    assert (await commit).json()["version"] == 1


async def test_request_waits_for_the_commit_and_sees_its_version(rig: Rig) -> None:
    rig.engine.faults.apply_delay_s = 0.05
    transfer_id = await rig.trainer.staged(rig.delta())
    commit = asyncio.create_task(rig.trainer.commit(transfer_id))
    await rig.until(lambda: rig.parts.gate.is_closed_by("commit"))
    reply = await rig.http.post(
        "/generate", json={"prompts": ["hi"], "min_weight_version": 1, "sampling": {"max_tokens": 4}}
    )
    assert reply.json()["weight_version"] == 1
    assert (await commit).status_code == 200


async def test_commit_while_paused_leaves_it_paused(rig: Rig) -> None:
    for _ in range(2):
        assert (await rig.http.post("/pause")).json() == {"paused": True}
    assert (await rig.trainer.publish(rig.delta())).status_code == 200
    waiting = asyncio.create_task(rig.sample())
    await rig.until(lambda: rig.parts.gate.active_requests > 0)
    assert not waiting.done()
    for _ in range(2):
        assert (await rig.http.post("/resume")).json() == {"paused": False}
    assert len(await waiting) > 0


async def test_dead_engine_is_said_and_not_served(rig: Rig) -> None:
    transfer_id = await rig.trainer.staged(rig.delta())
    await rig.engine.close()
    for reply in (
        await rig.http.get("/ready"),
        await rig.http.post("/generate", json={"prompts": ["hi"]}),
        await rig.trainer.commit(transfer_id),
    ):
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "not_ready")
    assert (await rig.http.get("/health")).status_code == 200


async def test_engine_that_dies_in_a_write_is_never_resumed(rig: Rig) -> None:
    resumed: list[bool] = []

    async def lost(update: object) -> dict[str, PartDigest]:
        raise EngineDeadError("the old weights could not be put back")

    async def resume() -> None:
        resumed.append(True)

    rig.engine.apply, rig.engine.resume = lost, resume  # type: ignore[method-assign]
    reply = await rig.trainer.publish(rig.delta())
    assert (reply.status_code, reply.json()["error"]["poisoned"]) == (503, True)
    assert resumed == []


async def test_transfer_in_flight_is_dropped_at_a_stop(rig: Rig) -> None:
    transfer_id = await rig.trainer.staged(rig.delta())
    await rig.parts.store.close(1.0)
    outcome = await rig.trainer.wire.receive_last(transfer_id)
    assert not isinstance(outcome, Staged)
    assert outcome.message == "the service is stopping"
    assert (await rig.trainer.commit(transfer_id)).status_code == 404
