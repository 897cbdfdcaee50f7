"""docs/settings.md says what the settings say. Knows the script that writes it."""

import runpy
from pathlib import Path
from typing import Any

import pytest
from pydantic import Field, create_model

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "scripts" / "settings_docs.py"))


def test_the_file_is_current(script: dict[str, Any]) -> None:
    written = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert written == script["page"](), "run python scripts/settings_docs.py"


def test_a_row_has_default_limits_and_meaning(script: dict[str, Any]) -> None:
    fields = create_model(
        "Settings",
        name=(str, Field(description="Needed")),
        share=(float, Field(0.6, gt=0, le=1, description="A share")),
        eager=(bool, Field(False, description="A switch")),
        folder=(Path | None, Field(None, description="A folder")),
        root=(Path, Field(Path("/tmp"), description="A root")),
    ).model_fields
    assert script["table"](fields).splitlines()[2:] == [
        "| `name` | required |  | Needed |",
        "| `share` | `0.6` | > 0 and <= 1 | A share |",
        "| `eager` | `false` |  | A switch |",
        "| `folder` | none |  | A folder |",
        '| `root` | `"/tmp"` |  | A root |',
    ]
