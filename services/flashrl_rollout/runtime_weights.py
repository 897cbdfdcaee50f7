"""The engine's weights as stored parts: read, replaced in place, taken back.

Knows parts, changes and bits; knows nothing of vLLM, files or processes.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack

import torch

from flashrl_rollout.runtime_map import RuntimePart
from flashrl_rollout.undo import UndoLog
from flashrl_rollout.write_group import Written, groups, moved, shifts
from flashrl_wire.codec import PART_DTYPE
from flashrl_wire.delta import Change
from flashrl_wire.digest import PartDigest

# CPU: too small for torch to split over threads, whose barriers cost more than the work; CUDA: bounds scratch memory
_GROUP_ELEMENTS = {"cpu": 1 << 15, "cuda": 1 << 22}

Shifts = dict[str, dict[str, PartDigest]]
"""Per part and region key, what an update added to the digest."""

Refresh = Callable[[set[int]], None]
"""Brings derived copies up to date with the storages that were written, given by data pointer."""


class TakeBackError(RuntimeError):
    """A failed write could not be undone: the weights are of no known version."""


class RuntimeWeights:
    """One pending update at a time: `write`, then `keep` or `revert`."""

    def __init__(self, parts: Mapping[str, RuntimePart], refresh: Refresh, group_elements: int | None = None) -> None:
        self._parts = parts
        self._refresh = refresh
        self._device = next((held.memory.device for part in parts.values() for held in part.held), torch.device("cpu"))
        self._group_elements = group_elements or _GROUP_ELEMENTS.get(self._device.type, 1 << 20)
        self._undo = UndoLog()
        self._touched: set[int] = set()

    def digests(self) -> Shifts:
        """Digest of every region, computed from the engine's memory."""
        return {name: part.digests() for name, part in self._parts.items()}

    def write(self, changes: Iterable[Change]) -> Shifts:
        """Write changes in place, read them back, and tell what they added to the digests; a pending update is dropped.

        Raises ValueError for a change that does not fit or a write that does not stick. Whatever is raised, also by
        `changes`, the old values are back, except for TakeBackError, where they could not be put back.
        """
        with ExitStack() as unless_whole:
            unless_whole.callback(self._take_back)
            if self._touched:
                self.revert()  # an update that was neither kept nor taken back, because its caller went away
            totals = self._write(map(self._checked, changes))
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

    def _write(self, changes: Iterable[Change]) -> Shifts:
        copies: dict[tuple[str, str], dict[int, PartDigest]] = {}
        for group in groups(changes, self._group_elements):
            written = [item for change in moved(group, self._device) for item in self._written(change)]
            for item, shift in zip(written, shifts(written), strict=True):
                found = copies.setdefault((item.part, item.piece.key), {})
                found[item.piece.copy] = found.get(item.piece.copy, PartDigest()) + shift
        totals: Shifts = {}
        for (part, key), found in copies.items():
            first, *others = found.values()
            if any(other != first for other in others):
                raise ValueError(f"two copies of {part} differ")
            totals.setdefault(part, {})[key] = first
        return totals

    def _written(self, change: Change) -> Iterator[Written]:
        for piece in self._parts[change.part].pieces(change):
            old = piece.memory[piece.where].clone() if isinstance(piece.where, slice) else piece.memory[piece.where]
            self._undo.add(piece.memory, piece.where, old)
            self._touched.add(piece.memory.data_ptr())
            piece.memory[piece.where] = piece.patterns
            yield Written(change.part, piece, old)

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


def _bounds(change: Change) -> tuple[int, int]:
    """First element and one past the last that a change touches."""
    if change.indices is None:
        return change.start, change.start + change.values.numel()
    if change.indices.numel() == 0:
        return 0, 0
    return int(change.indices.min()), int(change.indices.max()) + 1
