"""A measurement for people and for the service: table, JSON and the file of layers to leave in bf16.

Knows what the numbers are called; knows nothing of how they were measured.
"""

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from flashrl_rollout.measure.layer_kinds import LayerKind
from flashrl_rollout.measure.measurer import DECODE_ROWS, ROW_COUNTS, KindReport, PrecisionReport, summary
from flashrl_rollout.measure.token_scores import Mismatch
from flashrl_rollout.precision_file import precision_table

_DECODE = " and ".join(map(str, DECODE_ROWS))


def table(reports: Sequence[PrecisionReport], title: str) -> Table:
    """A row a kind and precision; times are us a layer, bf16 / 8-bit with the activations' quantization."""
    made = Table(title=title, title_justify="left", caption=f"speed-up: at {_DECODE} rows", caption_justify="left")
    for name in ("precision", "layers", "N x K", "k3 KL", "mean |dlogp|"):
        made.add_column(name, justify="left" if name in ("precision", "layers") else "right", no_wrap=True)
    for rows in ROW_COUNTS:
        made.add_column(f"us at {rows}", justify="right", no_wrap=True)
    made.add_column("speed-up", justify="right")
    made.add_column("choice")
    for report in reports:
        for kind in report.kinds:
            made.add_row(*_row(report, kind))
        made.add_row(report.quantization, "all", "", *_numbers(report.all_kinds))
        made.add_row(report.quantization, "chosen", "", *_numbers(report.chosen), end_section=True)
    return made


def _row(report: PrecisionReport, kind: KindReport) -> list[str]:
    times = [f"{time.bf16_us:.0f} / {time.quantized_us:.0f}" for time in kind.times] or [""] * len(ROW_COUNTS)
    speedup = "" if kind.speedup is None else f"{kind.speedup:.2f}"
    choice = "bf16" if kind.kind in report.choice.kept else report.quantization
    shape = f"{kind.rows} x {kind.columns}"
    return [report.quantization, kind.kind, shape, *_numbers(kind.mismatch), *times, speedup, choice]


def _numbers(found: Mismatch) -> tuple[str, str]:
    return f"{found.k3_kl:.6f}", f"{found.mean_abs_logprob:.5f}"


def precision_file(reports: Sequence[PrecisionReport], kinds: Sequence[LayerKind], facts: Sequence[str]) -> str:
    """The text of a file for `--precision-file`."""
    patterns = {kind.name: kind.patterns for kind in kinds}
    head = "\n".join(f"# {fact}" for fact in facts)
    tables = []
    for report in reports:
        kept = [pattern for name in report.choice.kept for pattern in patterns[name]]
        tables.append(precision_table(report.quantization, kept, [*map(_comment, report.kinds), *_verdict(report)]))
    return "\n".join([head, "", *tables])


def _comment(kind: KindReport) -> str:
    speed = "" if kind.speedup is None else f", {kind.speedup:.2f}x as fast at {_DECODE} rows"
    return f"{kind.kind} {kind.rows} x {kind.columns}: k3 KL {kind.mismatch.k3_kl:.2g}{speed}"


def _verdict(report: PrecisionReport) -> list[str]:
    reasons = [f"{name} stays bf16: {reason}" for name, reason in report.choice.kept.items()]
    return [*reasons, f"k3 KL {report.chosen.k3_kl:.2g} as chosen, {report.all_kinds.k3_kl:.2g} with all in 8 bits"]


def as_json(reports: Sequence[PrecisionReport], facts: dict[str, Any]) -> dict[str, Any]:
    """The same as plain values."""
    return facts | {"precisions": [summary(report) for report in reports]}
