"""Runs that are interrupted, or lose their service: how they end, what is left, and that it can be gone on with."""

import signal
from pathlib import Path

from tests.helpers.forked import Ended, free_ports
from tests.helpers.live_service import live
from tests.helpers.workshop import MODEL, Straight, Workshop, rows, state, timeless, until

from flashrl_rollout.scripted_engine import Faults, ScriptedEngine
from flashrl_rollout.scripted_folder import open_folder
from flashrl_wire.digest import bits

SLOW_S = 0.03  # a token; two samples of 8 tokens one after the other: sampling is at work for most of a step


class DamagedOnce(ScriptedEngine):
    """Its fault is over with the first commit."""

    async def keep(self) -> None:
        """As ever, and then without faults."""
        await super().keep()
        self.faults = Faults()


class DamagedBehindEveryCommit(ScriptedEngine):
    """Its memory cannot be trusted: an element changes once nobody looks."""

    async def keep(self) -> None:
        """As ever, and then another bit."""
        await super().keep()
        bits(self.parts["model.norm.weight"])[-1] ^= 1


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def no_traceback(ended: Ended) -> bool:
    return "Traceback" not in ended.errors and "never retrieved" not in ended.errors


def test_ctrl_c_while_sampling_ends_at_once_and_loses_nothing(straight: Straight, workshop: Workshop) -> None:
    service = workshop.service(token_s=SLOW_S)
    trainer = workshop.trainer(service.url)
    until(lambda: len(workshop.recorded()) == 2 and service.is_sampling, trainer)
    trainer.signal(signal.SIGINT)
    ended = trainer.wait()
    run = workshop.run_folder()
    assert (ended.code, no_traceback(ended)) == (130, True), ended.errors
    assert [row["step"] for row in rows(run)] == [0, 1]
    assert state(run, 1)["digest"] == service.weights()["digest"] == state(straight.folder, 1)["digest"]
    assert service.weights()["run_id"] is None, "another trainer may follow"
    assert not service.is_sampling, "requests of a trainer that left are cancelled"
    resumed = workshop.trainer(service.url, f"--resume={run}", run__steps=2).wait()
    assert resumed.code == 0, resumed.errors
    assert [timeless(row) for row in rows(run)] == [timeless(row) for row in rows(straight.folder)[:3]]
    assert service.weights()["digest"] == state(straight.folder, 2)["digest"]


def test_ctrl_c_while_an_update_is_sent_leaves_the_service_as_it_was(straight: Straight, workshop: Workshop) -> None:
    ports = free_ports(2)
    deaf = workshop.service(ports, deaf=True)
    trainer = workshop.trainer(deaf.url)
    until(lambda: deaf.is_ready and deaf.weights()["run_id"], trainer)
    before = deaf.weights()
    trainer.signal(signal.SIGINT)
    ended = trainer.wait()
    run = workshop.run_folder()
    assert (ended.code, no_traceback(ended)) == (130, True), ended.errors
    after = deaf.weights()
    assert (after["version"], after["digest"], after["run_id"]) == (0, before["digest"], None)
    assert [row["step"] for row in rows(run)] == [0, 1], "the step was made, and is recorded"
    assert (state(run, 1)["published"], state(run, 1)["weight_version"]) == (False, 0)
    deaf.kill()
    service = workshop.service(ports)
    resumed = workshop.trainer(service.url, f"--resume={run}", run__steps=2).wait()
    assert resumed.code == 0, resumed.errors
    assert timeless(rows(run)[2]) == timeless(rows(straight.folder)[2])
    assert service.weights()["digest"] == state(straight.folder, 2)["digest"]


def test_service_that_is_killed_and_restarted_gets_its_weights_again(straight: Straight, workshop: Workshop) -> None:
    """Once while an update is sent, once while it samples; the run does not notice in its numbers."""
    ports = free_ports(2)
    service = workshop.service(ports, deaf=True)
    trainer = workshop.trainer(service.url, run__steps=2)
    until(lambda: service.is_ready and service.weights()["run_id"], trainer)
    service.kill()
    service = workshop.service(ports, token_s=SLOW_S)
    until(lambda: len(rows(workshop.run_folder())) == 2 and service.is_sampling, trainer)
    service.kill()
    service = workshop.service(ports)
    ended = trainer.wait()
    assert (ended.code, no_traceback(ended)) == (0, True), ended.errors
    assert f"{service.url} is in use at version 1, after " in ended.output
    run = workshop.run_folder()
    assert [timeless(row) for row in rows(run)] == [timeless(row) for row in rows(straight.folder)[:3]]
    assert service.weights()["digest"] == state(straight.folder, 2)["digest"]


def test_service_that_dies_for_good_ends_the_run_with_a_checkpoint(straight: Straight, workshop: Workshop) -> None:
    service = workshop.service(token_s=SLOW_S)
    trainer = workshop.trainer(service.url, rollout__connect_deadline_s=1.0, checkpoint__every=0)
    until(lambda: len(workshop.recorded()) == 2 and service.is_sampling, trainer)
    service.kill()
    ended = trainer.wait()
    run = workshop.run_folder()
    assert (ended.code, no_traceback(ended)) == (1, True), ended.errors
    assert ended.errors.splitlines()[-1].startswith(f"error: rollout service at {service.url}: ConnectError")
    assert checkpoints(run) == ["step-000001"]
    assert state(run, 1) == state(straight.folder, 1)


def test_service_that_is_not_there_is_one_line_before_anything_is_loaded(workshop: Workshop) -> None:
    url = f"http://127.0.0.1:{free_ports(1)[0]}"
    ended = workshop.trainer(url, rollout__connect_deadline_s=0.5).wait()
    assert ended.code == 1
    waiting, error = ended.errors.splitlines()
    assert waiting == f"waiting for the rollout service at {url}: ConnectError: [Errno 111] Connection refused"
    assert error == (
        f"error: rollout service at {url} not ready after 0.5 s: ConnectError: [Errno 111] Connection refused"
    )
    assert not workshop.runs.exists()


def test_weights_that_an_audit_finds_damaged_are_sent_again(straight: Straight, workshop: Workshop) -> None:
    with live(
        lambda: open_folder(MODEL, faults=Faults(corrupt_untouched=True), kind=DamagedOnce),
        workshop.folder,
        audit_every=1,
    ) as service:
        ended = workshop.trainer(service.url, run__steps=2).wait()
        assert ended.code == 0, ended.errors
        assert ended.output.count("the service lost its weights; sending them again") == 1
        run = workshop.run_folder()
        assert [timeless(row) for row in rows(run)] == [timeless(row) for row in rows(straight.folder)[:3]]
        assert service.service.weights_info().digest == state(straight.folder, 2)["digest"]


def test_service_that_damages_its_weights_every_time_ends_the_run(workshop: Workshop) -> None:
    with live(lambda: open_folder(MODEL, kind=DamagedBehindEveryCommit), workshop.folder, audit_every=1) as service:
        url, ended = service.url, workshop.trainer(service.url).wait()
    assert (ended.code, no_traceback(ended)) == (1, True), ended.errors
    assert ended.errors.splitlines()[-1] == f"error: rollout service at {url}: poisoned"
    assert ended.output.count("the service lost its weights; sending them again") == 3
    assert checkpoints(workshop.run_folder()) == ["step-000001"]
