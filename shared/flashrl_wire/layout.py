"""Which tensor is stored how: the contract both sides compare before the first update.

Knows names, shapes and storage; knows nothing of values, torch or files.
"""

import itertools
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import xxhash
from pydantic import BaseModel, ConfigDict

Storage = Literal["int8_rows", "fp8_rows", "bf16"]
PartDtype = Literal["int8", "fp8", "fp32", "bf16"]

ITEM_BYTES: dict[PartDtype, int] = {"int8": 1, "fp8": 1, "fp32": 4, "bf16": 2}
SCALE_SUFFIX = "_scale"


@dataclass(frozen=True)
class PartSpec:
    """One array of the stored form, e.g. `PartSpec("model.layers.0.mlp.up_proj.weight", "int8", (512, 256))`."""

    name: str
    dtype: PartDtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Elements in the part."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes in the part."""
        return self.numel * ITEM_BYTES[self.dtype]


class TensorSpec(BaseModel):
    """One Hugging Face parameter and its storage; rows (dimension 0) are output channels."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    shape: tuple[int, ...]
    storage: Storage

    def parts(self) -> tuple[PartSpec, ...]:
        """The arrays that hold it: codes [N, K] and scales [N, 1] for quantized rows, else the values."""
        if self.storage == "bf16":
            return (PartSpec(self.name, "bf16", self.shape),)
        codes: PartDtype = "int8" if self.storage == "int8_rows" else "fp8"
        scales = PartSpec(self.name + SCALE_SUFFIX, "fp32", (self.shape[0], 1))
        return PartSpec(self.name, codes, self.shape), scales


@dataclass(frozen=True)
class WeightLayout:
    """All tensors of a model in name order."""

    tensors: tuple[TensorSpec, ...]

    @classmethod
    def of(cls, tensors: Iterable[TensorSpec]) -> "WeightLayout":
        """A layout in name order; a name that stands twice is a ValueError."""
        ordered = tuple(sorted(tensors, key=lambda spec: spec.name))
        for first, second in itertools.pairwise(ordered):
            if first.name == second.name:
                raise ValueError(f"layout: tensor {first.name} stands twice")
        return cls(ordered)

    def parts(self) -> Iterator[PartSpec]:
        """Every stored array, in name order of its tensor, codes before scales."""
        for spec in self.tensors:
            yield from spec.parts()

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole stored form."""
        return sum(part.num_bytes for part in self.parts())

    @property
    def quantized_fraction(self) -> float:
        """Share of all elements that are codes, 0 to 1."""
        sizes = [(math.prod(spec.shape), spec.storage != "bf16") for spec in self.tensors]
        return sum(size for size, is_quantized in sizes if is_quantized) / max(1, sum(size for size, _ in sizes))

    @property
    def hash(self) -> str:
        """xxh3_128 of the canonical JSON, hex; equal hashes mean equal layouts."""
        rows = [[spec.name, list(spec.shape), spec.storage] for spec in self.tensors]
        return xxhash.xxh3_128_hexdigest(json.dumps(rows, separators=(",", ":")).encode())


def difference(ours: WeightLayout, theirs: WeightLayout) -> str:
    """One line that names the first difference of two layouts, or an empty string."""
    left, right = ({spec.name: spec for spec in layout.tensors} for layout in (ours, theirs))
    for name in sorted(left.keys() | right.keys()):
        if name not in right:
            return f"{name} is only in the trainer's model"
        if name not in left:
            return f"{name} is only in the service's model"
        if left[name] != right[name]:
            mine, other = left[name], right[name]
            return f"{name} is {mine.storage}{list(mine.shape)} here and {other.storage}{list(other.shape)} there"
    return ""
