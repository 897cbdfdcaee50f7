"""Every setting of the rollout service with its default, range and meaning, and where it may come from.

Knows files, environment and flags; knows nothing of what the settings do.
"""

import difflib
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from flashrl_rollout.layer_selection import QuantizeLayers
from flashrl_rollout.logs import LogFormat
from flashrl_rollout.precision_file import read_precision
from flashrl_wire.messages import PauseMode, Quantization

ENV_PREFIX = "FLASHRL_ROLLOUT_"


def _split(value: Any) -> Any:
    """`/a:/b` from an environment variable and `["/a", "/b"]` from TOML both become paths."""
    return [part for part in value.split(os.pathsep) if part] if isinstance(value, str) else value


def _split_commas(value: Any) -> Any:
    """`*.o_proj,*.down_proj` from a flag and `["*.o_proj", "*.down_proj"]` from TOML both become names."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _layers(value: Any) -> Any:
    """One complaint for all that a union would complain of."""
    number = int(value) if isinstance(value, str) and value.isdecimal() else value
    if number in ("auto", "all") or (type(number) is int and number >= 0):
        return number
    raise PydanticCustomError("layers", "should be auto, all or a number of elements")


class RolloutConfig(BaseModel):
    """All settings; `load_config` makes one. A name is also a TOML key, FLASHRL_ROLLOUT_NAME and --name."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    model: str = Field(min_length=1, description="Hugging Face folder, or a name on the model hub")
    quantization: Quantization = Field("int8", description="How linear layers are stored and computed")
    quantize_layers: Annotated[QuantizeLayers, BeforeValidator(_layers)] = Field(
        "auto", description="auto: layers where 8 bits pay; all; or the least number of elements N * K of a layer"
    )
    keep_bf16: Annotated[tuple[str, ...], BeforeValidator(_split_commas)] = Field(
        (), description="Patterns over names of modules that stay bf16, such as *.down_proj"
    )
    precision_file: Path | None = Field(None, description="The last two, as `flashrl-rollout measure` wrote them")
    host: str = Field(
        "127.0.0.1", min_length=1, description="Address of both ports; beyond loopback needs token and keys"
    )
    port: int = Field(8000, ge=0, le=65535, description="HTTP port; 0: any free one")
    weights_port: int = Field(8001, ge=0, le=65535, description="ZeroMQ port of weight updates; 0: any free one")
    token_file: Path | None = Field(None, description="File with the API token, where FLASHRL_TOKEN is not set")
    keys_dir: Path | None = Field(None, description="Folder `service` that `flashrl-rollout keys` made")

    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where the engine computes")
    engines: int = Field(
        1, ge=1, le=16, description="Copies of the engine on the same devices, each with its own process and weights"
    )
    tensor_parallel_size: int = Field(1, ge=1, description="Devices that share one copy of the model")
    max_model_len: int = Field(0, ge=0, description="Longest prompt and response in tokens; 0: the model's")
    max_num_seqs: int = Field(256, ge=1, description="Sequences that all engines work on at a time")
    gpu_memory_utilization: float = Field(
        0.6, gt=0, le=1, description="Share of the GPU's memory for all engines (CUDA)"
    )
    kv_cache_gib: float = Field(
        0.0,
        ge=0,
        description="Memory for keys and values of all engines; 0: on the CPU 1, on CUDA what the share leaves",
    )
    kv_cache_dtype: Literal["auto", "fp8"] = Field(
        "auto", description="How keys and values are kept: auto as the model computes, fp8 for twice as many tokens"
    )
    enforce_eager: bool = Field(False, description="No CUDA graphs and no compilation: starts faster, samples slower")
    output_interval: int = Field(
        32, ge=1, le=1024, description="Tokens of a sequence that the engine passes on at a time; 1: as they are drawn"
    )
    seed: int = Field(0, ge=0, lt=2**31, description="Seed of requests that bring none")
    threads: int = Field(0, ge=0, description="OpenMP threads of each engine process (CPU); 0: vLLM binds the cores")
    start_timeout_s: float = Field(1800.0, gt=0, description="Limit for loading the model")

    max_waiting: int = Field(16384, ge=0, description="Sequences that may wait beyond max_num_seqs; more get 429")
    request_timeout_s: float = Field(600.0, gt=0, description="Limit for one request that samples")
    admit_timeout_s: float = Field(60.0, gt=0, description="How long a request waits out a commit or a pause")
    max_body_mib: int = Field(64, ge=1, description="Largest request body; manifests of snapshots are the largest")
    shutdown_grace_s: float = Field(20.0, ge=0, description="How long running requests may go on after SIGTERM")

    commit_mode: PauseMode = Field(
        "keep", description="keep: freeze running sequences for a commit; drain: finish them"
    )
    drain_deadline_s: float = Field(60.0, gt=0, description="Limit for finishing them; then sampling goes on unchanged")
    write_deadline_s: float = Field(300.0, gt=0, description="Limit for each step of replacing weights")
    update_scratch_gib: float = Field(
        0.0,
        ge=0,
        description="Memory of each engine's device in which an update waits for its commit: as much as its new "
        "values, or 10 to 16 bytes for each of a few elements; what has no room waits on the host, and sampling for "
        "it; 0: on the CPU 1, on CUDA 2; never more than a part of what is free",
    )
    credit_mib: int = Field(16, ge=5, le=256, description="Bytes of an update in flight; at least one chunk")
    max_update_gib: float = Field(64.0, gt=0, description="Largest decompressed update")
    transfer_deadline_s: float = Field(60.0, gt=0, description="An update that does not get on for so long is dropped")
    run_idle_s: float = Field(1800.0, gt=0, description="A silent trainer is followed for so long; others get 409")
    audit_every: int = Field(50, ge=0, description="Commits between digests of all weights; 0: never")
    checkpoint_roots: Annotated[tuple[Path, ...], BeforeValidator(_split)] = Field(
        (), description="Folders that checkpoints may be loaded from, besides the model's own"
    )
    stage_root: Path = Field(Path("/dev/shm"), description="Shared memory in which updates are staged")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least level that is logged")
    log_format: LogFormat = Field("text", description="Form of log lines; json: one object a line")

    @model_validator(mode="after")
    def _check(self) -> "RolloutConfig":
        if self.port and self.port == self.weights_port:
            raise ValueError(f"weights_port: must differ from port = {self.port}")
        return self

    def roots(self) -> tuple[Path, ...]:
        """`checkpoint_roots`, and the model's folder where it is one."""
        model = Path(self.model)
        return (*self.checkpoint_roots, model) if model.is_dir() else self.checkpoint_roots


