"""The old values of everything that an update has written, so that it can be taken back.

As large as the update, not as the model. Knows memory and bit patterns; knows nothing of names.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class _Entry:
    memory: Tensor
    where: slice | Tensor
    patterns: Tensor


class UndoLog:
    """Old bit patterns, the first `device_bytes` of them on the device they came from, the rest on the host."""

    def __init__(self, device_bytes: int = 1 << 28) -> None:
        self._device_bytes = device_bytes
        self._room = device_bytes
        self._entries: list[_Entry] = []

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, memory: Tensor, where: slice | Tensor, patterns: Tensor, *, is_resident: bool = False) -> None:
        """Remember that `memory[where]` held `patterns`; before it is overwritten.

        What `is_resident` stays where it is, whatever the room: it was there before the update began.
        """
        if not is_resident:
            self._room -= patterns.nbytes + (where.nbytes if isinstance(where, Tensor) else 0)
            if self._room < 0:
                patterns = patterns.cpu()
                where = where.cpu() if isinstance(where, Tensor) else where
        self._entries.append(_Entry(memory, where, patterns))

    def take_back(self) -> None:
        """Write the old patterns back, newest first, and forget them one by one."""
        while self._entries:
            entry = self._entries[-1]
            where = entry.where.to(entry.memory.device) if isinstance(entry.where, Tensor) else entry.where
            entry.memory[where] = entry.patterns.to(entry.memory.device)
            self._entries.pop()
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()
        self._room = self._device_bytes
