"""`flashrl-rollout bench`: its flags, what it says when something is wrong, and where the numbers go.

Knows flags and exit codes; knows nothing of how anything is measured.
"""

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer
from rich.console import Console

from flashrl_rollout.bench.arms import ArmFailedError
from flashrl_rollout.bench.benchmark import benchmark
from flashrl_rollout.bench.report import table
from flashrl_rollout.bench.settings import BenchSettings, Lengths, read_settings
from flashrl_rollout.bench.shape_names import SHAPES

_FAILED, _USAGE_ERROR, _INTERRUPTED = 1, 2, 130
_COLUMNS = 124  # of the table where there is no terminal
_DEFAULTS: dict[str, Any] = {name: field.default for name, field in BenchSettings.model_fields.items()}


def _option(name: str, help_text: str) -> Any:
    return typer.Option(_DEFAULTS[name], help=help_text)


def bench(
    model: str = _option("model", "Hugging Face folder, or a name on the model hub"),
    shape: str = _option("shape", f"Random weights instead of a model, in the shape of {', '.join(SHAPES)}"),
    quantization: list[str] = typer.Option(
        list(_DEFAULTS["quantization"]), help="int8, fp8 or none; repeat it to compare each with none"
    ),
    arms: str = _option("arms", "service, engine or both; service,engine:int8 has the engine in int8 only"),
    requests: int = _option("requests", "Sequences of a round"),
    samples: int = _option("samples", "Sequences for each prompt"),
    prompts_per_request: int = _option(
        "prompts_per_request", "Prompts in each HTTP request; 0: 8 as the trainer sends, 1 where lengths differ"
    ),
    prompt_tokens: int = _option("prompt_tokens", "Tokens of each prompt, drawn at random"),
    tokens: int = _option("tokens", "Tokens of each answer; their median where lengths are lognormal"),
    lengths: Lengths = _option("lengths", "All of one length, or lognormal up to 4096"),
    seeded: bool = typer.Option(
        _DEFAULTS["seeded"], "--seeded/--unseeded", help="A seed for every sequence, as the trainer asks"
    ),
    seed: int = _option("seed", "Of prompts, lengths and samples"),
    rounds: int = _option("rounds", "Rounds, after a short one that warms up"),
    max_num_seqs: int = _option("max_num_seqs", "Sequences that an engine works on at a time"),
    device: Literal["auto", "cpu", "cuda"] = _option("device", "Where the engines compute"),
    threads: int = _option("threads", "OpenMP threads of each engine (CPU); 0: vLLM binds the cores"),
    enforce_eager: bool = typer.Option(False, "--enforce-eager", help="No CUDA graphs and no compilation"),
    kv_cache_gib: float = _option("kv_cache_gib", "Memory of each arm for keys and values; 0: what the load needs"),
    gpu_memory_utilization: float = _option(
        "gpu_memory_utilization", "Share of the GPU for each arm, whose cache vLLM then sizes; arms start one by one"
    ),
    service_flags: str = _option("service_flags", 'More flags of `serve`, such as "--engines 2"'),
    timeout_s: float = _option("timeout_s", "Limit for loading all arms, and for a round"),
    work_dir: Annotated[Path | None, typer.Option(help="Where random weights and logs lie meanwhile")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="File for all numbers, raw rounds too")] = None,
) -> None:
    """Measure this service against the bare vLLM engine, and precisions against each other, in one run.

    All arms (service/int8, engine/int8, ...) are loaded first; then they take turns, one at a time.
    A round gives each the same new prompts, and begins with another arm than the one before.
    Every answer has exactly the length asked for: the model's end token is taken away.
    `engine` is vLLM's AsyncLLM with the defaults of vLLM's server, without HTTP and without text;
    under `none` it is vLLM alone, else it has our quantization methods.

    Examples:

      flashrl-rollout bench --model examples/tiny_arith/model --device cpu --threads 1 --enforce-eager

      flashrl-rollout bench --shape qwen2.5-0.5b --quantization none --quantization int8 --json 0.5b.json

    Exit code 0: measured; 1: an arm failed; 2: a mistake; 130: interrupted.
    """
    given = {name: value for name, value in locals().items() if name in _DEFAULTS}
    try:
        _measure(read_settings(**given), work_dir, json_file)
    except ValueError as error:
        _fail(str(error), _USAGE_ERROR)
    except ArmFailedError as error:
        _fail(str(error), _FAILED)
    except KeyboardInterrupt:
        _fail("interrupted; nothing is left running", _INTERRUPTED)


def _measure(settings: BenchSettings, work_dir: Path | None, json_file: Path | None) -> None:
    _check_writable(json_file)
    with _ended_in_order():
        found = benchmark(settings, work_dir)
    if json_file:
        json_file.write_text(json.dumps(found, indent=1) + "\n")
    Console(width=None if sys.stdout.isatty() else _COLUMNS).print(table(found, title(settings)))


def title(settings: BenchSettings) -> str:
    """What was measured, in one line."""
    length = (
        f"{settings.tokens} tokens" if settings.lengths == "fixed" else f"lognormal, median {settings.tokens} tokens"
    )
    groups = f" in groups of {settings.samples}" if settings.samples > 1 else ""
    load = f"{settings.requests} sequences{groups} x {length}"
    return f"{settings.model or settings.shape}: {load}, medians of {settings.rounds} rounds"


@contextmanager
def _ended_in_order() -> Iterator[None]:
    """SIGTERM is taken for Ctrl-C: it ends the arms too."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _check_writable(file: Path | None) -> None:
    """ValueError before anything is measured, instead of losing it all at the end."""
    if file is None:
        return
    is_there = file.exists()
    try:
        file.open("a").close()
        if not is_there:
            file.unlink()  # no empty file of numbers if there will be none
    except OSError as error:
        raise ValueError(f"json: cannot write {file}: {error.strerror}") from error


def _fail(message: str, code: int) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise typer.Exit(code)
