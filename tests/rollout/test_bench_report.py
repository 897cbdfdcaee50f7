"""Medians, ratios, table and JSON of hand-made rounds."""

from io import StringIO

import pytest
from rich.console import Console

from flashrl_rollout.bench.report import ArmFacts, Turn, numbers, table
from flashrl_rollout.bench.settings import ArmName

SERVICE_NONE, SERVICE_INT8 = ArmName("service", "none"), ArmName("service", "int8")
ENGINE_NONE, ENGINE_INT8 = ArmName("engine", "none"), ArmName("engine", "int8")
SECONDS = {
    # of three rounds, 1200 tokens each
    SERVICE_NONE: (12.0, 10.0, 15.0),  # 100, 120, 80 tokens/s
    ENGINE_NONE: (10.0, 12.0, 12.0),  # 120, 100, 100
    SERVICE_INT8: (8.0, 6.0, 10.0),  # 150, 200, 120
    ENGINE_INT8: (8.0, 4.0, 12.0),  # 150, 300, 100
}


def turns() -> list[Turn]:
    return [
        Turn(index + 1, arm, seconds, 1200, front_cpu_s=seconds / 10)
        for arm, rounds in SECONDS.items()
        for index, seconds in enumerate(rounds)
    ]


def facts() -> dict[ArmName, ArmFacts]:
    return {
        arm: ArmFacts(2**30 if arm.side == "service" else None, 98304 if arm == SERVICE_INT8 else None, 50.0)
        for arm in SECONDS
    }


def test_ratios_are_medians_of_the_ratios_within_a_round() -> None:
    found = numbers(turns(), facts())
    none, int8 = found["ratios"]["none"], found["ratios"]["int8"]
    assert none["service_over_engine"] == pytest.approx(100 / 120)  # of 100/120, 120/100, 80/100
    assert int8["service_over_engine"] == pytest.approx(1.0)  # of 1, 2/3, 1.2
    assert int8["service_over_none"] == pytest.approx(1.5)  # of 1.5, 5/3, 1.5
    assert int8["engine_over_none"] == pytest.approx(1.25)  # of 1.25, 3, 1
    assert none["service_over_none"] == none["engine_over_none"] == 1.0
    assert found["service_over_engine"] == pytest.approx(100 / 120)  # the lower one


def test_an_arm_has_medians_and_the_range_of_its_speed() -> None:
    arm = numbers(turns(), facts())["arms"]["service/none"]
    assert (arm["tokens_per_s"], arm["tokens_per_s_min"], arm["tokens_per_s_max"]) == (100, 80, 120)
    assert (arm["seconds"], arm["front_cpu_s"], arm["weight_bytes"], arm["start_s"]) == (12, 1.2, 2**30, 50)
    assert arm["cache_tokens"] is None


def test_raw_rounds_are_all_there() -> None:
    rounds = numbers(turns(), facts())["rounds"]
    assert len(rounds) == 12
    assert rounds[0] == {
        "round": 1, "arm": "service/none", "seconds": 12.0, "tokens": 1200, "tokens_per_s": 100.0, "front_cpu_s": 1.2
    }  # fmt: skip


def test_what_was_not_measured_has_no_ratio() -> None:
    only = [turn for turn in turns() if turn.arm == SERVICE_INT8]
    found = numbers(only, {SERVICE_INT8: facts()[SERVICE_INT8]})
    assert found["service_over_engine"] is None
    assert found["ratios"] == {
        "int8": {"service_over_engine": None, "service_over_none": None, "engine_over_none": None}
    }


def test_the_table_has_a_row_an_arm() -> None:
    out = StringIO()
    Console(file=out, width=130).print(table(numbers(turns(), facts()), "tiny"))
    rows = {line.split()[1]: line for line in out.getvalue().splitlines() if "/none" in line or "/int8" in line}
    assert list(rows) == [str(arm) for arm in SECONDS]
    assert "1.00 GiB" in rows["service/int8"]
    assert "1.500x" in rows["service/int8"]
    assert "98,304 tok" in rows["service/int8"]
    assert "80 - 120" in rows["service/none"]
    assert "0.833x" in rows["service/none"]
    assert "GiB" not in rows["engine/int8"]
