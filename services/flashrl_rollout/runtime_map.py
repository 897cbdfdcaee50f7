"""Which element of a stored part lies where in the engine's tensors, as strided boxes.

Knows geometry and bits; knows nothing of vLLM, of how the geometry was found, or of names beyond keeping them.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from flashrl_wire.delta import Change
from flashrl_wire.digest import PartDigest, bits, digest_at, digest_range
from flashrl_wire.layout import PartSpec

_BLOCK = 1 << 22  # elements digested at a time: bounds the scratch for their indices

_Found = tuple[slice | Tensor, slice | Tensor, Tensor]  # positions in the change, places in memory, indices of the part


@dataclass(frozen=True)
class Axis:
    """`size` steps, `part` elements apart in the part and `memory` elements apart in the engine's tensor."""

    size: int
    part: int
    memory: int


@dataclass(frozen=True)
class Region:
    """One box of elements that a part and an engine's tensor share: rows of a fused matrix, a slice of columns.

    The axes are nested, outermost first, so that counting through them visits the part in ascending order.
    """

    part_offset: int
    memory_offset: int
    axes: tuple[Axis, ...]

    @classmethod
    def of(cls, part_offset: int, memory_offset: int, axes: Iterator[Axis]) -> "Region":
        """A region with axes sorted and joined; ValueError where elements of the part would overlap."""
        ordered = sorted((axis for axis in axes if axis.size > 1), key=lambda axis: -axis.part)
        joined: list[Axis] = []
        for axis in ordered:
            outer = joined[-1] if joined else None
            if outer and outer.part < axis.size * axis.part:
                raise ValueError("elements overlap")
            if outer and (outer.part, outer.memory) == (axis.size * axis.part, axis.size * axis.memory):
                joined[-1] = Axis(outer.size * axis.size, axis.part, axis.memory)
            else:
                joined.append(axis)
        if any(axis.part == 0 or axis.memory == 0 for axis in joined):
            raise ValueError("an element stands for several")
        return cls(part_offset, memory_offset, tuple(joined))

    @property
    def key(self) -> str:
        """The elements of the part that it covers, as text; ranks that hold the same ones have equal keys."""
        return f"{self.part_offset}+" + ",".join(f"{axis.size}x{axis.part}" for axis in self.axes)

    @property
    def numel(self) -> int:
        """Elements in the box."""
        return math.prod(axis.size for axis in self.axes)

    @property
    def is_run(self) -> bool:
        """Whether its elements are consecutive on both sides."""
        return self.axes in ((), (Axis(self.numel, 1, 1),))

    def rank(self, index: int) -> int:
        """How many elements of the box lie before flat index `index` of the part."""
        rest, below, each = index - self.part_offset, 0, self.numel
        if rest < 0:
            return 0
        for axis in self.axes:
            each //= axis.size
            step = rest // axis.part
            if step >= axis.size:
                return below + axis.size * each
            below += step * each
            rest -= step * axis.part
        return below + (rest > 0)

    def elements(self, first: int, last: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Part indices and memory addresses, int64 each, of the elements that are counted `first` to `last`."""
        counted = torch.arange(first, last, device=device)
        indices = torch.full_like(counted, self.part_offset)
        addresses = torch.full_like(counted, self.memory_offset)
        each = self.numel
        for axis in self.axes:
            each //= axis.size
            step = counted // each
            counted = counted - step * each
            indices += step * axis.part
            addresses += step * axis.memory
        return indices, addresses

    def locate(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Positions in `indices` [n] of those inside the box, and their memory addresses."""
        rest = indices - self.part_offset
        inside = rest >= 0
        addresses = torch.full_like(rest, self.memory_offset)
        for axis in self.axes:
            step = rest // axis.part
            inside &= step < axis.size
            rest = rest - step * axis.part
            addresses += step * axis.memory
        positions = (inside & (rest == 0)).nonzero().flatten()
        return positions, addresses[positions]


@dataclass(frozen=True)
class Piece:
    """What a change does inside one region: `patterns` [n] for `where` in `memory`, which are `indices` of the part."""

    key: str
    copy: int  # which of the part's regions
    memory: Tensor  # [storage] bit patterns
    where: slice | Tensor
    patterns: Tensor  # [n]
    indices: Tensor  # [n] int64


@dataclass(frozen=True)
class Held:
    """A region and the bit patterns [storage] of the engine's tensor that it lies in."""

    region: Region
    memory: Tensor


def patterns_of(tensor: Tensor) -> Tensor:
    """The whole storage of an engine's tensor as bit patterns, flat, sharing its memory."""
    dtype = bits(torch.empty(0, dtype=tensor.dtype)).dtype
    return torch.empty(0, dtype=dtype, device=tensor.device).set_(tensor.untyped_storage())


@dataclass(frozen=True)
class RuntimePart:
    """A stored part and all places of this process that hold elements of it."""

    spec: PartSpec
    held: tuple[Held, ...]

    def pieces(self, change: Change) -> Iterator[Piece]:
        """The pieces of a change whose tensors lie on the engine's device."""
        for copy, held in enumerate(self.held):
            if change.indices is not None:
                found = self._sparse(held, change.indices)
            elif held.region.is_run:
                found = _run(held, change.start, change.values.numel())
            else:
                found = _box(held, change.start, change.values.numel())
            positions, where, indices = found
            if indices.numel():
                patterns = bits(change.values)
                yield Piece(held.region.key, copy, held.memory, where, patterns[positions], indices)

    def _sparse(self, held: Held, indices: Tensor) -> _Found:
        region = held.region
        if region.is_run and region.numel == self.spec.numel:  # nothing to look for, so nothing to wait for
            return slice(None), indices + (region.memory_offset - region.part_offset), indices
        positions, addresses = region.locate(indices)
        return positions, addresses, indices[positions]

    def digests(self) -> dict[str, PartDigest]:
        """Digest of each region by its key, computed from the engine's memory."""
        found: dict[str, PartDigest] = {}
        for held in self.held:
            total = _digest(held)
            if found.setdefault(held.region.key, total) != total:
                raise ValueError(f"two copies of {self.spec.name} differ")
        return found


def check_disjoint(parts: Mapping[str, RuntimePart]) -> None:
    """Raise ValueError where two names must lie in the same memory: they would overwrite each other's updates."""
    taken: dict[int, int] = {}
    for name, part in parts.items():
        for held in part.held:
            address = held.memory.data_ptr()
            taken[address] = taken.get(address, 0) + held.region.numel
            if taken[address] > held.memory.numel():
                raise ValueError(f"model: {name} shares memory with another tensor, so it cannot be updated in place")


def _run(held: Held, start: int, count: int) -> _Found:
    region = held.region
    first = max(start, region.part_offset)
    last = max(first, min(start + count, region.part_offset + region.numel))
    shift = region.memory_offset - region.part_offset
    indices = torch.arange(first, last, device=held.memory.device)
    return slice(first - start, last - start), slice(first + shift, last + shift), indices


def _box(held: Held, start: int, count: int) -> _Found:
    region = held.region
    indices, addresses = region.elements(region.rank(start), region.rank(start + count), held.memory.device)
    return indices - start, addresses, indices


def _digest(held: Held) -> PartDigest:
    region, memory, total = held.region, held.memory, PartDigest()
    if region.is_run:
        return digest_range(memory[region.memory_offset :][: region.numel], region.part_offset)
    for begin in range(0, region.numel, _BLOCK):
        indices, addresses = region.elements(begin, min(begin + _BLOCK, region.numel), memory.device)
        total = total + digest_at(indices, memory[addresses])
    return total
