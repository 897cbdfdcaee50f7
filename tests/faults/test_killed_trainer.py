"""A trainer that gets SIGKILL at every arrow of an update: what is served is whole, and whoever comes next gets in."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from tests.faults import served
from tests.faults.conftest import Start
from tests.faults.publisher_program import MOMENTS, Moment
from tests.helpers.forked import LIMIT_S, Program, ServiceProgram

StartPublisher = Callable[[ServiceProgram, Moment | None], Program]


@pytest.fixture
def start_publisher(tmp_path: Path) -> Iterator[StartPublisher]:
    """A trainer's process that begins to publish version 1; returns once it stands still."""
    started: list[Program] = []

    def begin(service: ServiceProgram, stop_at: Moment | None) -> Program:
        stopped = tmp_path / "stopped"
        options = {"url": service.url, "stop_at": stop_at, "stopped": str(stopped)}
        started.append(Program("publisher", [json.dumps(options)], tmp_path / "publisher", {}))
        while stop_at and not stopped.exists():
            assert not started[-1].ends_within(0.01), started[-1].errors
        return started[-1]

    yield begin
    for program in started:
        program.kill()


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at(moment: Moment, start: Start, start_publisher: StartPublisher) -> None:
    service, old = start(), served.first()
    start_publisher(service, moment).kill()
    expected = old.moved() if moment == "committed" else old
    served.assert_serves(service, expected)
    served.assert_takes_the_next(service, expected)


def test_killed_while_its_update_is_written(start: Start, start_publisher: StartPublisher) -> None:
    """The commit has been asked for, so it comes to its end."""
    service, old = start(faults={"apply_delay_s": 0.3}), served.first()
    trainer = start_publisher(service, None)
    served.until_it_writes(service)
    trainer.kill()
    while service.weights()["version"] == 0:
        pass
    served.assert_serves(service, old.moved())
    served.assert_takes_the_next(service, old.moved())


def test_transfer_that_nobody_takes_up_is_dropped_and_another_run_may_follow(
    start: Start, start_publisher: StartPublisher, tmp_path: Path
) -> None:
    service, old = (
        start(settings={"transfer_deadline_s": 3.0}),
        served.first(),
    )  # of silence: a crowded machine has some
    start_publisher(service, "chunks").kill()
    new = old.moved()
    foreign = old.delta_to(new).declaring(run_id="run-b")
    with httpx.Client(base_url=service.url, timeout=LIMIT_S) as http:
        begin = http.post("/load_weights", content=foreign.manifest.model_dump_json())
        assert (begin.status_code, begin.json()["error"]["run_id"]) == (409, served.RUN)
        assert http.delete(f"/runs/{served.RUN}").json() == {"run_id": None}
        while 'result="expired"} 1.0' not in http.get("/metrics").text:
            pass
        begin = http.post("/load_weights", content=foreign.manifest.model_dump_json())
        assert begin.status_code == 202
        http.delete(f"/load_weights/{begin.json()['transfer_id']}")
        http.delete("/runs/run-b")
    assert list(tmp_path.rglob("*.staged")) == []
    served.assert_serves(service, old)
    served.assert_takes_the_next(service, old)
