"""The engine's weights as stored parts: read, replaced in place, taken back.

Knows parts, changes and bits; knows nothing of vLLM, files or processes.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain

import psutil  # type: ignore[import-untyped]
import torch
from torch import Tensor

from flashrl_rollout.ready_group import CopyKey, ReadyGroup, Shifts, groups
from flashrl_rollout.runtime_map import RuntimePart
from flashrl_rollout.undo import UndoLog
from flashrl_wire.codec import PART_DTYPE
from flashrl_wire.delta import Change
from flashrl_wire.digest import PartDigest

# CPU: too small for torch to split over threads, whose barriers cost more than the work; CUDA: bounds scratch memory
_GROUP_ELEMENTS = {"cpu": 1 << 15, "cuda": 1 << 22}
_AHEAD_BYTES = {"cpu": 1 << 30, "cuda": 2 << 30}  # scratch memory of an update that waits to be written
_LEFT_FREE = 4 << 30  # of a GPU's memory, for whoever shares it; half of what is free where that is more than it

Refresh = Callable[[set[int]], None]
"""Brings derived copies up to date with the storages that were written, given by data pointer."""


class TakeBackError(RuntimeError):
    """A failed write could not be undone: the weights are of no known version."""


@dataclass(frozen=True)
class Prepared:
    """An update as far as it could be made ready, and the groups that are still to be; `shifts` where none are."""

    ready: list[ReadyGroup]
    rest: Iterator[list[Change]]
    shifts: Shifts | None = None


class RuntimeWeights:
    """One pending update at a time: `write`, then `keep` or `revert`."""

    def __init__(
        self,
        parts: Mapping[str, RuntimePart],
        refresh: Refresh,
        group_elements: int | None = None,
    ) -> None:
        self._parts = parts
        self._refresh = refresh
        self._device = next((held.memory.device for part in parts.values() for held in part.held), torch.device("cpu"))
        self._group_elements = group_elements or _GROUP_ELEMENTS.get(self._device.type, 1 << 20)
        self._undo = UndoLog()
        self._touched: set[int] = set()

    def digests(self) -> Shifts:
        """Digest of every region, computed from the engine's memory."""
        return {name: part.digests() for name, part in self._parts.items()}

    def prepare(self, changes: Iterable[Change], max_bytes: int | None = None) -> Prepared:
        """Make changes ready in scratch memory of `max_bytes`, or of what may be taken; None: the default.

        Nothing is written, so sampling may go on meanwhile.

        What is returned is right for as long as nothing else is written. ValueError for a change that does not fit.
        """
        ready: list[ReadyGroup] = []
        rest = groups(map(self._checked, changes), self._group_elements)
        # a pending update may be taken back: nothing can be read ahead on top of it
        room, reached = 0 if self._touched else self._room(max_bytes), dict[str, int]()
        for group in rest:
            if room <= 0 or not _ascend(group, reached):
                return Prepared(ready, chain([group], rest))
            ready.append(self._ready(group))
            room -= ready[-1].nbytes
        return Prepared(ready, iter(()), _shifts(ready))

    def _room(self, max_bytes: int | None) -> int:
        wanted = _AHEAD_BYTES.get(self._device.type, 0) if max_bytes is None else max_bytes
        if self._device.type != "cuda":
            return min(wanted, int(psutil.virtual_memory().available) // 4)
        unused = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        free = (
            torch.cuda.mem_get_info(self._device)[0] + unused
        )  # the last update's scratch is torch's, to be used again
        return min(wanted, max(free // 2, free - _LEFT_FREE))

    def _ready(self, group: list[Change]) -> ReadyGroup:
        return ReadyGroup.of(group, self._parts, self._device)

    def write(self, changes: Iterable[Change] | Prepared) -> Shifts:
        """Write changes in place, read them back, and tell what they added to the digests; a pending update is dropped.

        Raises ValueError for a change that does not fit or a write that does not stick. Whatever is raised, also by
        `changes`, the old values are back, except for TakeBackError, where they could not be put back.
        """
        with ExitStack() as unless_whole:
            unless_whole.callback(self._take_back)
            if self._touched:
                self.revert()  # an update that was neither kept nor taken back, because its caller went away
            if not isinstance(changes, Prepared):
                changes = Prepared([], groups(map(self._checked, changes), self._group_elements))
            totals = self._write(changes)
            self._refresh(self._touched)
            unless_whole.pop_all()
        return totals

    def revert(self) -> None:
        """Put back what the pending update replaced; nothing where none is pending."""
        self._undo.take_back()
        self._refresh(self._touched)
        self._touched.clear()

    def keep(self) -> None:
        """Forget what the pending update replaced."""
        self._undo.clear()
        self._touched.clear()

    def _take_back(self) -> None:
        try:
            self.revert()
        except RuntimeError as error:
            raise TakeBackError(f"the old values could not be put back: {error}") from error

    def _write(self, update: Prepared) -> Shifts:
        for group in update.ready:
            self._put(group, is_resident=True)
        _check(chain.from_iterable(group.lost() for group in update.ready))  # once all of it is written: it waits
        if update.shifts is not None:
            return update.shifts
        return _shifts(chain(update.ready, map(self._ready_and_put, update.rest)))

    def _ready_and_put(self, changes: list[Change]) -> ReadyGroup:
        group = self._ready(changes)
        self._put(group, is_resident=False)
        _check(group.lost())
        return group

    def _put(self, group: ReadyGroup, *, is_resident: bool) -> None:
        for place in group.places:
            self._undo.add(place, is_resident=is_resident)
            self._touched |= place.touched
            place.write()

    def _checked(self, change: Change) -> Change:
        part = self._parts.get(change.part)
        if part is None:
            raise ValueError(f"{change.part} is no part of this model")
        if PART_DTYPE[change.values.dtype] != part.spec.dtype:
            raise ValueError(f"{change.part} holds {part.spec.dtype}, not {change.values.dtype}")
        low, high = _bounds(change)
        if low < 0 or high > part.spec.numel:
            raise ValueError(f"{change.part} has {part.spec.numel} elements, the change reaches from {low} to {high}")
        return change


def as_text(shifts: Shifts) -> dict[str, dict[str, str]]:
    """Digests as hex, in the form that `rank_replies` reads."""
    return {part: {key: digest.hex() for key, digest in regions.items()} for part, regions in shifts.items()}


def _shifts(groups: Iterable[ReadyGroup]) -> Shifts:
    """What groups add up to, region by region; ValueError where copies of one took different changes."""
    found: dict[CopyKey, PartDigest] = {}
    for group in groups:
        for held, shift in group.shifts:
            found[held] = found.get(held, PartDigest()) + shift
    totals: Shifts = {}
    for (part, key, _), shift in found.items():
        if totals.setdefault(part, {}).setdefault(key, shift) != shift:
            raise ValueError(f"two copies of {part} differ")
    return totals


def _check(lost: Iterable[Tensor]) -> None:
    """Wait for the device; ValueError where any is true."""
    flags = list(lost)
    if flags and bool(torch.stack(flags).any()):
        raise ValueError("the engine's memory does not hold what was written")


def _ascend(group: list[Change], reached: dict[str, int]) -> bool:
    """Whether all of a group lies beyond what was `reached` in its parts; what it reaches is noted then.

    The old values of an element that is written twice cannot be read before its first writing.
    """
    bounds = {change.part: _bounds(change) for change in group}
    if any(low < reached.get(part, 0) for part, (low, _) in bounds.items()):
        return False
    reached.update((part, high) for part, (_, high) in bounds.items())
    return True


def _bounds(change: Change) -> tuple[int, int]:
    """First element and one past the last that a change touches."""
    if change.indices is None:
        return change.start, change.start + change.values.numel()
    if change.indices.numel() == 0:
        return 0, 0
    return int(change.indices.min()), int(change.indices.max()) + 1
