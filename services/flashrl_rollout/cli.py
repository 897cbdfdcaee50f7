"""The commands of `flashrl-rollout`: settings are read here, once, and everything is built from them.

Knows the commands and exit codes; knows nothing of how any of it works.
"""

import asyncio
import dataclasses
import gc
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, get_args, get_origin

import typer

from flashrl_rollout.bench.command import bench
from flashrl_rollout.config import RolloutConfig, load_config
from flashrl_rollout.logs import set_up_logging
from flashrl_rollout.measure.command import measure
from flashrl_rollout.security import write_keys

if TYPE_CHECKING:  # torch and vllm take seconds, which --help and a mistyped flag should not
    from flashrl_rollout.engine import Engine
    from flashrl_rollout.vllm_engine import VllmEngine

USAGE_ERROR = 2
_KEYS_WRITTEN = """\
Keys are in {folder}. Next:
  the service:  flashrl-rollout serve --host 0.0.0.0 --keys-dir {folder}/service \\
                    --token-file {folder}/service/token ...
  the trainer:  copy {folder}/trainer to its machine; set rollout.keys_dir to the copy
                    and rollout.token_file to the file `token` in it
Another trainer may connect once its public key lies in {folder}/service/allowed."""

app = typer.Typer(
    help="Sample from a quantized model over HTTP, and follow a trainer's weight updates.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _flag(name: str) -> Any:
    # text, whatever the type: one place judges values from files, variables and flags, with one kind of message
    field = RolloutConfig.model_fields[name]
    default = "" if field.is_required() or field.default in (None, ()) else f" (default {field.default})"
    choices = "|".join(map(str, get_args(field.annotation))) if get_origin(field.annotation) is Literal else ""
    metavar = choices or name.rpartition("_")[2].upper()
    # named outright: typer 0.27 takes a metavar that equals the name for the option's own spelling
    return typer.Option(f"--{name.replace('_', '-')}", help=f"{field.description}{default}", metavar=metavar)


@app.command()
def serve(
    ctx: typer.Context,
    config: Annotated[Path | None, typer.Option(help="TOML file whose keys are these names, with _ for -")] = None,
    model: Annotated[str | None, _flag("model")] = None,
    quantization: Annotated[str | None, _flag("quantization")] = None,
    quantize_layers: Annotated[str | None, _flag("quantize_layers")] = None,
    keep_bf16: Annotated[str | None, _flag("keep_bf16")] = None,
    precision_file: Annotated[str | None, _flag("precision_file")] = None,
    host: Annotated[str | None, _flag("host")] = None,
    port: Annotated[str | None, _flag("port")] = None,
    weights_port: Annotated[str | None, _flag("weights_port")] = None,
    token_file: Annotated[str | None, _flag("token_file")] = None,
    keys_dir: Annotated[str | None, _flag("keys_dir")] = None,
    device: Annotated[str | None, _flag("device")] = None,
    engines: Annotated[str | None, _flag("engines")] = None,
    tensor_parallel_size: Annotated[str | None, _flag("tensor_parallel_size")] = None,
    max_model_len: Annotated[str | None, _flag("max_model_len")] = None,
    max_num_seqs: Annotated[str | None, _flag("max_num_seqs")] = None,
    gpu_memory_utilization: Annotated[str | None, _flag("gpu_memory_utilization")] = None,
    kv_cache_gib: Annotated[str | None, _flag("kv_cache_gib")] = None,
    kv_cache_dtype: Annotated[str | None, _flag("kv_cache_dtype")] = None,
    enforce_eager: Annotated[bool | None, typer.Option(help="No CUDA graphs and no compilation")] = None,
    output_interval: Annotated[str | None, _flag("output_interval")] = None,
    seed: Annotated[str | None, _flag("seed")] = None,
    threads: Annotated[str | None, _flag("threads")] = None,
    start_timeout_s: Annotated[str | None, _flag("start_timeout_s")] = None,
    max_waiting: Annotated[str | None, _flag("max_waiting")] = None,
    request_timeout_s: Annotated[str | None, _flag("request_timeout_s")] = None,
    admit_timeout_s: Annotated[str | None, _flag("admit_timeout_s")] = None,
    max_body_mib: Annotated[str | None, _flag("max_body_mib")] = None,
    shutdown_grace_s: Annotated[str | None, _flag("shutdown_grace_s")] = None,
    commit_mode: Annotated[str | None, _flag("commit_mode")] = None,
    drain_deadline_s: Annotated[str | None, _flag("drain_deadline_s")] = None,
    write_deadline_s: Annotated[str | None, _flag("write_deadline_s")] = None,
    update_scratch_gib: Annotated[str | None, _flag("update_scratch_gib")] = None,
    credit_mib: Annotated[str | None, _flag("credit_mib")] = None,
    max_update_gib: Annotated[str | None, _flag("max_update_gib")] = None,
    transfer_deadline_s: Annotated[str | None, _flag("transfer_deadline_s")] = None,
    run_idle_s: Annotated[str | None, _flag("run_idle_s")] = None,
    audit_every: Annotated[str | None, _flag("audit_every")] = None,
    checkpoint_roots: Annotated[str | None, _flag("checkpoint_roots")] = None,
    stage_root: Annotated[str | None, _flag("stage_root")] = None,
    log_level: Annotated[str | None, _flag("log_level")] = None,
    log_format: Annotated[str | None, _flag("log_format")] = None,
) -> None:
    """Load a model and serve it until Ctrl-C or SIGTERM (exit code 0); 1 when the engine fails, 2 for a mistake."""
    flags = {name: value for name, value in ctx.params.items() if value is not None and name != "config"}
    try:
        settings = load_config(config, os.environ, flags)
        set_up_logging(settings.log_level, settings.log_format)
        from flashrl_rollout.model_check import check_model

        check_model(settings.model)
        from flashrl_rollout import serving, startup

        bound = startup.bind(settings)
    except ValueError as error:
        fail(str(error))
    raise typer.Exit(serving.serve(settings, bound, lambda: _start_vllm(settings)))


async def _start_vllm(config: RolloutConfig) -> "Engine":
    from flashrl_rollout.engine_settings import EngineSettings
    from flashrl_rollout.engine_start import start_engines

    engine = await asyncio.to_thread(_import_vllm)  # takes 15 s, in which /health must answer
    settings = EngineSettings(**{name: getattr(config, name) for name in _names(EngineSettings)})
    started = await start_engines(settings, engine.starter(settings.engines))
    gc.collect()
    gc.freeze()  # what torch and vLLM have made so far stays; walking over all of it would hold up every request
    return started


def _names(settings: type) -> list[str]:
    return [field.name for field in dataclasses.fields(settings)]


def _import_vllm() -> "type[VllmEngine]":
    from flashrl_rollout.vllm_engine import VllmEngine

    return VllmEngine


@app.command()
def keys(folder: Annotated[Path, typer.Argument(help="New folder for the keys")]) -> None:
    """Make CURVE key pairs, the allow-list and an API token for a service that other machines can reach."""
    try:
        write_keys(folder)
    except FileExistsError as error:
        fail(f"{error.filename} is there already; keys are never replaced")
    except OSError as error:
        fail(f"cannot write {error.filename}: {error.strerror}")
    typer.echo(_KEYS_WRITTEN.format(folder=folder))


app.command()(bench)
app.command()(measure)


def fail(message: str) -> NoReturn:
    """Say what is wrong in one line and exit."""
    print(f"error: {message}", file=sys.stderr)
    raise typer.Exit(USAGE_ERROR)


def main() -> None:
    """The entry point."""
    app(prog_name="flashrl-rollout")
