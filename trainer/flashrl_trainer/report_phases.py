"""Runs -> one figure of where the time of a step goes. Knows nothing of files or pages."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from flashrl_trainer.report_run import Run
from flashrl_trainer.report_style import COLORS, INK, plain_axes
from flashrl_trainer.units import format_seconds

PHASES = {
    "sampling": "perf/sampling_seconds",
    "training": "perf/training_seconds",
    "publishing": "perf/publishing_seconds",
    "evaluating": "perf/evaluating_seconds",
}


def mean_seconds(run: Run) -> dict[str, float]:
    """Seconds a step by phase, over all training steps; empty for a run that did not record them."""
    steps = len(run.trained("step")[1])
    totals = {name: sum(run.trained(key)[1]) for name, key in PHASES.items()}
    return {name: total / steps for name, total in totals.items()} if totals["sampling"] else {}


def draw_phases(runs: Sequence[Run]) -> Figure | None:
    """A bar of phases for each run, and for a single run its steps too; None where no run recorded them."""
    known = [(run, means) for run in runs if (means := mean_seconds(run))]
    if not known:
        return None
    heights = [0.9 + 0.45 * len(known), *([2.3] if len(known) == 1 else [])]
    figure = Figure(figsize=(8, 0.6 + sum(heights)), layout="constrained")
    axes = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    _bars(axes[0], known)
    if len(known) == 1:
        _stack(axes[1], known[0][0])
    return figure


def _bars(axis: Axes, known: Sequence[tuple[Run, dict[str, float]]]) -> None:
    names = [run.name for run, _ in known]
    lefts = [0.0] * len(known)
    for color, phase in zip(COLORS, PHASES, strict=False):
        widths = [means[phase] for _, means in known]
        axis.barh(range(len(known)), widths, left=lefts, color=color, height=0.6, label=phase)
        lefts = [left + width for left, width in zip(lefts, widths, strict=True)]
    for row, (_, means) in enumerate(known):
        axis.text(lefts[row], row, f" {format_seconds(sum(means.values()))}", va="center", fontsize=9, color=INK)
    axis.set_yticks(range(len(known)), names)
    axis.invert_yaxis()
    axis.margins(x=0.12)
    plain_axes(axis, "Mean seconds a step by phase", grid="x")
    axis.legend(
        frameon=False, fontsize=9, ncols=len(PHASES), loc="upper left", bbox_to_anchor=(0, -0.12 - 0.2 / len(known))
    )


def _stack(axis: Axes, run: Run) -> None:
    rows = [row for row in run.rows if row["step"]]
    steps = [int(row["step"] or 0) for row in rows]
    bottoms = [0.0] * len(rows)
    for color, key in zip(COLORS, PHASES.values(), strict=False):
        heights = [row.get(key) or 0.0 for row in rows]
        axis.bar(steps, heights, bottom=bottoms, width=1.0, color=color, linewidth=0)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    plain_axes(axis, "Seconds of each step", grid="y")
    axis.set_xlabel("step", color=INK)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.margins(x=0)