def load_config(file: Path | None, environ: Mapping[str, str], flags: Mapping[str, object]) -> RolloutConfig:
    """`file` < `environ` < `flags`; ValueError of one line that names the setting and its origin."""
    values: dict[str, object] = {}
    origins: dict[str, str] = {}
    for layer, origin in ((_read(file), "{file}"), (_from_environ(environ), "{prefix}{upper}"), (flags, "--{dashed}")):
        for key, value in layer.items():
            values[key] = value
            upper, dashed = key.upper(), key.replace("_", "-")
            origins[key] = origin.format(file=file, prefix=ENV_PREFIX, upper=upper, dashed=dashed)
    for key, value in _measured(values).items():  # what is said anywhere else wins
        if key not in values:
            values[key], origins[key] = value, str(values["precision_file"])
    try:
        return RolloutConfig.model_validate(values)
    except ValidationError as error:
        raise ValueError(_one_line(error, origins)) from None


def _measured(values: Mapping[str, object]) -> dict[str, Any]:
    file, quantization = values.get("precision_file"), values.get("quantization", "int8")
    if not isinstance(file, str | Path) or quantization not in get_args(Quantization):
        return {}
    return read_precision(Path(file), cast(Quantization, quantization))


def _read(file: Path | None) -> dict[str, object]:
    if file is None:
        return {}
    try:
        return tomllib.loads(file.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"config: {file}: {getattr(error, 'strerror', None) or error}") from error


def _from_environ(environ: Mapping[str, str]) -> dict[str, str]:
    return {
        name.removeprefix(ENV_PREFIX).lower(): environ[name] for name in sorted(environ) if name.startswith(ENV_PREFIX)
    }


def _one_line(error: ValidationError, origins: Mapping[str, str]) -> str:
    return " ".join("; ".join(_line(mistake, origins) for mistake in error.errors(include_url=False)).split())


def _line(mistake: Any, origins: Mapping[str, str]) -> str:
    key = str(mistake["loc"][0]) if mistake["loc"] else ""
    if not key:  # a check over several settings starts with the one it blames
        return str(mistake["ctx"]["error"])
    if mistake["type"] == "missing":
        return f"{key}: is required (--{key}, {ENV_PREFIX}{key.upper()} or the config file)"
    if mistake["type"] == "extra_forbidden":
        complaint = f"unknown setting{_suggestion(key)}"
    else:
        complaint = f"{mistake['msg'].removeprefix('Input ')}, got {mistake['input']!r}"
    return f"{key}: {complaint} (from {origins[key]})"


def _suggestion(key: str) -> str:
    close = difflib.get_close_matches(key, RolloutConfig.model_fields, n=1)
    return f"; did you mean {close[0]}?" if close else ""
