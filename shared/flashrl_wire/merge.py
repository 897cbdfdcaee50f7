"""Several updates in a row as one: the last writer of an element wins.

Knows changes; knows nothing of versions or of who missed what.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

from flashrl_wire.delta import Change
from flashrl_wire.digest import bits

_DENSE_SHARE = 1 / 8  # of elements written, from which writing them takes less time and memory than sorting


def merge(changes: Iterable[Change]) -> list[Change]:
    """One change a part, in the order in which parts first appear, with the effect of `changes` written one by one.

    CPU changes only. `changed` becomes an upper bound: an element may have been set back in between.
    """
    by_part: dict[str, list[Change]] = defaultdict(list)
    for change in changes:
        by_part[change.part].append(change)
    return [group[0] if len(group) == 1 else _last_written(group) for group in by_part.values()]


def _last_written(changes: list[Change]) -> Change:
    total, end = sum(change.values.numel() for change in changes), max(map(_end, changes))
    indices, kept = _written(changes, end) if total >= _DENSE_SHARE * end else _sorted(changes)
    changed = min(len(indices), sum(change.changed for change in changes))
    start = int(indices[0])
    values = kept.view(changes[0].values.dtype)
    if int(indices[-1]) - start + 1 == len(indices):
        return Change(changes[0].part, values, start=start, changed=changed)
    return Change(changes[0].part, values, indices, changed=changed)


def _written(changes: list[Change], end: int) -> tuple[Tensor, Tensor]:
    """Indices and values by writing one after the other into memory for all elements up to `end`."""
    memory = torch.empty(end, dtype=bits(changes[0].values).dtype)
    is_written = torch.zeros(end, dtype=torch.bool)
    for change in changes:
        where = slice(change.start, _end(change)) if change.indices is None else change.indices
        memory[where] = bits(change.values).reshape(-1)
        is_written[where] = True
    indices = is_written.nonzero().reshape(-1)
    return indices, memory[indices]


def _sorted(changes: list[Change]) -> tuple[Tensor, Tensor]:
    """The same by sorting, in memory for what was written."""
    positions = torch.cat([_positions(change) for change in changes])
    values = torch.cat([bits(change.values).reshape(-1) for change in changes])
    order = positions.argsort(stable=True)  # of equal positions the last written comes last
    ordered = positions[order]
    is_last = torch.ones(len(ordered), dtype=torch.bool)
    is_last[:-1] = ordered[1:] != ordered[:-1]
    return ordered[is_last], values[order[is_last]]


def _end(change: Change) -> int:
    """One past the last element that it writes."""
    return change.start + change.values.numel() if change.indices is None else int(change.indices[-1]) + 1


def _positions(change: Change) -> Tensor:
    if change.indices is None:
        return torch.arange(change.start, change.start + change.values.numel())
    return change.indices
