"""Files of one JSON object a line, as a run leaves them behind: perhaps cut short in the last line.

It does not know what the objects mean, apart from their `step`.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def to_line(row: Mapping[str, Any]) -> str:
    """One line with its line break; ValueError for NaN and infinity, which are not JSON."""
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All objects, without a last line that a crash cut short; ValueError names any other line that is no object."""
    *lines, rest = path.read_bytes().split(b"\n")
    rows = [_parse(line, f"{path} line {number}") for number, line in enumerate(lines, start=1) if line.strip()]
    try:
        return [*rows, _parse(rest, "last line")]
    except ValueError:
        return rows


def keep_until(path: Path, step: int) -> None:
    """Drops rows of later steps, and a last line cut short; a crash meanwhile leaves the file as it was."""
    if not path.exists():
        return
    kept = [to_line(row) for row in read_rows(path) if row.get("step", 0) <= step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    temporary.replace(path)


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        raise ValueError(f"{where}: not JSON") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: not a JSON object")
    return row
