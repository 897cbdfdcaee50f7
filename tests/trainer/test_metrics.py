"""A run's rows: which are refused, what is on disk at any time, and that no logging service can end a run.

Knows nothing of how the numbers come about.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from flashrl_trainer.config import TrainerConfig, load_config
from flashrl_trainer.metric_rows import NULLABLE
from flashrl_trainer.metrics import METRIC_KEYS, MetricsWriter, complete_row, start_wandb
from flashrl_trainer.samples import Completion, Group, Prompt, Sample

Row = dict[str, float | None]


def full_row(step: int, **changes: float | None) -> Row:
    row: Row = dict.fromkeys(METRIC_KEYS, 0.5)
    return (
        row | {"step": step, "weight_version": step} | {key.replace("__", "/"): value for key, value in changes.items()}
    )


@dataclass
class Recording:
    """Display and mirror in one, that remember what they were given."""

    rows: list[Row] = field(default_factory=list)
    closed: bool = False

    def phase(self, name: str) -> Any:
        return lambda done, total: None

    def row(self, row: Row) -> None:
        self.rows.append(row)

    log = row

    def note(self, text: str) -> None:
        raise AssertionError(text)

    def close(self) -> None:
        self.closed = True


def config(mode: str = "off") -> TrainerConfig:
    settings = ["model.path=m", "data.train=t", "data.eval=e", f"run.wandb={mode}", "run.samples_logged=3"]
    return load_config(None, settings, {})


def writer(run_dir: Path, after: int = 0, display: Any = None, mirror: Any = None) -> MetricsWriter:
    """Begun after step `after`."""
    metrics = MetricsWriter(
        run_dir,
        config(),
        open_display=lambda config, step: display or Recording(),
        open_mirror=lambda config, run_dir, warn: mirror,
    )
    metrics.begin(after)
    return metrics


def on_disk(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_row_is_on_disk_as_soon_as_it_is_written_and_goes_everywhere(tmp_path: Path) -> None:
    display, mirror = Recording(), Recording()
    with writer(tmp_path / "run", display=display, mirror=mirror) as metrics:
        metrics.write(full_row(1, eval__accuracy=None))
        assert on_disk(tmp_path / "run/metrics.jsonl") == [full_row(1, eval__accuracy=None)]
        assert display.rows == mirror.rows == [full_row(1, eval__accuracy=None)]
    assert display.closed
    assert mirror.closed


def test_rows_have_every_key_of_the_interface_in_its_order() -> None:
    extra: Row = {"extra/key": 1.0}
    assert tuple(complete_row(extra | full_row(3))) == (*METRIC_KEYS, "extra/key")


def test_what_was_not_evaluated_is_null() -> None:
    row = full_row(3)
    del row["eval/accuracy"], row["eval/greedy"]
    assert complete_row(row) == full_row(3, eval__accuracy=None, eval__greedy=None)


def test_the_row_before_training_needs_its_scores_only() -> None:
    row = complete_row({"step": 0, "weight_version": 0, "eval/accuracy": 0.25, "reward/mean": 0.25})
    nulls = {"eval/greedy": None, "perf/mfu": None}
    assert row == dict.fromkeys(METRIC_KEYS, 0.0) | {"eval/accuracy": 0.25, "reward/mean": 0.25} | nulls


@pytest.mark.parametrize("key", METRIC_KEYS)
def test_null_is_for_what_may_have_no_value(key: str) -> None:
    row = full_row(3) | {key: None}
    if key in NULLABLE:
        assert complete_row(row) == row
    else:
        with pytest.raises(ValueError, match=f"{key} is None"):
            complete_row(row)


def test_a_step_without_an_update_has_zeros_for_it() -> None:
    row = {key: value for key, value in full_row(3).items() if not key.startswith("sync/")}
    complete = complete_row(row)
    assert {complete[key] for key in METRIC_KEYS if key.startswith("sync/")} == {0.0}


@pytest.mark.parametrize("key", [key for key in METRIC_KEYS if not key.startswith("eval/")])
def test_a_missing_key_is_named(key: str) -> None:
    row = full_row(3)
    del row[key]
    with pytest.raises(ValueError, match=f"no {key}$"):
        complete_row(row)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), None, "0.5"])
def test_what_is_no_finite_number_is_named_and_not_written(tmp_path: Path, value: Any) -> None:
    with writer(tmp_path) as metrics:
        with pytest.raises(ValueError, match=rf"^metrics of step 3: entropy is {value}$"):
            metrics.write(full_row(3, entropy=value))
        assert (tmp_path / "metrics.jsonl").read_text() == ""


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_evaluation_may_be_null_but_not_nan(value: float) -> None:
    with pytest.raises(ValueError, match="eval/accuracy is"):
        complete_row(full_row(3, eval__accuracy=value))


def test_a_resumed_run_drops_later_steps_and_a_line_cut_short(tmp_path: Path) -> None:
    with writer(tmp_path) as metrics:
        for step in range(5):
            metrics.write(full_row(step))
    for name in ("metrics.jsonl", "samples.jsonl"):
        with (tmp_path / name).open("a") as file:
            file.write('{"step": 5, "weight_ver')
    with writer(tmp_path, after=2) as metrics:
        metrics.write(full_row(3, loss=7.0))
    assert on_disk(tmp_path / "metrics.jsonl") == [full_row(0), full_row(1), full_row(2), full_row(3, loss=7.0)]
    assert on_disk(tmp_path / "samples.jsonl") == []


def test_a_cut_inside_a_character_is_tolerated_too(tmp_path: Path) -> None:
    (tmp_path / "samples.jsonl").write_bytes(b'{"step": 1, "text": "ok"}\n{"step": 2, "text": "\xe2\x82')
    writer(tmp_path, after=9).close()
    assert on_disk(tmp_path / "samples.jsonl") == [{"step": 1, "text": "ok"}]


def test_a_whole_last_row_without_its_line_break_is_kept(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps(full_row(1)))
    with writer(tmp_path, after=1) as metrics:
        metrics.write(full_row(2))
    assert on_disk(tmp_path / "metrics.jsonl") == [full_row(1), full_row(2)]


def test_a_broken_row_in_the_middle_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl line 2: not JSON$"):
        writer(tmp_path, after=2)


def test_a_run_that_begins_anew_has_no_rows_of_before(tmp_path: Path) -> None:
    with writer(tmp_path) as metrics:
        metrics.write(full_row(0))
    with writer(tmp_path, after=0) as metrics:
        metrics.write(full_row(0, loss=7.0))
    assert on_disk(tmp_path / "metrics.jsonl") == [full_row(0, loss=7.0)]


def test_the_resolved_configuration_is_beside_the_rows(tmp_path: Path) -> None:
    writer(tmp_path / "run").close()
    assert load_config(tmp_path / "run/config.toml", [], {}) == config()


def test_a_rank_that_does_not_record_leaves_nothing(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / "run", config(), active=False) as metrics:
        metrics.begin(0)
    assert list(tmp_path.iterdir()) == []


@dataclass
class Sampled:
    groups: list[Group]


def group(name: str, *texts: str) -> Group:
    samples = [Sample(Completion([1, 2], [-0.1, -0.2], text, "stop", [(4, 0, 2)]), 1.0, 0.75) for text in texts]
    return Group(Prompt(name, "Q?", "72"), [9], samples, 4)


def test_samples_come_from_as_many_groups_as_there_are(tmp_path: Path) -> None:
    with writer(tmp_path) as metrics:
        metrics.samples(7, Sampled([group("a", "a1", "a2"), group("b", "b1 \u2028 ü", "b2")]))
        rows = on_disk_lines(tmp_path / "samples.jsonl")
    assert [row["text"] for row in rows] == ["a1", "b1 \u2028 ü", "a2"]
    assert rows[0] == {
        "step": 7,
        "id": "a",
        "prompt": "Q?",
        "answer": "72",
        "text": "a1",
        "reward": 1.0,
        "shaped_reward": 0.75,
        "tokens": 2,
        "finish_reason": "stop",
        "weight_versions": [[4, 0, 2]],
    }


def on_disk_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]


def test_wandb_off_is_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "k")
    assert start_wandb(config("off"), tmp_path, pytest.fail) is None


def test_without_a_key_wandb_writes_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    mirror = start_wandb(config("auto"), tmp_path, pytest.fail)
    assert mirror is not None
    mirror.log(full_row(1, eval__accuracy=None))
    mirror.close()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


class BrokenWandb:
    """A module `wandb` whose runs raise at what they are told to."""

    Settings = dict

    def __init__(self, *broken: str) -> None:
        self._broken = broken

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> "BrokenWandb":
            if name in self._broken:
                raise RuntimeError(f"{name}\nfailed")
            return self

        return call


@pytest.mark.parametrize(
    ("broken", "starts"), [("init", False), ("define_metric", False), ("log", True), ("finish", True)]
)
def test_any_failure_of_wandb_is_warned_of_once_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str, starts: bool
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", BrokenWandb(broken))
    warnings: list[str] = []
    mirror = start_wandb(config("online"), tmp_path / "run", warnings.append)
    assert (mirror is not None) == starts
    with writer(tmp_path / "run", mirror=mirror) as metrics:
        metrics.write(full_row(1))
        metrics.write(full_row(2))
    assert warnings == [f"Weights & Biases is off from here: {broken} failed"]
    assert len(on_disk(tmp_path / "run/metrics.jsonl")) == 2


def test_a_missing_wandb_is_warned_of_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    warnings: list[str] = []
    assert start_wandb(config("offline"), tmp_path, warnings.append) is None
    assert len(warnings) == 1
