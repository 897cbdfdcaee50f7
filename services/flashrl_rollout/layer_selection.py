"""Which linear layers are quantized: by name and by size, with one answer for every rank and replica.

Knows names, element counts and kinds of device; knows nothing of vLLM's layers or of files.
"""

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

ADDITIONAL_CONFIG = "flashrl"
"""Where a selection lies in vLLM's `--additional-config`: `{"flashrl": {"keep_bf16": ["*.down_proj"]}}`."""


class LeastElements(NamedTuple):
    """N * K from which a layer is quantized: where N >= K, and where its outputs are fewer than its inputs."""

    wide: int
    narrow: int


AUTO = {"cpu": LeastElements(0, 0), "cuda": LeastElements(8_000_000, 24_000_000)}
"""From where 8 bits pay, as measured (docs/quantization.md); few outputs make few tiles to spread over a GPU."""

QuantizeLayers = Literal["auto", "all"] | Annotated[int, Field(ge=0)]
Packed = Mapping[str, Sequence[str]]
"""Fused layers of a model and their parts, e.g. `{"qkv_proj": ["q_proj", "k_proj", "v_proj"]}`."""


class LayerSelection(BaseModel):
    """`LayerSelection(keep_bf16=("*.down_proj",), quantize_layers="all")`; patterns are over Hugging Face module names.

    A layer is stored in bf16 if a pattern matches its name or all its parts, or if it has fewer elements than
    `quantize_layers` says. The shape is that of the whole layer, so that no choice depends on the number of ranks.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    keep_bf16: tuple[str, ...] = ()
    quantize_layers: QuantizeLayers = "auto"

    @classmethod
    def of(cls, additional_config: object) -> "LayerSelection":
        """The selection in vLLM's additional configuration; ValueError for one that is none."""
        given = additional_config.get(ADDITIONAL_CONFIG, {}) if isinstance(additional_config, dict) else {}
        return cls.model_validate(given)

    def additional_config(self) -> dict[str, Any]:
        """What `of` reads, as plain values."""
        return {ADDITIONAL_CONFIG: self.model_dump(mode="json")}

    def quantizes(self, name: str, packed: Packed, shape: tuple[int, int], device: str) -> bool:
        """Whether the layer `name` with weight [N, K] is quantized on `cpu` or `cuda`; ValueError as in `keeps`."""
        rows, columns = shape
        return not self.keeps(name, packed) and rows * columns >= self._least_elements(shape, device)

    def _least_elements(self, shape: tuple[int, int], device: str) -> int:
        if self.quantize_layers == "auto":
            least = AUTO.get(device, AUTO["cuda"])
            return least.wide if shape[0] >= shape[1] else least.narrow
        return 0 if self.quantize_layers == "all" else self.quantize_layers

    def keeps(self, name: str, packed: Packed) -> bool:
        """Whether patterns keep the layer in bf16; ValueError where they match some of its parts, but not all."""
        if self._matches(name):
            return True
        parts = part_names(name, packed)
        kept = [part for part in parts if self._matches(part)]
        if kept and len(kept) < len(parts):
            left = next(part for part in parts if part not in kept)
            raise ValueError(f"keep_bf16: {kept[0]} is matched and {left} is not, but {name} computes both at once")
        return bool(kept)

    def check(self, modules: Iterable[str], packed: Packed) -> None:
        """ValueError for a pattern that fits none of the model's modules, or only a part of a fused layer."""
        names = set(modules)
        layers = {layer for name in names for layer in _layers_of(name, packed)}
        for pattern in self.keep_bf16:
            if not any(fnmatchcase(name, pattern) for name in names | layers):
                example = max(names, key=len, default="none")
                raise ValueError(
                    f"keep_bf16: {pattern} matches no module of the model; there is {example}, for example"
                )
        for layer in sorted(layers):
            self.keeps(layer, packed)

    def _matches(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self.keep_bf16)


def part_names(name: str, packed: Packed) -> list[str]:
    """`a.qkv_proj` -> `a.q_proj`, `a.k_proj`, `a.v_proj`; the name itself where it is not fused."""
    parent, dot, last = name.rpartition(".")
    return [parent + dot + part for part in packed.get(last, [last])]


def _layers_of(name: str, packed: Packed) -> list[str]:
    """The fused layers that the module `name` may be a part of."""
    parent, dot, last = name.rpartition(".")
    return [parent + dot + fused for fused, parts in packed.items() if last in parts]
