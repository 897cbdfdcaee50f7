"""SIGKILL at any moment, then `--resume`: rows, weights and what the service holds are those of a run in one go.

Kills are drawn from a seed: the step, and how far into it.
"""

import json
import random
import signal
from pathlib import Path
from typing import Any

import pytest
from tests.helpers.workshop import STEPS, Straight, Workshop, rows, state, timeless, until

TOKEN_S = 0.01  # sampling is a good part of a step then, so that kills fall into every phase


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_killed_run_that_is_resumed_is_the_run_in_one_go(seed: int, straight: Straight, workshop: Workshop) -> None:
    draw = random.Random(seed)
    every, step, share = draw.choice([1, 2]), draw.randrange(1, STEPS - 1), draw.uniform(0, 1)
    service = workshop.service(token_s=TOKEN_S)
    trainer = workshop.trainer(service.url, run__name="killed", checkpoint__every=every)
    run = workshop.runs / "killed"
    until(lambda: whole_rows(run) > step and list(run.glob("checkpoints/step-*")), trainer)
    assert not trainer.ends_within(share * last_step_s(run)), "it was to be killed, with more than a step before it"
    trainer.signal(signal.SIGKILL)
    trainer.wait()
    ended = workshop.trainer(service.url, f"--resume={run}", checkpoint__every=every).wait()
    assert ended.code == 0, ended.errors
    assert [timeless(row) for row in rows(run)] == [timeless(row) for row in rows(straight.folder)]
    assert lines(run / "samples.jsonl") == lines(straight.folder / "samples.jsonl")
    assert state(run, STEPS) == state(straight.folder, STEPS), "data order, draws, surplus, version and digest"
    held = service.weights()
    assert (held["version"], held["digest"]) == (straight.version, straight.digest)
    assert not list((run / "checkpoints").glob(".*")), "nothing half is left"


def test_run_killed_before_its_first_checkpoint_begins_anew(straight: Straight, workshop: Workshop) -> None:
    """The service has gone on meanwhile, so that the first weights get a number of their own; all else is the same."""
    service = workshop.service()
    trainer = workshop.trainer(service.url, run__name="killed", checkpoint__every=0)
    run = workshop.runs / "killed"
    until(lambda: whole_rows(run) > 2, trainer)
    trainer.signal(signal.SIGKILL)
    trainer.wait()
    ended = workshop.trainer(service.url, f"--resume={run}").wait()
    assert ended.code == 0, ended.errors
    assert f"--resume: {run} has no checkpoint yet; it begins anew" in ended.errors.splitlines()
    assert [numberless(row) for row in rows(run)] == [numberless(row) for row in rows(straight.folder)]
    assert service.weights()["digest"] == straight.digest


def numberless(row: dict[str, Any]) -> dict[str, Any]:
    return timeless(row) | {"weight_version": None}


def whole_rows(run: Path) -> int:
    """The writer may be in the middle of another one."""
    file = run / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def last_step_s(run: Path) -> float:
    """How long the last whole row's step took, on this machine."""
    *_, last = (run / "metrics.jsonl").read_text().splitlines(keepends=True)[: whole_rows(run)]
    return float(json.loads(last)["perf/step_seconds"])


def lines(file: Path) -> list[object]:
    return [json.loads(line) for line in file.read_text().splitlines()]
