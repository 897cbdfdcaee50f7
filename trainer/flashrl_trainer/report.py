"""A run's folder -> plots and a page that stands alone: `report/index.html` and its images.

It does not know how to draw (`report_plots`) nor how the page is laid out (`report_page`).
"""

import math
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flashrl_trainer.jsonl import read_rows
from flashrl_trainer.report_page import page
from flashrl_trainer.report_phases import draw_phases
from flashrl_trainer.report_plots import FIGURES, draw
from flashrl_trainer.report_run import Run

REQUIRED = ("step", "weight_version", "reward/mean")


def write_report(run_dirs: Sequence[Path], out: Path | None = None) -> Path:
    """Writes the page and its images to `out`, or to `report/` in the first run's folder; the page's path.

    Several runs become several lines in each plot and several columns in the table. ValueError of one line if a run
    has no metrics.jsonl, or no training step in it, or something that is not a row.
    """
    runs = [read_run(folder) for folder in run_dirs]
    folder = out or run_dirs[0] / "report"
    folder.mkdir(parents=True, exist_ok=True)
    figures = {name: draw(panels, runs) for name, panels in FIGURES.items()}
    if (phases := draw_phases(runs)) is not None:
        figures["phases"] = phases
    images = {name: folder / f"{name}.png" for name in figures}
    for name, figure in figures.items():
        figure.savefig(images[name], dpi=110)
    index = folder / "index.html"
    index.write_text(page(runs, images), encoding="utf-8")
    return index


def read_run(folder: Path) -> Run:
    """What a run left behind; ValueError of one line if that is not enough."""
    path = folder / "metrics.jsonl"
    try:
        rows = read_rows(path)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from None
    try:
        for row in rows:
            _check(row)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not any(row["step"] for row in rows):
        raise ValueError(f"{path}: no training step yet")
    config_text, config = _config(folder / "config.toml")
    return Run(folder.resolve().name, rows, _eval_samples(config), config_text)


def _check(row: dict[str, Any]) -> None:
    """ValueError for what is no row; an earlier release's has fewer keys than today's."""
    if missing := [key for key in REQUIRED if key not in row]:
        raise ValueError(f"metrics of step {row.get('step')}: no {', '.join(missing)}")
    for key, value in row.items():
        if value is not None and not (isinstance(value, int | float) and math.isfinite(value)):
            raise ValueError(f"metrics of step {row['step']}: {key} is {value}")


def _config(path: Path) -> tuple[str, dict[str, Any]]:
    """Text and content as they are, so that runs of earlier releases with other settings can be read too."""
    if not path.is_file():
        return "", {}
    try:
        text = path.read_text(encoding="utf-8")
        return text, tomllib.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from None


def _eval_samples(config: dict[str, Any]) -> int:
    """Samples behind one eval/accuracy; 0 where the number of problems is not in the settings."""
    settings = config.get("eval", {})
    return int(settings.get("problems", 0)) * int(settings.get("samples_per_problem", 1))
