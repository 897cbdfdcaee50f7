"""The file in which `measure` writes what to quantize, and from which the service reads it.

A table for each precision, with the settings `keep_bf16` and `quantize_layers`. Knows nothing of what they do.
"""

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flashrl_wire.messages import Quantization

_KEYS = ("keep_bf16", "quantize_layers")


def read_precision(file: Path, quantization: Quantization) -> dict[str, Any]:
    """The settings under `[int8]` or `[fp8]`, none for `none`; ValueError of one line that names the file."""
    if quantization == "none":
        return {}
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"precision_file: {file}: {getattr(error, 'strerror', None) or error}") from error
    table = content.get(quantization)
    if not isinstance(table, dict):
        raise ValueError(f"precision_file: {file} has no table [{quantization}]")
    for key in table:
        if key not in _KEYS:
            raise ValueError(f"precision_file: {file}: [{quantization}] has the unknown key {key}")
    return table


def precision_table(quantization: Quantization, keep_bf16: Sequence[str], comments: Sequence[str]) -> str:
    """One table of the file, with comments above it; the patterns decide alone, whatever the size of a layer."""
    patterns = ", ".join(f'"{pattern}"' for pattern in keep_bf16)
    lines = [*(f"# {comment}".rstrip() for comment in comments), f"[{quantization}]"]
    return "\n".join([*lines, f"keep_bf16 = [{patterns}]", 'quantize_layers = "all"', ""])
