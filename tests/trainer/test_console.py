"""What a person sees of a run, on a terminal and in a file. Knows nothing of how the numbers come about."""

import io

import pytest
from rich.console import Console

from flashrl_trainer.console import ConsoleDisplay
from flashrl_trainer.metrics import METRIC_KEYS
from flashrl_trainer.units import format_bytes, format_seconds

Row = dict[str, float | None]


def full_row(step: int, **changes: float | None) -> Row:
    row: Row = dict.fromkeys(METRIC_KEYS, 0.5)
    row |= {"step": step, "weight_version": step}
    return row | {key.replace("__", "/"): value for key, value in changes.items()}


def shown(total_steps: int | None, rows: list[Row], seconds_a_row: float) -> list[str]:
    file, now = io.StringIO(), [100.0]
    display = ConsoleDisplay(total_steps, console=Console(file=file, width=200), clock=lambda: now[0])
    for row in rows:
        now[0] += seconds_a_row
        display.row(row)
    display.close()
    return [line.rstrip() for line in file.getvalue().splitlines()]


def test_the_console_has_one_line_a_step_under_a_legend_and_a_header() -> None:
    row = full_row(
        2,
        reward__mean=0.3125,
        eval__accuracy=0.475,
        mismatch__k3_kl=0.00123,
        tis__capped_fraction=0.004,
        response__mean_tokens=57.25,
        sync__wire_bytes=481_000,
        sync__full_bytes=6_500_000,
        sync__pause_ms=3.25,
        perf__step_seconds=8.3,
    )
    lines = shown(10, [full_row(0, eval__accuracy=0.25), full_row(1, eval__accuracy=None), row], seconds_a_row=4)
    legend, (header, first, second, third) = " ".join(lines[:3]), lines[3:7]
    assert " ".join(header.split()) == "step weights reward eval KL capped tokens update pause time left"
    assert all(f"{column}: " in legend for column in header.split()[1:])
    assert " ".join(first.split()) == "0/10 v0 25.0% before training"
    assert "%" not in second[:33]
    # 12 s for the first two steps, so 48 s for the eight to go
    cells = "2/10 v2 0.312 47.5% 0.00123 0.40% 57.2 481.0 kB of 6.5 MB 3.2 ms 8.3 s 48.0 s"
    assert " ".join(third.split()) == cells


def test_without_a_number_of_steps_there_is_no_estimate() -> None:
    assert shown(None, [full_row(1)], seconds_a_row=4)[-1].split()[-1] == "?"


def test_the_bar_shows_phase_and_progress_on_a_terminal() -> None:
    file = io.StringIO()
    display = ConsoleDisplay(4, console=Console(file=file, force_terminal=True, width=200))
    display.phase("sampling")(48, 64)
    display.phase("publishing")(1_500_000, 0)
    display.close()
    assert "publishing 1.5 MB" in file.getvalue()


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (2.5e9, "2.5 GB")])
def test_bytes_read_well(count: float, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize(("seconds", "text"), [(0.04, "0.0 s"), (59.94, "59.9 s"), (185, "3:05"), (7209, "2:00:09")])
def test_durations_read_well(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
