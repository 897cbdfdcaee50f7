"""Runs -> figures: panels over a common axis of steps, one line a run. Knows nothing of files or pages."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator, PercentFormatter, StrMethodFormatter

from flashrl_trainer.report_run import Run
from flashrl_trainer.report_style import COLORS, INK, plain_axes
from flashrl_trainer.units import format_bytes


@dataclass(frozen=True)
class Panel:
    """One key of metrics.jsonl; `over` picks the steps where it means something."""

    key: str
    title: str
    unit: Literal["number", "percent", "bytes"] = "number"
    over: Literal["trained", "synced", "evaluated"] = "trained"
    dashed: str = ""  # a second key to compare with


FIGURES: dict[str, tuple[Panel, ...]] = {
    "reward": (
        Panel("reward/mean", "Mean reward of all samples of a step"),
        Panel(
            "eval/accuracy",
            "Held-out problems solved: sampled with 95 % intervals, greedy dashed",
            "percent",
            "evaluated",
            "eval/greedy",
        ),
    ),
    "mismatch": (
        Panel("mismatch/k3_kl", "k3 KL, sampler against trainer"),
        Panel("mismatch/mean_abs_logprob", "Mean difference of log-probabilities"),
        Panel("tis/capped_fraction", "Tokens whose importance weight is at the cap", "percent"),
    ),
    "response": (
        Panel("response/mean_tokens", "Tokens in a response"),
        Panel("sampling/truncated_fraction", "Responses cut at the limit", "percent"),
        Panel("entropy", "Entropy of the policy, nats a token"),
    ),
    "sync": (
        Panel(
            "sync/wire_bytes", "Bytes sent for an update (full weights dashed, snapshots squared)", "bytes", "synced"
        ),
        Panel("sync/pause_ms", "Pause of sampling for an update, ms", over="synced"),
    ),
    "speed": (
        Panel("perf/step_seconds", "Seconds a step"),
        Panel("perf/rollout_tokens_per_s", "Sampled tokens a second"),
        Panel("perf/train_tokens_per_s", "Trained tokens a second"),
    ),
}


def draw(panels: Sequence[Panel], runs: Sequence[Run]) -> Figure:
    """One figure, its panels below each other."""
    figure = Figure(figsize=(8, 0.4 + 2.3 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for panel, axis in zip(panels, axes, strict=True):
        for index, run in enumerate(runs):
            _line(
                axis,
                panel,
                run,
                COLORS[index % len(COLORS)],
                shift=0.25 * (index - (len(runs) - 1) / 2) if len(runs) > 1 else None,
            )
        _style(axis, panel)
    axes[-1].set_xlabel("step", color=INK)
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(runs) > 1:
        handles, names = axes[0].get_legend_handles_labels()
        figure.legend(handles, names, frameon=False, fontsize=9, ncols=3, loc="outside upper left")
    return figure


def _line(axis: Axes, panel: Panel, run: Run, color: str, shift: float | None) -> None:
    """Bands of several runs would hide each other, so they get bars instead, `shift` steps beside their points."""
    steps, values = getattr(run, panel.over)(panel.key)
    marker = "o" if panel.over == "evaluated" or len(steps) < 3 else ""
    axis.plot(steps, values, color=color, linewidth=1.8, marker=marker, markersize=4, label=run.name)
    if panel.dashed:
        axis.plot(*getattr(run, panel.over)(panel.dashed), color=color, linewidth=1.2, linestyle="--")
    if panel.over == "evaluated":
        _intervals(axis, run, steps, color, shift)
    if panel.unit == "bytes":
        _full_weights_and_snapshots(axis, run, color)


def _intervals(axis: Axes, run: Run, steps: Sequence[int], color: str, shift: float | None) -> None:
    found = [run.eval_interval(index) for index in range(len(steps))]
    known = [(step, interval) for step, interval in zip(steps, found, strict=True) if interval]
    places, lows, highs = [step for step, _ in known], [low for _, (low, _) in known], [high for _, (_, high) in known]
    if shift is not None:
        axis.vlines([place + shift for place in places], lows, highs, color=color, linewidth=1.4, alpha=0.7)
    else:
        axis.fill_between(places, lows, highs, color=color, alpha=0.18, linewidth=0)


def _full_weights_and_snapshots(axis: Axes, run: Run, color: str) -> None:
    axis.plot(*run.synced("sync/full_bytes"), color=color, linewidth=1.2, linestyle="--")
    steps, sent = run.synced("sync/wire_bytes")
    _, kinds = run.synced("sync/kind")
    squares = [(step, size) for step, size, kind in zip(steps, sent, kinds, strict=True) if kind]
    axis.plot([step for step, _ in squares], [size for _, size in squares], "s", color=color, markersize=5)


def _style(axis: Axes, panel: Panel) -> None:
    plain_axes(axis, panel.title, grid="y")
    if panel.unit == "bytes":
        _whole_decades(axis)
        return
    if axis.dataLim.y0 >= 0:
        axis.set_ylim(bottom=0)
    if panel.unit == "percent":
        axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    elif axis.dataLim.y1 >= 1000:
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def _whole_decades(axis: Axes) -> None:
    """A logarithmic axis, because a delta may be a thousandth of the full weights."""
    sizes = [size for line in axis.lines for size in np.asarray(line.get_ydata(), dtype=float) if size > 0]
    axis.set_yscale("log")
    if sizes:
        axis.set_ylim(10 ** math.floor(math.log10(min(sizes))), 10 ** math.ceil(math.log10(max(sizes))))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_bytes(value)))
    axis.yaxis.set_minor_locator(NullLocator())
