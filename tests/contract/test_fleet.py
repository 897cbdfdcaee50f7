"""Several services behind one trainer: who gets what, who is waited for, and how a lost one comes back."""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import pytest
from tests.helpers.live_service import LiveService
from tests.helpers.sync_rig import Fleets, Start, connected, held, train

from flashrl_rollout.scripted_engine import Faults
from flashrl_trainer.distributed import Ranks
from flashrl_trainer.fleet import Fleet
from flashrl_trainer.model import Policy
from flashrl_trainer.rollout_client import ServiceUnreachableError
from flashrl_trainer.weight_sync import HandshakeError, WeightSync

LIMIT_S = 30.0
MANY_BYTES = 1 << 20


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def urls(services: Sequence[LiveService]) -> list[str]:
    return [service.url for service in services]


def until_in_use(fleet: Fleet, count: int) -> None:
    end = time.monotonic() + LIMIT_S
    while len(fleet.in_use()) < count:
        assert time.monotonic() < end, fleet.describe()
        time.sleep(0.01)


def until_one_wants_a_snapshot(fleet: Fleet, unless_in_use: int = sys.maxsize) -> None:
    end = time.monotonic() + LIMIT_S
    while not fleet.wants_snapshot and len(fleet.in_use()) < unless_in_use:
        assert time.monotonic() < end, fleet.describe()
        time.sleep(0.01)


def pushed(sync: WeightSync, policy: Policy, *seeds: int) -> list[dict[str, float]]:
    rows = []
    for seed in seeds:
        train(policy, seed, share=0.01)  # so that three deltas are smaller than a snapshot
        rows.append(sync.push(policy))
    return rows


def last_kind(service: LiveService) -> str | None:
    last = service.service.weights_info().last_update
    return last.kind if last else None


def test_update_reaches_all(stack: ExitStack, fleets: Fleets, start: Start, policy: Policy, ranks: Ranks) -> None:
    services = [stack.enter_context(start()) for _ in range(3)]
    sync = connected(fleets.of(urls(services)), policy, ranks)
    rows = pushed(sync, policy, 1, 2, 3)
    assert [held(service) for service in services] == [(3, sync.digest, False)] * 3
    assert [(row["sync/kind"], row["sync/replicas"]) for row in rows] == [(0, 3)] * 3


def test_restarted_replica_gets_what_it_missed_as_one_delta(
    stack: ExitStack, fleets: Fleets, start: Start, policy: Policy, ranks: Ranks
) -> None:
    stays = stack.enter_context(start())
    with start() as lost:
        fleet = fleets.of(urls([stays, lost]))
        sync = connected(fleet, policy, ranks, ring_bytes=MANY_BYTES)
        pushed(sync, policy, 1)
        ports = lost.ports
    assert [row["sync/replicas"] for row in pushed(sync, policy, 2, 3)] == [1, 1]
    back = stack.enter_context(start(ports=ports))
    until_in_use(fleet, 2)
    assert held(back) == held(stays) == (3, sync.digest, False)
    last = back.service.weights_info().last_update
    assert last is not None
    assert (last.kind, sync.snapshots) == ("delta", 0)
    assert pushed(sync, policy, 4)[0]["sync/replicas"] == 2


def test_replica_that_missed_more_than_is_kept_gets_a_snapshot_while_training_goes_on(
    stack: ExitStack, fleets: Fleets, start: Start, policy: Policy, ranks: Ranks
) -> None:
    stays = stack.enter_context(start())
    with start() as lost:
        fleet = fleets.of(urls([stays, lost]))
        sync = connected(fleet, policy, ranks, ring_bytes=0)
        pushed(sync, policy, 1)
        ports = lost.ports
    pushed(sync, policy, 2)
    back = stack.enter_context(start(ports=ports))
    until_one_wants_a_snapshot(fleet)
    pushed(sync, policy, 3)  # the snapshot is made where all ranks take part
    until_in_use(fleet, 2)
    assert held(back) == held(stays) == (sync.version, sync.digest, False)
    assert (last_kind(back), last_kind(stays), sync.snapshots) == ("snapshot", "delta", 1)


def test_poisoned_replica_gets_a_snapshot_while_the_other_samples(
    stack: ExitStack, fleets: Fleets, start: Start, policy: Policy, ranks: Ranks
) -> None:
    good, bad = (stack.enter_context(start()) for _ in range(2))
    fleet = fleets.of(urls([good, bad]))
    sync = connected(fleet, policy, ranks, ring_bytes=MANY_BYTES)
    bad.engine.faults = Faults(corrupt_write=True, fail_revert=True)
    assert pushed(sync, policy, 1)[0]["sync/replicas"] == 1
    assert held(bad)[2]
    bad.engine.faults = Faults()
    until_one_wants_a_snapshot(fleet, unless_in_use=2)  # the first push may have helped it already
    pushed(sync, policy, 2)
    until_in_use(fleet, 2)
    assert sync.snapshots
    assert held(good) == held(bad) == (2, sync.digest, False)


