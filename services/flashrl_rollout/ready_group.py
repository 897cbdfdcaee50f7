"""A group of changes with everything done that can be done before they are written: on the device, the old values read,
the digests computed.

Only reads the engine's memory, so sampling may go on meanwhile. An update touches hundreds of parts, most of them a
little; in groups a device is waited for once a group and not once a part. Knows pieces and bits; knows nothing of
undoing.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from flashrl_rollout.place import AtAddresses, AtIndices, InRun, Place, Scattered
from flashrl_rollout.runtime_map import Piece, RuntimePart
from flashrl_wire.delta import Change
from flashrl_wire.digest import PartDigest, bits, digest_segments

Shifts = dict[str, dict[str, PartDigest]]
"""Per part and region key, what an update added to the digest."""

S = TypeVar("S", bound=Scattered)
CopyKey = tuple[str, str, int]
"""Part, region key, and which of the part's regions: copies of one region have one key."""


@dataclass(frozen=True)
class ReadyGroup:
    """What a group of changes writes, and what that adds to the digests."""

    runs: tuple[InRun, ...]
    scattered: tuple[Scattered, ...]
    shifts: tuple[tuple[CopyKey, PartDigest], ...]

    @classmethod
    def of(cls, changes: Sequence[Change], parts: Mapping[str, RuntimePart], device: torch.device) -> "ReadyGroup":
        """Read the engine's memory where `changes` will write; no element of it twice."""
        named = [(c.part, piece) for c in moved(changes, device) for piece in parts[c.part].pieces(c)]
        pieces = [piece for _, piece in named]
        old = [_read(piece) for piece in pieces]
        keys = [(part, piece.key, piece.copy) for part, piece in named]
        runs = tuple(_run(piece, piece.where) for piece in pieces if isinstance(piece.where, slice))
        shifts = zip(keys, _shifts(pieces, old), strict=True)
        return cls(runs, tuple(_joined(list(_at_indices(pieces, old)))), tuple(shifts))

    @property
    def places(self) -> Sequence[Place]:
        """All that it writes."""
        return self.runs + self.scattered

    @property
    def nbytes(self) -> int:
        """Scratch memory that it takes."""
        return sum(place.nbytes for place in self.places)

    def lost(self) -> Iterator[Tensor]:
        """Once it is written, for each bundle of elements bool []: whether what was written is not there."""
        for run in self.runs:
            assert run.lost is not None, "not written"
            yield run.lost
        for same in _by_size(self.scattered):
            yield _cat([p.read() for p in same]).ne(_cat([p.patterns for p in same])).any()


def groups(changes: Iterable[Change], max_elements: int) -> Iterator[list[Change]]:
    """The changes in order, cut and joined to groups of at most `max_elements`, no part twice in one."""
    group: dict[str, Change] = {}
    room = max_elements
    for change in changes:
        for block in _blocks(change, max_elements):
            if block.part in group or block.values.numel() > room:
                yield [*group.values()]
                group, room = {}, max_elements
            group[block.part] = block
            room -= block.values.numel()
    if group:
        yield [*group.values()]


def _blocks(change: Change, max_elements: int) -> Iterator[Change]:
    flat = change.values.reshape(-1)
    for begin in range(0, flat.numel(), max_elements):
        block = slice(begin, begin + max_elements)
        indices = None if change.indices is None else change.indices[block]
        yield Change(change.part, flat[block], indices, change.start + begin)


def moved(changes: Sequence[Change], device: torch.device) -> Iterator[Change]:
    """The same changes as bit patterns on `device`: one transfer for all indices, one for each size of values."""
    indices = _transferred([change.indices for change in changes if change.indices is not None], device)
    values = {
        size: _transferred([bits(c.values) for c in changes if c.values.element_size() == size], device)
        for size in {change.values.element_size() for change in changes}
    }
    for change in changes:
        where = None if change.indices is None else next(indices)
        yield Change(change.part, next(values[change.values.element_size()]), where, change.start)


def _transferred(tensors: list[Tensor], device: torch.device) -> Iterator[Tensor]:
    """Tensors of one type, joined for their way to a device and cut apart again there."""
    if tensors:
        yield from torch.split(torch.cat(tensors).to(device), [tensor.numel() for tensor in tensors])


def _read(piece: Piece) -> Tensor:
    """What is there now, [n]; of a run no copy."""
    where = piece.where
    return piece.memory[where] if isinstance(where, slice) else piece.memory.index_select(0, where)


def _run(piece: Piece, run: slice) -> InRun:
    # copies of one region share their new values, and each is to hold its own old ones
    return InRun(piece.memory, run, piece.patterns if piece.copy == 0 else piece.patterns.clone())


def _at_indices(pieces: Sequence[Piece], old: Sequence[Tensor]) -> Iterator[AtIndices]:
    for piece, values in zip(pieces, old, strict=True):
        if isinstance(piece.where, Tensor):
            yield AtIndices(piece.memory, piece.where, piece.patterns, values)


def _joined(places: Sequence[AtIndices]) -> Iterator[Scattered]:
    """The same places, on CUDA as one for each size of value."""
    if not places or not places[0].memory.is_cuda:
        yield from places
        return
    for same in _by_size(places):
        addresses = [place.memory.data_ptr() + place.where * place.old.element_size() for place in same]
        patterns, old = (torch.cat([getattr(place, name) for place in same]) for name in ("patterns", "old"))
        yield AtAddresses(torch.cat(addresses), patterns, old, frozenset().union(*(place.touched for place in same)))


def _by_size(places: Sequence[S]) -> Iterator[list[S]]:
    for size in {place.old.element_size() for place in places}:
        yield [place for place in places if place.old.element_size() == size]


def _shifts(pieces: Sequence[Piece], old: Sequence[Tensor]) -> list[PartDigest]:
    """What each piece adds to its part's digest."""
    found: dict[int, PartDigest] = {}
    for size in {values.element_size() for values in old}:
        chosen = [number for number, values in enumerate(old) if values.element_size() == size]
        indices = torch.cat([pieces[number].indices for number in chosen])
        patterns = torch.cat([*(pieces[number].patterns for number in chosen), *(old[number] for number in chosen)])
        lengths = [old[number].numel() for number in chosen]
        digests = digest_segments(torch.cat((indices, indices)), patterns, lengths * 2)
        found.update(zip(chosen, map(PartDigest.__sub__, digests, digests[len(chosen) :]), strict=False))
    return [found[number] for number in range(len(pieces))]


def _cat(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))
