"""The trainer's weight sync against a whole service: what is sent, under which number, and what heals a broken one."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers.live_service import LiveService, live
from transformers import AutoModelForCausalLM, Qwen2Config

from flashrl_rollout import stored_state
from flashrl_rollout.engine import EngineInfo
from flashrl_rollout.scripted_engine import Faults, ScriptedEngine
from flashrl_rollout.scripted_folder import folder_layout
from flashrl_trainer.distributed import Ranks, start_ranks, stop_ranks
from flashrl_trainer.fleet import Fleet
from flashrl_trainer.keeper import Keeper
from flashrl_trainer.model import Policy, load_policy
from flashrl_trainer.publisher import Publisher
from flashrl_trainer.replica import Replica
from flashrl_trainer.rollout_client import RolloutClient
from flashrl_trainer.weight_sync import HandshakeError, Identity, WeightSync
from flashrl_wire.errors import DigestMismatchError, UpdateInProgressError
from flashrl_wire.messages import Manifest, PauseMode

CONFIG = Qwen2Config(
    vocab_size=13,
    hidden_size=16,
    intermediate_size=7,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)
INFO = EngineInfo("scripted", "int8", 13, 128, "0" * 32)
IDENTITY = Identity("int8", "0" * 32, 13)
RUN = "run-a"

Start = Callable[..., AbstractContextManager[LiveService]]


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    yield start_ranks("cpu", timeout_s=30)
    stop_ranks()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that trainer and service start from."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    AutoModelForCausalLM.from_config(CONFIG).save_pretrained(folder)
    return folder


@pytest.fixture
def policy(folder: Path, ranks: Ranks) -> Policy:
    """As it was saved."""
    return load_policy(
        str(folder), ranks, compute_dtype="float32", checkpointing=False, temperature=1.0, chunk_tokens=8
    )


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


@pytest.fixture
def start(folder: Path, tmp_path: Path) -> Start:
    """Starts services at version 0, with settings."""

    def start(engine: type[ScriptedEngine] = ScriptedEngine, **settings: Any) -> AbstractContextManager[LiveService]:
        layout = folder_layout(folder, "int8")

        def make() -> ScriptedEngine:
            return engine(layout, stored_state.read_parts(folder, layout), INFO)

        return live(make, tmp_path, **settings)

    return start


_fleets: list[Fleet] = []


@pytest.fixture(autouse=True)
def keepers_end() -> Iterator[None]:
    """They would go on asking for services on ports that other tests use next."""
    yield
    while _fleets:
        _fleets.pop().stopping.set()


def sync_with(service: LiveService, ranks: Ranks, run_id: str = RUN, ring_bytes: int = 0) -> WeightSync:
    client = RolloutClient(service.url, None, request_timeout_s=10, retry_s=5)
    replica = Replica(client, Publisher(client, run_id, deadline_s=10, keys=None))
    fleet = Fleet([replica], deadline_s=5, straggler_s=5, note=lambda line: None)
    _fleets.append(fleet)
    Keeper(fleet, lambda: [service.url], lambda url: replica).start()
    return WeightSync(fleet, run_id, ranks, block_bytes=1000, ring_bytes=ring_bytes)


def connected(
    service: LiveService, policy: Policy, ranks: Ranks, *, version: int = 0, fresh: bool = True, run_id: str = RUN
) -> WeightSync:
    sync = sync_with(service, ranks, run_id)
    sync.connect(policy, IDENTITY, version, fresh=fresh)
    return sync


def train(policy: Policy, seed: int) -> None:
    """Move some of the weights."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            local = parameter.to_local()  # type: ignore[attr-defined]
            local.add_(0.1 * (torch.rand(local.shape, generator=generator) < 0.1))


def held(service: LiveService) -> tuple[int, str, bool]:
    """Version, digest of what the engine really holds, and whether it is poisoned."""
    weights = service.service.require().weights
    return (
        weights.version,
        stored_state.combined(weights.layout, stored_state.digests(service.engine.parts)),
        weights.poisoned,
    )


def test_same_weights_need_no_update(start: Start, policy: Policy, ranks: Ranks) -> None:
    with start() as service:
        sync = connected(service, policy, ranks)
        assert (sync.version, sync.digest) == (0, held(service)[1])
        assert service.service.weights_info().last_update is None


def test_twenty_updates_in_a_row_and_none_is_a_snapshot(start: Start, policy: Policy, ranks: Ranks) -> None:
    with start(audit_every=1) as service:
        sync = connected(service, policy, ranks)
        for step in range(1, 21):
            train(policy, step)
            metrics = sync.push(policy)
            assert held(service) == (step, sync.digest, False)
            assert metrics["sync/kind"] == 0
            assert 0 < metrics["sync/wire_bytes"] < metrics["sync/full_bytes"]
        assert (sync.version, sync.snapshots) == (20, 0)


def test_update_without_a_change_moves_the_version_only(start: Start, policy: Policy, ranks: Ranks) -> None:
    with start() as service:
        sync = connected(service, policy, ranks)
        digest = sync.digest
        metrics = sync.push(policy)
        assert held(service) == (1, digest, False)
        assert (metrics["sync/wire_bytes"], metrics["sync/changed_fraction"]) == (0, 0)


