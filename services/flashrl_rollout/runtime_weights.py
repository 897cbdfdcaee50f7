"""The engine's weights as stored parts: read, replaced in place, taken back.

Knows parts, changes and bits; knows nothing of vLLM, files or processes.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack

import torch
from torch import Tensor

from flashrl_rollout.runtime_map import Piece, RuntimePart
from flashrl_rollout.undo import UndoLog
from flashrl_wire.codec import PART_DTYPE
from flashrl_wire.delta import Change
from flashrl_wire.digest import PartDigest

Shifts = dict[str, dict[str, PartDigest]]
"""Per part and region key, what an update added to the digest."""

Refresh = Callable[[set[int]], None]
"""Brings derived copies up to date with the storages that were written, given by data pointer."""


class TakeBackError(RuntimeError):
    """A failed write could not be undone: the weights are of no known version."""


class RuntimeWeights:
    """One pending update at a time: `write`, then `keep` or `revert`."""

    def __init__(self, parts: Mapping[str, RuntimePart], refresh: Refresh) -> None:
        self._parts = parts
        self._refresh = refresh
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
        shifts: Shifts = {}
        with ExitStack() as unless_whole:
            unless_whole.callback(self._take_back)
            if self._touched:
                self.revert()  # an update that was neither kept nor taken back, because its caller went away
            for change in changes:
                self._write(change, shifts.setdefault(change.part, {}))
            self._refresh(self._touched)
            unless_whole.pop_all()
        return shifts

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

    def _write(self, change: Change, shifts: dict[str, PartDigest]) -> None:
        part = self._checked(change)
        copies: dict[str, dict[int, PartDigest]] = {}
        for piece in part.pieces(change):
            written = copies.setdefault(piece.key, {})
            written[piece.copy] = written.get(piece.copy, PartDigest()) + self._replace(piece)
        for key, written in copies.items():
            first, *others = written.values()
            if any(other != first for other in others):
                raise ValueError(f"two copies of {change.part} differ")
            shifts[key] = shifts.get(key, PartDigest()) + first

    def _checked(self, change: Change) -> RuntimePart:
        part = self._parts.get(change.part)
        if part is None:
            raise ValueError(f"{change.part} is no part of this model")
        if PART_DTYPE[change.values.dtype] != part.spec.dtype:
            raise ValueError(f"{change.part} holds {part.spec.dtype}, not {change.values.dtype}")
        low, high = _bounds(change)
        if low < 0 or high > part.spec.numel:
            raise ValueError(f"{change.part} has {part.spec.numel} elements, the change reaches from {low} to {high}")
        return part

    def _replace(self, piece: Piece) -> PartDigest:
        old = _read(piece)
        self._undo.add(piece.memory, piece.where, old)
        self._touched.add(piece.memory.data_ptr())
        piece.memory[piece.where] = piece.patterns
        new = _read(piece)
        if not torch.equal(new, piece.patterns):
            raise ValueError("the engine's memory does not hold what was written")
        return piece.digest(new) - piece.digest(old)


def _bounds(change: Change) -> tuple[int, int]:
    """First element and one past the last that a change touches."""
    if change.indices is None:
        return change.start, change.start + change.values.numel()
    if change.indices.numel() == 0:
        return 0, 0
    return int(change.indices.min()), int(change.indices.max()) + 1


def _read(piece: Piece) -> Tensor:
    return piece.memory[piece.where].clone()
