"""Whole runs with a user's reward that fails: at times, which costs groups, or always, which ends the run."""

import re

import pytest
from tests.helpers.workshop import Straight, Workshop, rows, timeless

from flashrl_trainer.jsonl import read_rows


@pytest.mark.parametrize(
    ("reward", "reason"),
    [("touchy", r"LookupError: not this one"), ("slow_at_times", r"no result within 0\.5 s")],
)
def test_a_reward_that_fails_at_times_costs_groups_and_no_run(reward: str, reason: str, workshop: Workshop) -> None:
    service = workshop.service()
    name = f"tests.helpers.rewards:{reward}"
    ended = workshop.trainer(service.url, data__reward=name, data__reward_timeout_s=0.5, run__steps=2).wait()
    assert ended.code == 0, ended.errors
    lines = [
        line for line in ended.errors.splitlines() if line.startswith(f"reward {name} failed for a text of prompt")
    ]
    assert lines
    assert all(re.search(rf"prompt (train|heldout)/\d+: {reason}$", line) for line in lines), lines
    run = workshop.run_folder()
    assert sum(row["reward/failed"] for row in rows(run)[1:]) > 0
    groups = [row["sampling/groups_seen"] for row in rows(run)[1:]]
    assert all(seen > 0 for seen in groups)


def test_a_broken_reward_ends_the_run_which_goes_on_with_a_whole_one(straight: Straight, workshop: Workshop) -> None:
    service = workshop.service()
    broken = {"data__reward": "tests.helpers.rewards:broken", "data__reward_max_failures": 3}
    ended = workshop.trainer(service.url, run__name="mended", **broken).wait()
    assert (ended.code, "Traceback" in ended.errors) == (1, False), ended.errors
    assert re.match(
        r"error: 3 times in a row \(data\.reward_max_failures\): reward tests\.helpers\.rewards:broken failed for a "
        r"text of prompt heldout/\d+: LookupError: no judge for \d+$",
        ended.errors.splitlines()[-1],
    )
    run = workshop.runs / "mended"
    assert read_rows(run / "metrics.jsonl") == []
    resumed = workshop.trainer(service.url, f"--resume={run}").wait()
    assert resumed.code == 0, resumed.errors
    assert [timeless(row) for row in rows(run)] == [timeless(row) for row in rows(straight.folder)]
