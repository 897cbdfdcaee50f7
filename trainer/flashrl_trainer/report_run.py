"""A run's rows as series and as the numbers that sum it up. Knows nothing of files, plots or pages."""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean, median

from flashrl_trainer.eval_scores import wilson_interval
from flashrl_trainer.metric_rows import Row
from flashrl_trainer.units import format_bytes, format_seconds


@dataclass(frozen=True)
class Run:
    """Rows of metrics.jsonl, perhaps of an earlier release, and what the page says of their origin."""

    name: str
    rows: list[Row]
    eval_samples: int  # samples behind one eval/accuracy, 0 if unknown
    config_text: str

    def trained(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of `key` over the training steps."""
        return _series([row for row in self.rows if row["step"]], key)

    def synced(self, key: str) -> tuple[list[int], list[float]]:
        """The same over the steps that sent an update."""
        return _series([row for row in self.rows if row["step"] and row.get("sync/full_bytes")], key)

    def evaluated(self, key: str = "eval/accuracy") -> tuple[list[int], list[float]]:
        """The same over the rows where `key` is not null, step 0 included."""
        return _series([row for row in self.rows if row.get(key) is not None], key)

    def eval_interval(self, row_index: int) -> tuple[float, float] | None:
        """95 % interval of the `row_index`-th evaluation."""
        evaluated = [row for row in self.rows if row.get("eval/accuracy") is not None]
        row = evaluated[row_index]
        low, high = row.get("eval/accuracy_low"), row.get("eval/accuracy_high")
        if low is not None and high is not None:
            return low, high
        count = int(row.get("eval/samples") or self.eval_samples)
        accuracy = row["eval/accuracy"]
        return wilson_interval(accuracy, count) if count and accuracy is not None else None


def summary(run: Run) -> dict[str, str]:
    """What the run did, for a table: name of a number -> its text."""
    return {name: describe(run) for name, describe in _SUMMARY.items()}


def _series(rows: list[Row], key: str) -> tuple[list[int], list[float]]:
    points = [(int(row["step"] or 0), value) for row in rows if (value := row.get(key)) is not None]
    return [step for step, _ in points], [value for _, value in points]


def _accuracy(run: Run) -> str:
    _, values = run.evaluated()
    if not values:
        return "not evaluated"
    return f"{_with_interval(values[0], run.eval_interval(0))} → {_with_interval(values[-1], run.eval_interval(-1))}"


def _with_interval(value: float, interval: tuple[float, float] | None) -> str:
    return f"{value:.1%}" + (f" ({interval[0]:.1%} to {interval[1]:.1%})" if interval else "")


def _greedy(run: Run) -> str:
    _, values = run.evaluated("eval/greedy")
    return f"{values[0]:.1%} → {values[-1]:.1%}" if values else "not evaluated"


def _reward(run: Run) -> str:
    _, values = run.trained("reward/mean")
    failed = sum(run.trained("reward/failed")[1])
    return f"{values[0]:.3f} → {values[-1]:.3f}" + (f", {failed:.0f} rewards failed" if failed else "")


def _updates(run: Run) -> str:
    _, kinds = run.synced("sync/kind")
    snapshots = sum(1 for kind in kinds if kind)
    return f"deltas: {len(kinds) - snapshots}, snapshots: {snapshots}"


def _bytes(run: Run) -> str:
    _, wire = run.synced("sync/wire_bytes")
    _, full = run.synced("sync/full_bytes")
    if not wire:
        return "no update"
    return f"{format_bytes(fmean(wire))} of {format_bytes(fmean(full))} ({fmean(wire) / fmean(full):.1%})"


def _pause(run: Run) -> str:
    _, pauses = run.synced("sync/pause_ms")
    return f"{fmean(pauses):.1f} ms mean, {max(pauses):.1f} ms longest" if pauses else "no update"


def _last(key: str) -> Callable[[Run], str]:
    return lambda run: f"{values[-1]:.0f}" if (values := run.trained(key)[1]) else "not recorded"


def _typical(key: str, digits: str) -> Callable[[Run], str]:
    return lambda run: format(median(values), digits) if (values := run.trained(key)[1]) else "not recorded"


_SUMMARY: dict[str, Callable[[Run], str]] = {
    "accuracy, sampled (95 % interval)": _accuracy,
    "accuracy, greedy": _greedy,
    "mean reward, first → last step": _reward,
    "steps": _last("step"),
    "weight version at the end": _last("weight_version"),
    "updates": _updates,
    "mean bytes sent, of full weights": _bytes,
    "pause of sampling": _pause,
    "time in steps": lambda run: format_seconds(sum(run.trained("perf/step_seconds")[1])),
    "sampling, tokens/s (median)": _typical("perf/rollout_tokens_per_s", ",.0f"),
    "training, tokens/s (median)": _typical("perf/train_tokens_per_s", ",.0f"),
    "k3 KL, sampler against trainer (median)": _typical("mismatch/k3_kl", ".2g"),
    "tokens at the cap (median)": _typical("tis/capped_fraction", ".2%"),
}
