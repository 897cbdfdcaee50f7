"""Kills from the host and a cut network: the stack comes back and the run completes, with every step in its place."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from tests.compose.stack import Stack, get, kill, run

pytestmark = [pytest.mark.compose, pytest.mark.timeout(3600)]

CUT_S = 30.0
STEPS = 8
STEPS_OF_THREE = {"scripted": 40, "vllm": 400}  # an engine takes a minute or two to start again


def _step(stack: Stack, step: int) -> bool:
    rows = stack.rows()
    return bool(rows) and rows[-1]["step"] >= step


def _is_complete(stack: Stack) -> None:
    assert [row["step"] for row in stack.rows()] == list(range(1, STEPS + 1))
    (folder,) = stack.runs.iterdir()
    assert (folder / "report" / "index.html").exists()


def _staged(pid: int) -> bool:
    """Whether an update lies in a service's shared memory: chunks have arrived, and it is not committed yet."""
    return any(Path("/proc", str(pid), "root", "dev", "shm").glob("flashrl-*/*.staged"))


def _versions(stack: Stack, container: dict[str, Any]) -> list[tuple[int, str]]:
    """Versions and digests that a replica says it committed."""
    log = run(["docker", "logs", container["Id"]])
    lines = [line.split("committed ", 1)[1] for line in (log.stdout + log.stderr).splitlines() if "committed " in line]
    facts = [dict(word.split("=", 1) for word in line.split() if "=" in word) for line in lines]
    return [(int(fact["version"]), fact["digest"]) for fact in facts]


def test_a_service_killed_in_the_middle_of_an_update_is_given_its_weights_again(short: Stack) -> None:
    with short.up() as process:
        short.until("second step", lambda: _step(short, 2), poll_s=0.2)
        rollout = short.container("rollout")
        short.until("update", lambda: _staged(rollout["State"]["Pid"]))
        kill(rollout)
        before = len(short.rows())
        began = time.monotonic()
        short.until("further step", lambda: _step(short, before + 1), poll_s=0.2)
        print(f"\nthe next step ended {time.monotonic() - began:.0f} s after the kill")
        short.finish(process)
        assert short.container("rollout")["RestartCount"] >= 1
        _is_complete(short)


def test_a_trainer_killed_in_the_middle_of_a_step_goes_on_from_its_checkpoint(short: Stack) -> None:
    with short.up() as process:
        short.until("fifth step", lambda: _step(short, 5), poll_s=0.2)
        url, token = short.url(short.container("rollout")), short.token()
        short.until(
            "sampling", lambda: "flashrl_active_requests 0.0" not in get(f"{url}/metrics", token).text, poll_s=0.05
        )
        kill(short.container("trainer"))
        short.finish(process)
        trainer = short.container("trainer")
        assert trainer["RestartCount"] == 1
        assert (
            f"4/{STEPS}" not in run(["docker", "logs", "--since", trainer["State"]["StartedAt"], trainer["Id"]]).stdout
        )
        _is_complete(short)


def test_a_trainer_killed_before_its_first_checkpoint_begins_again(short: Stack) -> None:
    with short.up() as process:
        short.until("first step", lambda: _step(short, 1), poll_s=0.05)
        kill(short.container("trainer"))
        short.finish(process)
        assert short.container("trainer")["RestartCount"] == 1
        _is_complete(short)


def test_a_network_that_is_cut_for_half_a_minute_delays_the_run_and_no_more(short: Stack) -> None:
    with short.up() as process:
        short.until("third step", lambda: _step(short, 3), poll_s=0.2)
        network, trainer = f"{short.project}_inside", short.container("trainer")["Id"]
        run(["docker", "network", "disconnect", network, trainer])
        before, end = len(short.rows()), time.monotonic() + CUT_S
        short.until("end of the cut", lambda: time.monotonic() > end, poll_s=0.5)
        assert len(short.rows()) <= before + 1, "the trainer went on without its service"
        run(["docker", "network", "connect", network, trainer])
        short.finish(process)
        assert short.container("trainer")["RestartCount"] == 0
        _is_complete(short)


def test_three_replicas_are_equal_at_the_end_though_one_was_killed(
    clone: Path, short: Stack, request: pytest.FixtureRequest
) -> None:
    """Enough steps for an engine to start again before they are over."""
    steps = STEPS_OF_THREE[request.node.callspec.params["short"]]
    more = short.environ("FLASHRL_TRAIN_ARGS").replace("run.steps=8", f"run.steps={steps}")
    stack = Stack(
        clone,
        "flashrl-three",
        short.command,
        FLASHRL_TRAIN_ARGS=more,
        FLASHRL_RUNS=str(short.runs),
        FLASHRL_PORTS="8110-8119",
    )
    with stack.up("--scale", "rollout=3") as process:
        stack.until("second step", lambda: _step(stack, 2), poll_s=0.2)
        replicas = stack.containers("rollout")
        assert len({stack.url(one) for one in replicas}) == 3, "each has a port of its own"
        killed = replicas[1]
        kill(killed)
        before = stack.rows()[-1]["step"]
        stack.until("further step", lambda: _step(stack, before + 1), poll_s=0.2)
        stack.finish(process)
        last = {one["Name"]: _versions(stack, one)[-1] for one in stack.containers("rollout")}
        print("\n" + json.dumps(last))
        assert len(set(last.values())) == 1, last
        assert next(iter(last.values()))[0] == steps
        log = run(["docker", "logs", killed["Id"]])
        restarted = (log.stdout + log.stderr).count("ready on http")
        assert restarted == 2, "it was up again before the end"