def test_progress_counts_the_bytes_that_were_sent(start: Start, policy: Policy, ranks: Ranks) -> None:
    with start() as service:
        sync = connected(service, policy, ranks)
        train(policy, 1)
        sent: list[int] = []
        assert sync.push(policy, sent.append)["sync/wire_bytes"] == sum(sent)


@pytest.mark.parametrize(
    ("service_version", "expected"),
    [(0, 5), (9, 5)],
    ids=["the service was restarted", "the trainer goes back to an older checkpoint"],
)
def test_resumed_run_keeps_its_numbers(
    start: Start, policy: Policy, ranks: Ranks, service_version: int, expected: int
) -> None:
    with start() as service:
        before = connected(service, policy, ranks)
        for step in range(service_version):
            train(policy, step)
            before.push(policy)
        train(policy, 100)
        sync = connected(service, policy, ranks, version=5, fresh=False)
        assert (sync.version, held(service)) == (expected, (expected, sync.digest, False))


def test_resumed_run_takes_the_number_under_which_its_weights_are_served(
    start: Start, policy: Policy, ranks: Ranks
) -> None:
    """Ctrl-C came between a commit and its reply: the trainer does not know that version 2 is out."""
    with start() as service:
        before = connected(service, policy, ranks)
        for step in (1, 2):
            train(policy, step)
            before.push(policy)
        sync = connected(service, policy, ranks, version=1, fresh=False)
        assert (sync.version, sync.snapshots) == (2, 0)


def test_new_run_on_a_used_service_goes_on_from_its_number(
    start: Start, folder: Path, policy: Policy, ranks: Ranks
) -> None:
    with start() as service:
        before = connected(service, policy, ranks)
        train(policy, 1)
        before.push(policy)
        RolloutClient(service.url, None, request_timeout_s=10).release(RUN)
        fresh = load_policy(
            str(folder), ranks, compute_dtype="float32", checkpointing=False, temperature=1.0, chunk_tokens=8
        )
        sync = connected(service, fresh, ranks, run_id="run-b")
        assert (sync.version, held(service)) == (2, (2, sync.digest, False))


def test_new_run_with_other_weights_than_the_services_first_ones(start: Start, policy: Policy, ranks: Ranks) -> None:
    train(policy, 1)
    with start() as service, pytest.raises(HandshakeError, match="was started from another checkpoint"):
        connected(service, policy, ranks)


def test_service_that_follows_another_run_is_not_taken(start: Start, policy: Policy, ranks: Ranks) -> None:
    with start() as service:
        other = connected(service, policy, ranks, run_id="run-b")
        other.push(policy)
        message = rf"^the service at {service.url} follows run run-b; wait .* curl -X DELETE {service.url}/runs/run-b$"
        with pytest.raises(UpdateInProgressError, match=message):
            connected(service, policy, ranks)
        RolloutClient(service.url, None, request_timeout_s=10).release("run-b")
        assert connected(service, policy, ranks).version == 1


def test_restarted_service_gets_everything_under_the_next_number(start: Start, policy: Policy, ranks: Ranks) -> None:
    with start() as first:
        sync = connected(first, policy, ranks)
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


def test_repair_puts_the_same_weights_under_the_same_number(start: Start, policy: Policy, ranks: Ranks) -> None:
    with start() as first:
        sync = connected(first, policy, ranks)
        for step in (1, 2):
            train(policy, step)
            sync.push(policy)
        ports, digest = first.ports, sync.digest
    with start(ports=ports) as second:
        sync.repair(policy)
        assert (sync.version, held(second)) == (2, (2, digest, False))


def test_refused_write_leaves_both_sides_where_they_were(start: Start, policy: Policy, ranks: Ranks) -> None:
    with start() as service:
        sync = connected(service, policy, ranks)
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
def test_poisoned_service_is_healed_by_a_snapshot(start: Start, policy: Policy, ranks: Ranks, version: int) -> None:
    with start(BreaksOnce) as service:
        sync = connected(service, policy, ranks)
        for step in range(version):
            train(policy, step)
            sync.push(policy)
        service.engine.faults = Faults(corrupt_write=True, fail_revert=True)
        train(policy, 100)
        assert sync.push(policy)["sync/kind"] == 1
        assert held(service) == (version + 1, sync.digest, False)


def test_poisoned_service_is_healed_when_a_run_begins(start: Start, policy: Policy, ranks: Ranks) -> None:
    with start(audit_every=1) as service:
        service.engine.faults = Faults(corrupt_untouched=True)
        connected(service, policy, ranks).push(policy)
        service.engine.faults = Faults()
        client = RolloutClient(service.url, None, request_timeout_s=10)
        while not client.weights().poisoned:  # the audit runs behind the commit
            assert client.weights().version == 1
        again = connected(service, policy, ranks, version=1, fresh=False)
        assert held(service) == (again.version, again.digest, False)


def test_transfer_that_a_killed_trainer_left_is_replaced(start: Start, policy: Policy, ranks: Ranks) -> None:
    with start() as service:
        sync = connected(service, policy, ranks)
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


def test_commit_that_waits_too_long_for_samples_is_tried_again(start: Start, policy: Policy, ranks: Ranks) -> None:
    with start(BusyOnce, commit_mode="drain") as service:
        sync = connected(service, policy, ranks)
        train(policy, 1)
        assert sync.push(policy)["sync/kind"] == 0
        assert held(service) == (1, sync.digest, False)
        assert not BusyOnce.is_busy
