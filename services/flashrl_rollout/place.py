"""Where elements of an update go in the engine's memory, with their old values beside the new ones.

Knows bit patterns and addresses; knows nothing of parts or of when to write.
"""

from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from flashrl_rollout import addressed


class Place(Protocol):
    """Elements of one size, and what they are to hold."""

    @property
    def nbytes(self) -> int:
        """Scratch memory that it takes."""

    @property
    def touched(self) -> frozenset[int]:
        """The storages it lies in, by data pointer."""

    def write(self) -> None:
        """Put the patterns in place."""

    def take_back(self) -> None:
        """Put the old patterns back; harmless where nothing was written."""

    def on_host(self) -> "Place":
        """The same for `take_back` only, without scratch memory on the device; before it is written."""


class Scattered(Place, Protocol):
    """A place whose old patterns were read before, because they are few."""

    @property
    def patterns(self) -> Tensor:
        """[n]."""

    @property
    def old(self) -> Tensor:
        """What is there before, [n]."""

    def read(self) -> Tensor:
        """What is there now, [n]."""


@dataclass(eq=False)
class InRun:
    """A run of one tensor [storage]. Old and new change places, so that an update of everything needs room once.

    `patterns` [n] are nobody else's: they hold the old values once the new ones are written and read back.
    """

    memory: Tensor
    run: slice
    patterns: Tensor
    lost: Tensor | None = None  # bool []: whether the device did not hold what was written to it
    _old: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Scratch memory that it takes."""
        return self.patterns.nbytes

    @property
    def touched(self) -> frozenset[int]:
        """The storage it lies in, by data pointer."""
        return frozenset((self.memory.data_ptr(),))

    def write(self) -> None:
        """Put the patterns in place and read them back, into `lost`; does not wait for the device."""
        self._old = self.memory[self.run].clone()
        self.memory[self.run] = self.patterns
        self.lost = self.memory[self.run].ne(self.patterns).any()
        self._old = self.patterns.copy_(self._old)

    def take_back(self) -> None:
        """Put the old patterns back; harmless where nothing was written."""
        if self._old is not None:
            self.memory[self.run] = self._old.to(self.memory.device)

    def on_host(self) -> "InRun":
        """The same for `take_back` only, without scratch memory on the device; before it is written."""
        return replace(self, patterns=self.patterns.new_empty(0), _old=self.memory[self.run].to("cpu", copy=True))


@dataclass(frozen=True)
class AtIndices:
    """`memory[where]` of one tensor [storage]."""

    memory: Tensor
    where: Tensor
    patterns: Tensor
    old: Tensor

    @property
    def nbytes(self) -> int:
        """Scratch memory that it takes."""
        return self.where.nbytes + self.patterns.nbytes + self.old.nbytes

    @property
    def touched(self) -> frozenset[int]:
        """The storage it lies in, by data pointer."""
        return frozenset((self.memory.data_ptr(),))

    def write(self) -> None:
        """Put the patterns in place."""
        self.memory.scatter_(0, self.where, self.patterns)

    def read(self) -> Tensor:
        """What is there now, [n]."""
        return self.memory.index_select(0, self.where)

    def take_back(self) -> None:
        """Put the old patterns back."""
        device = self.memory.device
        self.memory.scatter_(0, self.where.to(device), self.old.to(device))

    def on_host(self) -> "AtIndices":
        """The same for `take_back` only, without scratch memory on the device."""
        return replace(self, where=self.where.cpu(), old=self.old.cpu(), patterns=self.patterns.new_empty(0))


@dataclass(frozen=True)
class AtAddresses:
    """Elements all over a device's memory, in a few kernels and not in two for each of hundreds of tensors."""

    addresses: Tensor  # [n] int64, in bytes
    patterns: Tensor
    old: Tensor
    touched: frozenset[int]

    @property
    def nbytes(self) -> int:
        """Scratch memory that it takes."""
        return self.addresses.nbytes + self.patterns.nbytes + self.old.nbytes

    def write(self) -> None:
        """Put the patterns in place."""
        addressed.scatter(self.addresses, self.patterns)

    def read(self) -> Tensor:
        """What is there now, [n]."""
        return addressed.gather(self.addresses, self.patterns)

    def take_back(self) -> None:
        """Put the old patterns back."""
        device = self.patterns.device
        addressed.scatter(self.addresses.to(device), self.old.to(device))

    def on_host(self) -> "AtAddresses":
        """The same for `take_back` only, without scratch memory on the device."""
        return replace(self, addresses=self.addresses.cpu(), old=self.old.cpu(), patterns=self.patterns.new_empty(0))
