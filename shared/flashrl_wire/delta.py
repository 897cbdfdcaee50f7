"""Differences between two stored states, element by element and bit for bit.

Knows the elements that changed and their absolute new values; knows nothing of bytes on a wire or of engines.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from flashrl_wire.digest import PartDigest, bits, digest_at, digest_range


@dataclass(frozen=True)
class Change:
    """New values for one part: at `indices`, or for the consecutive range from `start` where there are none.

    `Change("…norm.weight", values, indices=tensor([3, 17]))` or `Change("…norm.weight", values, start=512)`.
    """

    part: str
    values: Tensor  # [n], the part's dtype
    indices: Tensor | None = None  # [n] int64, ascending
    start: int = 0
    changed: int = 0  # how many of the values differ from the old ones

    @property
    def is_dense(self) -> bool:
        """Whether the values stand for a consecutive range."""
        return self.indices is None

    def digest(self) -> PartDigest:
        """What the new values contribute to the part's digest."""
        if self.indices is None:
            return digest_range(self.values, self.start)
        return digest_at(self.indices, self.values)


def snapshot(part: str, values: Tensor, start: int = 0) -> Change:
    """Every element of a part, or of the shard of it that begins at flat index `start`."""
    flat = values.reshape(-1)
    return Change(part, flat, start=start, changed=flat.numel())


def diff(part: str, old: Tensor, new: Tensor, start: int = 0) -> tuple[Change, PartDigest] | None:
    """The elements whose bits differ, and what they add to the part's digest; None where nothing differs.

    `old` and `new` are equally long shards that begin at flat index `start` of the part. Where indices would
    take more room than the values of the whole shard, the change is the whole shard.
    """
    where = (bits(old) != bits(new)).nonzero().flatten()
    if where.numel() == 0:
        return None
    before, after = old.reshape(-1), new.reshape(-1)
    indices = where + start
    shift = digest_at(indices, after[where]) - digest_at(indices, before[where])
    item = after.element_size()
    if where.numel() * (item + 2) >= after.numel() * item:
        return Change(part, after, start=start, changed=where.numel()), shift
    return Change(part, after[where], indices, changed=where.numel()), shift


def read(change: Change, flat: Tensor) -> Tensor:
    """The current values [n] of a flat part where `change` would write."""
    if change.indices is None:
        return flat[change.start : change.start + change.values.numel()].clone()
    return flat[change.indices]


def write(change: Change, flat: Tensor, values: Tensor | None = None) -> None:
    """Write the change's values, or `values` in their place, into a flat part of the same dtype."""
    new = change.values if values is None else values
    target, source = bits(flat), bits(new)
    if change.indices is None:
        target[change.start : change.start + source.numel()] = source
    else:
        target[change.indices] = source


def equal_bits(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors hold the same bits."""
    return torch.equal(bits(left), bits(right))
