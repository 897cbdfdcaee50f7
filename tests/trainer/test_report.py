"""A run's report: its numbers, that it stands alone, and how it refuses. Knows nothing of training."""

import base64
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.lines import Line2D

from flashrl_trainer.eval_scores import wilson_interval
from flashrl_trainer.metrics import METRIC_KEYS
from flashrl_trainer.report import read_run, write_report
from flashrl_trainer.report_phases import draw_phases, mean_seconds
from flashrl_trainer.report_plots import FIGURES, draw
from flashrl_trainer.report_run import summary

Row = dict[str, float | None]
PNG = b"\x89PNG\r\n\x1a\n"


def row(step: int, **changes: float | None) -> Row:
    values: Row = dict.fromkeys(METRIC_KEYS, 0.5)
    values |= {"step": step, "weight_version": step, "eval/accuracy": None, "eval/greedy": None, "sync/kind": 0}
    return values | {key.replace("__", "/"): value for key, value in changes.items()}


def write(folder: Path, rows: list[Row], config: str = "[eval]\nproblems = 100\nsamples_per_problem = 1\n") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rows))
    (folder / "config.toml").write_text(config)
    return folder


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    size: dict[str, Any] = {"sync__full_bytes": 1e6, "perf__step_seconds": 30.0}
    rows = [
        row(0, eval__accuracy=0.5, eval__greedy=0.4, sync__full_bytes=0),
        row(1, sync__wire_bytes=1e4, sync__pause_ms=2.0, reward__mean=0.25, perf__rollout_tokens_per_s=900, **size),
        row(2, sync__wire_bytes=4e4, sync__pause_ms=7.0, sync__kind=1, perf__rollout_tokens_per_s=2000, **size),
        row(3, sync__wire_bytes=1e4, sync__pause_ms=3.0, perf__rollout_tokens_per_s=1000, **size),
        # interrupted before its update went out
        row(4, sync__wire_bytes=0, sync__pause_ms=0, sync__full_bytes=0, perf__step_seconds=30, eval__accuracy=0.9)
        | {"eval/greedy": 0.8, "reward/mean": 0.75, "tis/capped_fraction": 0.0, "perf/rollout_tokens_per_s": 1100},
    ]
    return write(tmp_path / "my run & co", rows)


def test_the_summary_has_the_run_in_numbers(run_dir: Path) -> None:
    assert summary(read_run(run_dir)) == {
        "accuracy, sampled (95 % interval)": "50.0% (40.4% to 59.6%) → 90.0% (82.6% to 94.5%)",
        "accuracy, greedy": "40.0% → 80.0%",
        "mean reward, first → last step": "0.250 → 0.750",
        "steps": "4",
        "weight version at the end": "4",
        "updates": "deltas: 2, snapshots: 1",
        "mean bytes sent, of full weights": "20.0 kB of 1.0 MB (2.0%)",
        "pause of sampling": "4.0 ms mean, 7.0 ms longest",
        "time in steps": "2:00",
        "sampling, tokens/s (median)": "1,050",
        "training, tokens/s (median)": "0",
        "k3 KL, sampler against trainer (median)": "0.5",
        "tokens at the cap (median)": "50.00%",
    }


def test_the_number_of_samples_in_the_rows_beats_the_settings(run_dir: Path) -> None:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    with_counts = [line | {"eval/samples": 400} for line in rows]
    run = read_run(write(run_dir, with_counts))
    assert run.eval_interval(0) == pytest.approx(wilson_interval(0.5, 400))


