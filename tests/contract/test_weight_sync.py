"""The trainer's weight sync against a whole service: what is sent, under which number, and what heals a broken one."""

from pathlib import Path

import pytest
from tests.helpers.sync_rig import RUN, Fleets, Start, connected, held, load, train

from flashrl_rollout.scripted_engine import Faults, ScriptedEngine
from flashrl_trainer.distributed import Ranks
from flashrl_trainer.model import Policy
from flashrl_trainer.rollout_client import RolloutClient
from flashrl_trainer.weight_sync import HandshakeError
from flashrl_wire.errors import DigestMismatchError, UpdateInProgressError
from flashrl_wire.messages import Manifest, PauseMode


class BreaksOnce(ScriptedEngine):
    """Faults are over after they have kept a write from being undone."""

    async def revert(self) -> None:
        """Fail as told, once."""
        try:
            await super().revert()
        finally:
            self.faults = Faults()


class BusyOnce(ScriptedEngine):
    """Does not finish what runs by the deadline of the first pause."""

    is_busy = True

    async def pause(self, mode: PauseMode, deadline_s: float) -> None:
        """Too late, once."""
        if BusyOnce.is_busy:
            BusyOnce.is_busy = False
            raise TimeoutError
        await super().pause(mode, deadline_s)


def test_same_weights_need_no_update(fleets: Fleets, start: Start, policy: Policy, ranks: Ranks) -> None:
    with start() as service:
        sync = connected(fleets.of([service.url]), policy, ranks)
        assert (sync.version, sync.digest) == (0, held(service)[1])
        assert service.service.weights_info().last_update is None


def test_twenty_updates_in_a_row_and_none_is_a_snapshot(
    fleets: Fleets, start: Start, policy: Policy, ranks: Ranks
) -> None:
    with start(audit_every=1) as service:
        sync = connected(fleets.of([service.url]), policy, ranks)
        for step in range(1, 21):
            train(policy, step)
            metrics = sync.push(policy)
            assert held(service) == (step, sync.digest, False)
            assert metrics["sync/kind"] == 0
            assert 0 < metrics["sync/wire_bytes"] < metrics["sync/full_bytes"]
        assert (sync.version, sync.snapshots) == (20, 0)


def test_update_without_a_change_moves_the_version_only(
    fleets: Fleets, start: Start, policy: Policy, ranks: Ranks
) -> None:
    with start() as service:
        sync = connected(fleets.of([service.url]), policy, ranks)
        digest = sync.digest
        metrics = sync.push(policy)
        assert held(service) == (1, digest, False)
        assert (metrics["sync/wire_bytes"], metrics["sync/changed_fraction"]) == (0, 0)


def test_progress_counts_the_bytes_that_were_sent(fleets: Fleets, start: Start, policy: Policy, ranks: Ranks) -> None:
    with start() as service:
        sync = connected(fleets.of([service.url]), policy, ranks)
        train(policy, 1)
        sent: list[int] = []
        assert sync.push(policy, sent.append)["sync/wire_bytes"] == sum(sent)


@pytest.mark.parametrize(
    ("service_version", "expected"),
    [(0, 5), (9, 5)],
    ids=["the service was restarted", "the trainer goes back to an older checkpoint"],
)
def test_resumed_run_keeps_its_numbers(
    fleets: Fleets, start: Start, policy: Policy, ranks: Ranks, service_version: int, expected: int
) -> None:
    with start() as service:
        before = connected(fleets.of([service.url]), policy, ranks)
        for step in range(service_version):
            train(policy, step)
            before.push(policy)
        train(policy, 100)
        sync = connected(fleets.of([service.url]), policy, ranks, version=5, fresh=False)
        assert (sync.version, held(service)) == (expected, (expected, sync.digest, False))


def test_resumed_run_takes_the_number_under_which_its_weights_are_served(
    fleets: Fleets, start: Start, policy: Policy, ranks: Ranks
) -> None:
    """Ctrl-C came between a commit and its reply: the trainer does not know that version 2 is out."""
    with start() as service:
        before = connected(fleets.of([service.url]), policy, ranks)
        for step in (1, 2):
            train(policy, step)
            before.push(policy)
        sync = connected(fleets.of([service.url]), policy, ranks, version=1, fresh=False)
        assert (sync.version, sync.snapshots) == (2, 0)


def test_new_run_on_a_used_service_goes_on_from_its_number(
    fleets: Fleets, start: Start, folder: Path, policy: Policy, ranks: Ranks
) -> None:
    with start() as service:
        before = connected(fleets.of([service.url]), policy, ranks)
        train(policy, 1)
        before.push(policy)
        RolloutClient(service.url, None, request_timeout_s=10).release(RUN)
        sync = connected(fleets.of([service.url], "run-b"), load(folder, ranks), ranks, run_id="run-b")
        assert (sync.version, held(service)) == (2, (2, sync.digest, False))


def test_new_run_with_other_weights_than_the_services_first_ones(
    fleets: Fleets, start: Start, policy: Policy, ranks: Ranks
) -> None:
    train(policy, 1)
    with start() as service, pytest.raises(HandshakeError, match="was started from another checkpoint"):
        connected(fleets.of([service.url]), policy, ranks)


