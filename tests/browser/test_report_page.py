"""A report as a person opens it, from a file, on a wide and on a narrow screen."""

import json
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver import Chrome

from flashrl_trainer.metric_rows import METRIC_KEYS
from flashrl_trainer.report import write_report

pytestmark = pytest.mark.browser

PHASES = {"perf/sampling_seconds": 2.0, "perf/training_seconds": 1.0, "perf/publishing_seconds": 0.5}
LOADED = "return [...document.images].map(image => image.complete && image.naturalWidth > 300)"
TOO_WIDE = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"


def run(folder: Path) -> Path:
    folder.mkdir()
    rows: list[dict[str, Any]] = [dict.fromkeys(METRIC_KEYS, 0.5) | PHASES | {"step": step} for step in range(4)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.toml").write_text("[run]\nname = '" + "long" * 60 + "'\n")
    return folder


@pytest.mark.parametrize("width", [1200, 500])
@pytest.mark.parametrize("count", [1, 3])
def test_page_is_whole_and_fits(page: Chrome, tmp_path: Path, width: int, count: int) -> None:
    folders = [run(tmp_path / f"a-run-with-quite-a-long-name-{number}") for number in range(count)]
    page.set_window_size(width, 1000)
    page.get(write_report(folders).as_uri())
    loaded = page.execute_script(LOADED)
    assert len(loaded) == 6
    assert all(loaded)
    assert page.execute_script("return document.querySelectorAll('td').length") > 26
    page.execute_script("document.querySelectorAll('details').forEach(each => each.open = true)")
    assert page.execute_script(TOO_WIDE) <= 0
    assert page.get_log("browser") == []  # type: ignore[no-untyped-call]