def test_the_interval_in_the_rows_beats_both(run_dir: Path) -> None:
    """It knows which samples belong to one problem."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    run = read_run(write(run_dir, [line | {"eval/accuracy_low": 0.3, "eval/accuracy_high": 0.7} for line in rows]))
    assert run.eval_interval(-1) == (0.3, 0.7)


def test_a_run_of_an_earlier_release_can_be_read(tmp_path: Path) -> None:
    rows = [{"step": step, "weight_version": step, "reward/mean": step / 10} for step in (1, 2)]
    folder = write(tmp_path / "old", [dict(line) for line in rows])
    numbers = summary(read_run(folder))
    assert numbers["mean reward, first → last step"] == "0.100 → 0.200"
    assert numbers["training, tokens/s (median)"] == "not recorded"
    assert write_report([folder]).is_file()


def phased(folder: Path, sampling: float) -> Path:
    seconds: dict[str, float | None] = {
        "perf/sampling_seconds": sampling,
        "perf/training_seconds": 3.0,
        "perf/publishing_seconds": 1.0,
    }
    rows = [row(0), row(1) | seconds, row(2) | seconds | {"perf/evaluating_seconds": 4.0}]
    return write(folder, rows)


def test_time_is_split_by_phase_for_every_run(tmp_path: Path, run_dir: Path) -> None:
    runs = [read_run(phased(tmp_path / "fast", 2.0)), read_run(phased(tmp_path / "slow", 6.0))]
    assert mean_seconds(runs[0]) == {"sampling": 2.0, "training": 3.0, "publishing": 1.0, "evaluating": 2.0}
    figure = draw_phases([*runs, read_run(run_dir)])
    assert figure is not None
    (axis,) = figure.axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ["fast", "slow"], "the third recorded none"
    assert [text.get_text() for text in axis.texts] == [" 8.0 s", " 12.0 s"]
    assert draw_phases([read_run(run_dir)]) is None
    index = write_report([tmp_path / "fast"])
    assert (tmp_path / "fast/report/phases.png").read_bytes().startswith(PNG)
    assert "Where the time goes" in index.read_text("utf-8")


def test_rewards_that_failed_are_said(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", [row(1, reward__failed=2.0), row(2, reward__failed=1.0)])
    assert summary(read_run(folder))["mean reward, first → last step"] == "0.500 → 0.500, 3 rewards failed"


def test_without_a_known_number_of_samples_there_is_no_interval(run_dir: Path) -> None:
    (run_dir / "config.toml").unlink()
    text = summary(read_run(run_dir))["accuracy, sampled (95 % interval)"]
    assert text == "50.0% → 90.0%"


def test_a_run_without_evaluation_or_update_has_a_report_too(tmp_path: Path) -> None:
    folder = write(tmp_path / "bare", [row(1, sync__full_bytes=0)])
    numbers = summary(read_run(folder))
    assert numbers["accuracy, sampled (95 % interval)"] == numbers["accuracy, greedy"] == "not evaluated"
    assert numbers["pause of sampling"] == numbers["mean bytes sent, of full weights"] == "no update"
    assert write_report([folder]).is_file()


def test_the_page_embeds_the_images_that_lie_beside_it_and_needs_nothing_else(run_dir: Path) -> None:
    index = write_report([run_dir])
    assert index == run_dir / "report/index.html"
    page = index.read_text("utf-8")
    embedded = [base64.b64decode(data) for data in re.findall(r'src="data:image/png;base64,([^"]+)"', page)]
    assert embedded == [(run_dir / f"report/{name}.png").read_bytes() for name in FIGURES]
    assert all(image.startswith(PNG) for image in embedded)
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "<h1>my run &amp; co</h1>" in page
    assert "problems = 100" in page


def points(line: Line2D) -> list[list[float]]:
    drawn: list[list[float]] = np.asarray(line.get_xydata()).tolist()
    return drawn


def test_plots_show_what_the_rows_say(run_dir: Path) -> None:
    run = read_run(run_dir)
    reward, accuracy = draw(FIGURES["reward"], [run]).axes
    assert points(reward.lines[0]) == [[1, 0.25], [2, 0.5], [3, 0.5], [4, 0.75]]
    assert points(accuracy.lines[0]) == [[0, 0.5], [4, 0.9]]
    heights = np.asarray(accuracy.collections[0].get_paths()[0].vertices)[:, 1].tolist()
    assert (min(heights), max(heights)) == pytest.approx((wilson_interval(0.5, 100)[0], wilson_interval(0.9, 100)[1]))
    sent, full, snapshots = draw(FIGURES["sync"], [run]).axes[0].lines
    assert points(sent) == [[1, 1e4], [2, 4e4], [3, 1e4]]
    assert points(full) == [[1, 1e6], [2, 1e6], [3, 1e6]]
    assert points(snapshots) == [[2, 4e4]]


def test_several_runs_are_lines_in_a_plot_and_columns_in_the_table(run_dir: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(run_dir, other)
    index = write_report([run_dir, other], tmp_path / "both")
    assert index == tmp_path / "both/index.html"
    assert "<th>my run &amp; co</th><th>other</th>" in index.read_text("utf-8")
    assert len(draw(FIGURES["reward"], [read_run(run_dir), read_run(other)]).axes[0].lines) == 2


def test_a_run_that_is_still_writing_can_be_read(run_dir: Path) -> None:
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "rew')
    assert len(read_run(run_dir).rows) == 5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"metrics\.jsonl: No such file or directory$"),
        ("", r"metrics\.jsonl: no training step yet$"),
        (json.dumps(row(0)) + "\n", r"metrics\.jsonl: no training step yet$"),
        ("garbage\n", r"metrics\.jsonl line 1: not JSON$"),
        ("[1]\n", r"metrics\.jsonl line 1: not a JSON object$"),
        ('{"step": 1}\n', r"metrics\.jsonl: metrics of step 1: no weight_version, reward/mean$"),
        (json.dumps(row(1, loss=float("nan"))) + "\n", r"metrics\.jsonl: metrics of step 1: loss is nan$"),
    ],
)
def test_what_is_no_run_is_refused_in_one_line_and_nothing_is_written(
    tmp_path: Path, content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        write_report([tmp_path])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "report").exists()


def test_settings_that_cannot_be_read_are_named(run_dir: Path) -> None:
    (run_dir / "config.toml").write_text("[eval")
    with pytest.raises(ValueError, match=r"config\.toml: "):
        write_report([run_dir])
