"""Changes written, read back and digested in groups, so that a device is waited for once a group and not once a part.

An update touches hundreds of parts, most of them a little; sampling stands still meanwhile. Knows pieces and bits;
knows nothing of names or of undoing.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flashrl_rollout.runtime_map import Piece
from flashrl_wire.delta import Change
from flashrl_wire.digest import PartDigest, bits, digest_segments


@dataclass(frozen=True)
class Written:
    """A piece whose patterns are in the engine's memory, and the old ones."""

    part: str
    piece: Piece
    old: Tensor  # [n]


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
    indices = _moved([change.indices for change in changes if change.indices is not None], device)
    values = {
        size: _moved([bits(change.values) for change in changes if change.values.element_size() == size], device)
        for size in {change.values.element_size() for change in changes}
    }
    for change in changes:
        where = None if change.indices is None else next(indices)
        yield Change(change.part, next(values[change.values.element_size()]), where, change.start)


def _moved(tensors: list[Tensor], device: torch.device) -> Iterator[Tensor]:
    """Tensors of one type, joined for their way to a device and cut apart again there."""
    if tensors:
        yield from torch.split(torch.cat(tensors).to(device), [tensor.numel() for tensor in tensors])


def shifts(written: Sequence[Written]) -> list[PartDigest]:
    """What each written piece added to its part's digest, as read back; ValueError where a write did not stick."""
    found: dict[int, PartDigest] = {}
    for size in {item.old.element_size() for item in written}:
        chosen = [number for number, item in enumerate(written) if item.old.element_size() == size]
        found.update(zip(chosen, _shifts([written[number] for number in chosen]), strict=True))
    return [found[number] for number in range(len(written))]


def _shifts(written: Sequence[Written]) -> Iterator[PartDigest]:
    """The same for pieces of one size of value."""
    pieces = [item.piece for item in written]
    new = torch.cat([piece.memory[piece.where] for piece in pieces])
    if not torch.equal(new, torch.cat([piece.patterns for piece in pieces])):
        raise ValueError("the engine's memory does not hold what was written")
    indices = torch.cat([piece.indices for piece in pieces])
    old = torch.cat([item.old for item in written])
    lengths = [item.old.numel() for item in written]
    digests = digest_segments(torch.cat((indices, indices)), torch.cat((new, old)), lengths * 2)
    return (after - before for after, before in zip(digests[: len(written)], digests[len(written) :], strict=True))
