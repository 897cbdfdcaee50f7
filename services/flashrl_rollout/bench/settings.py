"""What a benchmark measures and with what load.

Knows names, ranges and combinations that make no sense; knows nothing of how anything is measured.
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from flashrl_rollout.bench.shape_names import SHAPES
from flashrl_wire.messages import MAX_PROMPTS, MAX_SAMPLES, Quantization

TRAINER_PROMPTS = 8
"""Prompts that the trainer puts into a request."""

Side = Literal["service", "engine"]
Lengths = Literal["fixed", "lognormal"]


@dataclass(frozen=True, order=True)
class ArmName:
    """One thing that is measured: `service/int8` or `engine/none`."""

    side: Side
    quantization: Quantization

    def __str__(self) -> str:
        return f"{self.side}/{self.quantization}"


class BenchSettings(BaseModel):
    """All that was asked for; a field is the flag of the same name, and stands in the JSON file."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    model: str = ""
    shape: str = ""
    quantization: tuple[Quantization, ...] = Field(("none", "int8"), min_length=1)
    arms: str = "service,engine"
    requests: int = Field(256, ge=1)
    samples: int = Field(1, ge=1, le=MAX_SAMPLES)
    prompts_per_request: int = Field(0, ge=0, le=MAX_PROMPTS)
    prompt_tokens: int = Field(128, ge=1)
    tokens: int = Field(256, ge=1)
    lengths: Lengths = "fixed"
    seeded: bool = True
    seed: int = Field(0, ge=0, lt=1 << 31)
    rounds: int = Field(3, ge=1)
    max_num_seqs: int = Field(256, ge=1)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = Field(0, ge=0)
    enforce_eager: bool = False
    kv_cache_gib: float = Field(0.0, ge=0)
    gpu_memory_utilization: float = Field(0.0, ge=0, le=1)
    service_flags: str = ""
    timeout_s: float = Field(1800.0, gt=0)

    @model_validator(mode="after")
    def _check(self) -> "BenchSettings":
        if bool(self.model) == bool(self.shape):
            raise ValueError("model: name either a model or a shape")
        if self.shape and self.shape not in SHAPES:
            raise ValueError(f"shape: {self.shape!r} is none of {', '.join(SHAPES)}")
        if self.requests % self.samples:
            raise ValueError(f"requests: {self.requests} sequences are no whole groups of {self.samples} samples")
        if self.lengths == "lognormal" and self.prompts_per_request > 1:
            raise ValueError("prompts_per_request: must be 1 where every prompt has a length of its own (lengths)")
        self.arm_names()
        return self

    @property
    def num_prompts(self) -> int:
        """Prompts of a round; each gets `samples` answers."""
        return self.requests // self.samples

    @property
    def prompts_in_request(self) -> int:
        """Prompts of an HTTP request: what was asked for, or as many as the trainer sends if they have one length."""
        return self.prompts_per_request or (TRAINER_PROMPTS if self.lengths == "fixed" else 1)

    def arm_names(self) -> list[ArmName]:
        """`service,engine:int8` -> the service in every quantization, the engine in int8; ValueError for others."""
        names = [name for item in self.arms.split(",") for name in self._arm(item.strip())]
        return list(dict.fromkeys(names))

    def _arm(self, item: str) -> list[ArmName]:
        side, _, only = item.partition(":")
        if side not in get_args(Side):
            raise ValueError(f"arms: {item!r} is neither service nor engine")
        chosen: tuple[Any, ...] = (only,) if only else self.quantization
        if not set(chosen) <= set(get_args(Quantization)):
            raise ValueError(f"arms: {only!r} is no quantization; there are {', '.join(get_args(Quantization))}")
        return [ArmName("service" if side == "service" else "engine", each) for each in dict.fromkeys(chosen)]


def read_settings(**values: Any) -> BenchSettings:
    """The settings; ValueError of one line that names the one that is wrong."""
    try:
        return BenchSettings(**values)
    except ValidationError as error:
        mistake = error.errors(include_url=False)[0]
        if not mistake["loc"]:  # a check over several settings starts with the one it blames
            raise ValueError(str(mistake["ctx"]["error"])) from None
        raise ValueError(f"{mistake['loc'][0]}: {mistake['msg']}, got {mistake['input']!r}") from None
