"""A group of changes with everything done that can be done before they are written: on the device, the old values read,
the digests computed.

Only reads the engine's memory, so sampling may go on meanwhile. An update touches hundreds of parts, most of them a
little; in groups a device is waited for once a group and not once a part. Knows pieces and bits; knows nothing of
undoing.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from flashrl_rollout.place import AtAddresses, InTensor, Place
from flashrl_rollout.runtime_map import Piece, RuntimePart
from flashrl_wire.delta import Change
from flashrl_wire.digest import PartDigest, bits, digest_segments

Shifts = dict[str, dict[str, PartDigest]]
"""Per part and region key, what an update added to the digest."""

P = TypeVar("P", bound=Place)
CopyKey = tuple[str, str, int]
"""Part, region key, and which of the part's regions: copies of one region have one key."""


@dataclass(frozen=True)
class ReadyGroup:
    """What a group of changes writes, and what that adds to the digests."""

    places: tuple[Place, ...]
    shifts: tuple[tuple[CopyKey, PartDigest], ...]

    @classmethod
    def of(cls, changes: Sequence[Change], parts: Mapping[str, RuntimePart], device: torch.device) -> "ReadyGroup":
        """Read the engine's memory where `changes` will write; no element of it twice."""
        pieces = [(c.part, piece) for c in moved(changes, device) for piece in parts[c.part].pieces(c)]
        places = [_place(piece) for _, piece in pieces]
        held = [(part, piece.key, piece.copy) for part, piece in pieces]
        return cls(tuple(_joined(places)), tuple(zip(held, _shifts([p for _, p in pieces], places), strict=True)))

    @property
    def nbytes(self) -> int:
        """Scratch memory that it takes."""
        return sum(place.nbytes for place in self.places)

    def check(self) -> None:
        """Read back what was written; ValueError where it is not there."""
        for same in _by_size(self.places):
            if not torch.equal(torch.cat([p.read() for p in same]), torch.cat([p.patterns for p in same])):
                raise ValueError("the engine's memory does not hold what was written")


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


def _place(piece: Piece) -> InTensor:
    place = InTensor(piece.memory, piece.where, piece.patterns, piece.patterns)
    old = place.read()
    return replace(place, old=old.clone() if isinstance(piece.where, slice) else old)


def _joined(places: Sequence[InTensor]) -> Iterator[Place]:
    """The same places, on CUDA those that are scattered over tensors as one for each size of value."""
    scattered = []
    for place in places:
        if isinstance(place.where, Tensor) and place.memory.is_cuda:
            scattered.append(place)
        else:
            yield place
    for same in _by_size(scattered):
        addresses = [p.memory.data_ptr() + p.where * p.old.element_size() for p in same if isinstance(p.where, Tensor)]
        patterns, old = (torch.cat([getattr(place, name) for place in same]) for name in ("patterns", "old"))
        yield AtAddresses(torch.cat(addresses), patterns, old, frozenset().union(*(place.touched for place in same)))


def _by_size(places: Sequence[P]) -> Iterator[list[P]]:
    for size in {place.old.element_size() for place in places}:
        yield [place for place in places if place.old.element_size() == size]


def _shifts(pieces: Sequence[Piece], places: Sequence[InTensor]) -> list[PartDigest]:
    """What each piece adds to its part's digest."""
    found: dict[int, PartDigest] = {}
    for size in {place.old.element_size() for place in places}:
        chosen = [number for number, place in enumerate(places) if place.old.element_size() == size]
        indices = torch.cat([pieces[number].indices for number in chosen])
        new, old = (torch.cat([getattr(places[n], name) for n in chosen]) for name in ("patterns", "old"))
        lengths = [places[number].old.numel() for number in chosen]
        digests = digest_segments(torch.cat((indices, indices)), torch.cat((new, old)), lengths * 2)
        found.update(zip(chosen, map(PartDigest.__sub__, digests, digests[len(chosen) :]), strict=False))
    return [found[number] for number in range(len(places))]
