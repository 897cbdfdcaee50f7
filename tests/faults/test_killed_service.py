"""A service that gets SIGKILL at every arrow of an update: started again it serves its checkpoint, whole, and goes on.

The trainer is the real publisher, and learns of it as an error. A lost reply alone is none.
"""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.faults import served
from tests.faults.conftest import Start
from tests.faults.publisher_program import MOMENTS, Moment, publish_watched
from tests.faults.reply_thief import reply_thief
from tests.helpers.forked import LIMIT_S, ServiceProgram, free_ports
from tests.helpers.outgoing import outgoing

from flashrl_trainer.publisher import Publisher
from flashrl_trainer.rollout_client import RolloutClient, ServiceUnreachableError
from flashrl_wire.errors import StaleBaseError


def assert_starts_afresh(start: Start, ports: list[int], tmp_path: Path) -> ServiceProgram:
    """On the same ports, with version 0 and without what the one before had staged; and it takes an update."""
    service = start(ports)
    assert list(tmp_path.rglob("*.staged")) == []
    served.assert_serves(service, served.first())
    served.assert_takes_the_next(service, served.first())
    return service


def publisher_of(url: str) -> Publisher:
    """That gives a service up soon: it is dead."""
    return served.publisher_for(RolloutClient(url, None, request_timeout_s=LIMIT_S, retry_s=0), deadline_s=1)


@pytest.mark.parametrize("moment", [moment for moment in MOMENTS if moment != "committed"])
def test_killed_at(moment: Moment, start: Start, tmp_path: Path) -> None:
    ports = free_ports(2)
    service, old = start(ports), served.first()

    def reached(now: Moment) -> None:
        if now == moment:
            service.kill()

    with pytest.raises(ServiceUnreachableError):
        publish_watched(service.url, old, reached, deadline_s=1)
    assert_starts_afresh(start, ports, tmp_path)


def test_killed_while_it_writes(start: Start, tmp_path: Path) -> None:
    ports = free_ports(2)
    service, old = start(ports, faults={"apply_delay_s": LIMIT_S}), served.first()
    with ThreadPoolExecutor(1) as pool:
        published = pool.submit(publish_watched, service.url, old, lambda _: None, deadline_s=LIMIT_S)
        served.until_it_writes(service)
        service.kill()
        assert isinstance(published.exception(), ServiceUnreachableError)
    assert_starts_afresh(start, ports, tmp_path)


def test_killed_after_a_commit_before_its_reply(start: Start, tmp_path: Path) -> None:
    """The trainer cannot know. What it holds is no base of the new service's, whose digest says so."""
    ports = free_ports(2)
    service, old = start(ports), served.first()
    new = old.moved()
    versions = []

    def steals(method: str, path: str) -> bool:
        if not path.endswith("/commit"):
            return False
        versions.append(service.weights()["version"])
        service.kill()
        return True

    with reply_thief(service.url, steals) as url, pytest.raises(ServiceUnreachableError):
        publisher_of(url).publish(outgoing(old.delta_to(new)))
    assert versions == [1]
    again = start(ports)
    served.assert_serves(again, old)
    with pytest.raises(StaleBaseError):
        served.publish(again.url, new.delta_to(new.moved()))
    served.publish(again.url, old.snapshot_to(new.moved()))
    served.assert_serves(again, new.moved())
    served.assert_takes_the_next(again, new.moved())


def test_lost_reply_to_a_commit_is_settled(start: Start) -> None:
    service, old = start(), served.first()
    lost = threading.Event()

    def steals(method: str, path: str) -> bool:
        first_time = path.endswith("/commit") and not lost.is_set()
        if first_time:
            lost.set()
        return first_time

    with reply_thief(service.url, steals) as url:
        publisher_of(url).publish(outgoing(old.delta_to(old.moved())))
    assert lost.is_set()
    served.assert_serves(service, old.moved())
    served.assert_takes_the_next(service, old.moved())


def test_lost_reply_to_a_begin_blocks_nobody(start: Start) -> None:
    """The transfer is open and its trainer does not know its id; the same run may end it."""
    service, old = start(), served.first()

    def steals(method: str, path: str) -> bool:
        return (method, path) == ("POST", "/load_weights")

    with reply_thief(service.url, steals) as url, pytest.raises(ServiceUnreachableError):
        publisher_of(url).publish(outgoing(old.delta_to(old.moved())))
    served.assert_serves(service, old)
    served.assert_takes_the_next(service, old)
