"""Several updates in a row as one: the last writer of an element wins.

Knows changes; knows nothing of versions or of who missed what.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

from flashrl_wire.delta import Change
from flashrl_wire.digest import bits


def merge(changes: Iterable[Change]) -> list[Change]:
    """One change a part, in the order in which parts first appear, with the effect of `changes` written one by one.

    CPU changes only. `changed` becomes an upper bound: an element may have been set back in between.
    """
    by_part: dict[str, list[Change]] = defaultdict(list)
    for change in changes:
        by_part[change.part].append(change)
    return [group[0] if len(group) == 1 else _last_written(group) for group in by_part.values()]


def _last_written(changes: list[Change]) -> Change:
    positions = torch.cat([_positions(change) for change in changes])
    values = torch.cat([bits(change.values).reshape(-1) for change in changes])
    order = positions.argsort(stable=True)  # of equal positions the last written comes last
    ordered = positions[order]
    is_last = torch.ones(len(ordered), dtype=torch.bool)
    is_last[:-1] = ordered[1:] != ordered[:-1]
    indices, kept = ordered[is_last], values[order[is_last]].view(changes[0].values.dtype)
    changed = min(len(indices), sum(change.changed for change in changes))
    start = int(indices[0])
    if int(indices[-1]) - start + 1 == len(indices):
        return Change(changes[0].part, kept, start=start, changed=changed)
    return Change(changes[0].part, kept, indices, changed=changed)


def _positions(change: Change) -> Tensor:
    if change.indices is None:
        return torch.arange(change.start, change.start + change.values.numel())
    return change.indices
