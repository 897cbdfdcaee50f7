"""The command line of the trainer: reads settings once, starts what was asked for, turns failures into one line.

Knows the commands; what they do is in `commands`, which is imported late because torch takes seconds.
"""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from flashrl_trainer.config import load_config
from flashrl_trainer.settings import TrainerConfig
from flashrl_wire.errors import WireError

app = typer.Typer(
    help="Train a language model with DAPO, sampling from a quantized copy of it in a rollout service.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Config = Annotated[Path, typer.Option("--config", help="Recipe, for example configs/gsm8k_0.5b_int8.toml")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="Override a setting: --set section.key=value; may be repeated")
]


@app.command()
def train(
    config: Config,
    overrides: Overrides = None,
    resume: Annotated[
        str, typer.Option(help="Go on with this run's folder, or with the newest run of the recipe: auto")
    ] = "",
) -> None:
    """Train. Shows progress, writes runs/NAME/; Ctrl-C stops with a checkpoint that --resume goes on from.

    Under torchrun the same command runs on every rank:
    torchrun --nproc-per-node 8 -m flashrl_trainer train --config C.toml
    """
    settings = _load(config, overrides)
    from flashrl_trainer.commands import train as run

    run(settings, config.stem, resume)


@app.command()
def doctor(config: Config, overrides: Overrides = None) -> None:
    """Check what a run needs: device, memory, disk, versions, data, model, service; say what is missing."""
    settings = _load(config, overrides)
    from flashrl_trainer.doctor import report

    raise typer.Exit(report(settings))


@app.command(name="eval")
def evaluate(
    config: Config,
    overrides: Overrides = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="Folder to evaluate: an export, read by the service from its disk; with --bf16 also a run's "
            "checkpoints/step-N. Else what the service holds, with --bf16 model.path"
        ),
    ] = None,
    bf16: Annotated[
        bool, typer.Option("--bf16", help="Generate here, in full precision, with transformers: no service")
    ] = False,
) -> None:
    """Accuracy on data.eval: sampled at temperature 1 with pass@k, and greedy, each with its 95 % interval."""
    settings = _load(config, overrides)
    from flashrl_trainer.evaluate import evaluate as run

    run(settings, checkpoint, bf16=bf16)


@app.command()
def prepare_data(
    out_dir: Annotated[Path, typer.Argument(help="Gets train.jsonl and eval.jsonl")],
    config: Annotated[
        Path | None, typer.Option("--config", help="Recipe whose data to prepare; else GSM8K from the hub")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Write prompts and answers as JSONL, for data.format = "prompts"."""
    basis = overrides or []
    if config is None:
        basis = ["model.path=unused", "data.train=openai/gsm8k", "data.eval=openai/gsm8k", *basis]
    settings = _load(config, basis)
    from flashrl_trainer.prompts import RowChecks
    from flashrl_trainer.prompts import prepare_data as write
    from flashrl_trainer.rewards import answer_check

    checks = RowChecks(
        check_answer=answer_check(settings.data.reward), on_bad_row=lambda line: typer.echo(line, err=True)
    )
    for path, rows in write(out_dir, settings.data, checks).items():
        typer.echo(f"{path}: {rows} prompts")


@app.command()
def check_sync(config: Config, overrides: Overrides = None) -> None:
    """Self-test of the weight path at lr = 0: the version moves, digest and greedy output do not."""
    settings = _load(config, overrides)
    from flashrl_trainer.commands import check_sync as run

    run(settings)


@app.command()
def report(
    run_dirs: Annotated[list[Path], typer.Argument(help="A run's folder, runs/NAME; several: all on one page")],
    out: Annotated[Path | None, typer.Option(help="Where to write; else report/ in the first run's folder")] = None,
) -> None:
    """Plots and a summary page of a run, or of several side by side."""
    from flashrl_trainer.report import write_report

    typer.echo(write_report(run_dirs, out))


def _load(path: Path | None, overrides: list[str] | None) -> TrainerConfig:
    return load_config(path, overrides or [], os.environ)


def main() -> None:
    """Entry point: exit code 2 for a wrong setting, 1 for a failure, 130 after Ctrl-C."""
    # tokenizers warns about forks, and hub look-ups of a local path are of no use
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app()
    except KeyboardInterrupt:
        _fail("stopped", 130)
    except ValueError as error:
        _fail(f"error: {error}", 2)
    except (WireError, RuntimeError, OSError) as error:
        _fail(f"error: {error}", 1)


def _fail(line: str, code: int) -> None:
    print(" ".join(line.split()), file=sys.stderr)
    sys.exit(code)