def test_slow_replica_is_not_waited_for_longer_than_asked_and_catches_up(
    stack: ExitStack, fleets: Fleets, start: Start, policy: Policy, ranks: Ranks
) -> None:
    fast, slow = (stack.enter_context(start()) for _ in range(2))
    fleet = fleets.of(urls([fast, slow]), straggler_s=0.2)
    sync = connected(fleet, policy, ranks, ring_bytes=MANY_BYTES)
    slow.engine.faults = Faults(apply_delay_s=3.0)
    row = pushed(sync, policy, 1)[0]
    assert (row["sync/replicas"], held(fast)[0], held(slow)[0]) == (1, 1, 0)
    assert row["sync/seconds"] < 3.0
    slow.engine.faults = Faults()
    pushed(sync, policy, 2)
    until_in_use(fleet, 2)
    assert held(slow) == held(fast) == (2, sync.digest, False)


def test_late_replica_joins(stack: ExitStack, fleets: Fleets, start: Start, policy: Policy, ranks: Ranks) -> None:
    first = stack.enter_context(start())
    known = urls([first])
    fleet = fleets.of(known)
    sync = connected(fleet, policy, ranks, ring_bytes=MANY_BYTES)
    pushed(sync, policy, 1, 2)
    late = stack.enter_context(start())
    known.append(late.url)
    until_in_use(fleet, 2)
    assert held(late) == (2, sync.digest, False)
    assert any(line.startswith(f"{late.url} is in use at version 2") for line in fleets.said)


def test_replica_that_does_not_fit_never_joins(
    stack: ExitStack, fleets: Fleets, start: Start, policy: Policy, ranks: Ranks
) -> None:
    first = stack.enter_context(start())
    known = urls([first])
    fleet = fleets.of(known)
    sync = connected(fleet, policy, ranks, ring_bytes=MANY_BYTES)
    stranger = stack.enter_context(start())
    connected(fleets.of([stranger.url], "run-b"), policy, ranks, run_id="run-b").push(policy)
    known.append(stranger.url)
    end = time.monotonic() + LIMIT_S
    while "follows run run-b" not in fleet.describe():
        assert time.monotonic() < end, fleet.describe()
        time.sleep(0.01)
    assert pushed(sync, policy, 1)[0]["sync/replicas"] == 1
    assert held(stranger)[0] == 1, "the other run's"


def test_replica_named_no_more_is_forgotten_once_it_is_lost(
    stack: ExitStack, fleets: Fleets, start: Start, policy: Policy, ranks: Ranks
) -> None:
    stays = stack.enter_context(start())
    with start() as leaves:
        known = urls([stays, leaves])
        fleet = fleets.of(known)
        sync = connected(fleet, policy, ranks)
        known.remove(leaves.url)
        pushed(sync, policy, 1)
        assert held(leaves)[0] == 1, "in use as long as it is there"
    end = time.monotonic() + LIMIT_S
    while len(fleet.replicas) > 1:
        pushed(sync, policy, sync.version + 1)
        assert time.monotonic() < end


def test_last_one_lost_ends_with_its_name_after_the_deadline(
    fleets: Fleets, start: Start, policy: Policy, ranks: Ranks
) -> None:
    with start() as first, start() as second:
        fleet = fleets.of(urls([first, second]), deadline_s=0.5)
        sync = connected(fleet, policy, ranks)
        either = f"({first.url}|{second.url})"  # the keeper may have found one of them gone already
    train(policy, 1)
    with pytest.raises(ServiceUnreachableError, match=f"rollout service at {either}: ConnectError"):
        sync.push(policy)
    assert sync.version == 0, "the policy that the checkpoint holds is not out"


def test_two_services_that_started_from_different_weights_are_told_apart(
    stack: ExitStack, fleets: Fleets, start: Start, policy: Policy, ranks: Ranks
) -> None:
    first, second = (stack.enter_context(start()) for _ in range(2))
    second.engine.faults = Faults()
    train(policy, 1)
    with pytest.raises(HandshakeError, match=f"the service at {first.url} was started from another checkpoint"):
        connected(fleets.of(urls([first, second])), policy, ranks)
