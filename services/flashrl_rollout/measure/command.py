"""`flashrl-rollout measure`: its flags, and what it says when something is wrong.

Knows flags and exit codes; knows nothing of how anything is measured.
"""

import math
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from flashrl_wire.messages import Quantization

_USAGE_ERROR = 2
_COLUMNS = 150  # of the table where there is no terminal


def measure(
    model: Annotated[str, typer.Option(help="Hugging Face folder, or a name on the model hub")],
    quantization: list[str] = typer.Option(["int8", "fp8"], help="int8 or fp8; repeat it for both"),
    texts: Annotated[
        Path | None, typer.Option(help="JSONL of prompts (prompt, question or text) that the model goes on from")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to sample in bf16 and to compare on")] = 4096,
    limit_kl: Annotated[float, typer.Option(min=0, help="Largest k3 KL against bf16 that may be chosen")] = math.inf,
    speed: Annotated[bool, typer.Option(help="Time the kernels, and leave what they slow down in bf16")] = True,
    out: Annotated[Path | None, typer.Option(help="TOML for `serve --precision-file`")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="File for all numbers")] = None,
) -> None:
    """Measure what 8 bits cost (KL) and gain (speed) in each kind of layer, and choose what to quantize."""
    from flashrl_rollout.measure.run import MeasureSettings, run  # --help should not wait for the model hub's client

    console = Console(width=None if sys.stdout.isatty() else _COLUMNS)
    try:
        precisions = parse_quantizations(quantization)
        run(MeasureSettings(model, precisions, texts, tokens, limit_kl, speed, out, json_file), console)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise typer.Exit(_USAGE_ERROR) from error


def parse_quantizations(given: list[str]) -> tuple[Quantization, ...]:
    """`["int8,fp8"]` or `["int8", "fp8"]`; ValueError for anything else."""
    known: tuple[Quantization, ...] = ("int8", "fp8")
    names = [name.strip() for each in given for name in each.split(",")]
    wrong = next((name for name in names if name not in known), None)
    if wrong is not None:
        raise ValueError(f"quantization: should be int8 or fp8, got {wrong!r}")
    return tuple(name for name in known if name in names)
