"""Runs and their images -> one HTML page that needs no other file. Knows nothing of how images were drawn."""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from flashrl_trainer.metric_rows import METRIC_KEYS
from flashrl_trainer.report_run import Run, summary

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.4rem } h2 { font-size: 1.05rem; margin-top: 2rem }
table { border-collapse: collapse }
td, th { text-align: left; padding: .25rem 1.2rem .25rem 0; border-bottom: 1px solid #ddd }
th { font-weight: 600 } td { font-variant-numeric: tabular-nums } img { max-width: 100% }
details { margin-top: 1rem } summary { cursor: pointer }
.scroll, pre { overflow-x: auto } .small { font-size: .8rem }
"""
CAPTIONS = {
    "reward": "What is learned",
    "mismatch": "How far the quantized sampler is from the trainer",
    "response": "What is sampled",
    "sync": "What an update costs",
    "speed": "How fast it goes",
    "phases": "Where the time goes",
}


def page(runs: Sequence[Run], images: Mapping[str, Path]) -> str:
    """The summary table, the images embedded, and at the end settings and all rows to open."""
    title = escape(", ".join(run.name for run in runs))
    figures = "".join(_figure(name, path) for name, path in images.items())
    details = "".join(_settings(run) + _rows(run) for run in runs)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLE}</style></head><body>\n<h1>{title}</h1>\n{_summary(runs)}{figures}{details}</body></html>\n"
    )


def _summary(runs: Sequence[Run]) -> str:
    columns = [summary(run) for run in runs]
    head = _row("th", ["", *(run.name for run in runs)]) if len(runs) > 1 else ""
    body = "".join(_row("td", [name, *(column[name] for column in columns)]) for name in columns[0])
    return f'<div class="scroll"><table>{head}{body}</table></div>\n'


def _figure(name: str, path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    caption = escape(CAPTIONS.get(name, name))
    return f'<h2>{caption}</h2>\n<img alt="{caption}" src="data:image/png;base64,{data}">\n'


def _settings(run: Run) -> str:
    return f"<details><summary>Settings of {escape(run.name)}</summary><pre>{escape(run.config_text)}</pre></details>\n"


def _rows(run: Run) -> str:
    body = "".join(_row("td", [_cell(row.get(key)) for key in METRIC_KEYS]) for row in run.rows)
    table = f'<div class="scroll small"><table>{_row("th", METRIC_KEYS)}{body}</table></div>'
    return f"<details><summary>All steps of {escape(run.name)}</summary>{table}</details>\n"


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def _row(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>\n"