def test_service_that_follows_another_run_is_not_taken(
    fleets: Fleets, start: Start, policy: Policy, ranks: Ranks
) -> None:
    with start() as service:
        other = connected(fleets.of([service.url], "run-b"), policy, ranks, run_id="run-b")
        other.push(policy)
        message = rf"^the service at {service.url} follows run run-b; wait .* curl -X DELETE {service.url}/runs/run-b$"
        with pytest.raises(UpdateInProgressError, match=message):
            connected(fleets.of([service.url]), policy, ranks)
        RolloutClient(service.url, None, request_timeout_s=10).release("run-b")
        assert connected(fleets.of([service.url]), policy, ranks).version == 1


def test_restarted_service_gets_everything_under_the_next_number(
    fleets: Fleets, start: Start, policy: Policy, ranks: Ranks
) -> None:
    with start() as first:
        sync = connected(fleets.of([first.url]), policy, ranks)
        for step in (1, 2):
            train(policy, step)
            sync.push(policy)
        ports = first.ports
    with start(ports=ports) as second:
        train(policy, 3)
        assert sync.push(policy)["sync/kind"] == 1
        assert held(second) == (3, sync.digest, False)
        train(policy, 4)
        assert sync.push(policy)["sync/kind"] == 0, "the snapshot is the base of the next delta"
        assert held(second) == (4, sync.digest, False)


def test_repair_puts_the_same_weights_under_the_same_number(
    fleets: Fleets, start: Start, policy: Policy, ranks: Ranks
) -> None:
    with start() as first:
        sync = connected(fleets.of([first.url]), policy, ranks)
        for step in (1, 2):
            train(policy, step)
            sync.push(policy)
        ports, digest = first.ports, sync.digest
    with start(ports=ports) as second:
        sync.repair(policy)
        assert (sync.version, held(second)) == (2, (2, digest, False))


def test_refused_write_leaves_both_sides_where_they_were(
    fleets: Fleets, start: Start, policy: Policy, ranks: Ranks
) -> None:
    with start() as service:
        sync = connected(fleets.of([service.url]), policy, ranks)
        before = held(service)
        service.engine.faults = Faults(corrupt_write=True)
        train(policy, 1)
        with pytest.raises(DigestMismatchError):
            sync.push(policy)
        assert (sync.version, held(service)) == (0, before)
        service.engine.faults = Faults()
        assert sync.push(policy)["sync/kind"] == 0
        assert held(service) == (1, sync.digest, False)


@pytest.mark.parametrize("version", [0, 3])
def test_poisoned_service_is_healed_by_a_snapshot(
    fleets: Fleets, start: Start, policy: Policy, ranks: Ranks, version: int
) -> None:
    with start(BreaksOnce) as service:
        sync = connected(fleets.of([service.url]), policy, ranks)
        for step in range(version):
            train(policy, step)
            sync.push(policy)
        service.engine.faults = Faults(corrupt_write=True, fail_revert=True)
        train(policy, 100)
        assert sync.push(policy)["sync/kind"] == 1
        assert held(service) == (version + 1, sync.digest, False)


def test_poisoned_service_is_healed_when_a_run_begins(
    fleets: Fleets, start: Start, policy: Policy, ranks: Ranks
) -> None:
    with start(audit_every=1) as service:
        service.engine.faults = Faults(corrupt_untouched=True)
        connected(fleets.of([service.url]), policy, ranks).push(policy)
        service.engine.faults = Faults()
        client = RolloutClient(service.url, None, request_timeout_s=10)
        while not client.weights().poisoned:  # the audit runs behind the commit
            assert client.weights().version == 1
        again = connected(fleets.of([service.url]), policy, ranks, version=1, fresh=False)
        assert held(service) == (again.version, again.digest, False)


def test_transfer_that_a_killed_trainer_left_is_replaced(
    fleets: Fleets, start: Start, policy: Policy, ranks: Ranks
) -> None:
    with start() as service:
        sync = connected(fleets.of([service.url]), policy, ranks)
        client = RolloutClient(service.url, None, request_timeout_s=10, retry_s=0)
        info = client.weights()
        client.begin(
            Manifest(
                kind="delta",
                run_id=RUN,
                base_version=0,
                base_digest=info.digest,
                version=1,
                digest="0" * 32,
                layout_hash=info.layout_hash,
                changed_elements=0,
                segments=[],
                chunks=[],
            )
        )
        train(policy, 1)
        assert sync.push(policy)["sync/kind"] == 0
        assert held(service) == (1, sync.digest, False)


def test_commit_that_waits_too_long_for_samples_is_tried_again(
    fleets: Fleets, start: Start, policy: Policy, ranks: Ranks
) -> None:
    with start(BusyOnce, commit_mode="drain") as service:
        sync = connected(fleets.of([service.url]), policy, ranks)
        train(policy, 1)
        assert sync.push(policy)["sync/kind"] == 0
        assert held(service) == (1, sync.digest, False)
        assert not BusyOnce.is_busy
