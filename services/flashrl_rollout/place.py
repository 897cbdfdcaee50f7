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
    def patterns(self) -> Tensor:
        """[n]."""

    @property
    def old(self) -> Tensor:
        """What is there before, [n]."""

    @property
    def nbytes(self) -> int:
        """Scratch memory that it takes."""

    @property
    def touched(self) -> frozenset[int]:
        """The storages it lies in, by data pointer."""

    def write(self) -> None:
        """Put the patterns in place."""

    def read(self) -> Tensor:
        """What is there now, [n]."""

    def take_back(self) -> None:
        """Put the old patterns back."""

    def on_host(self) -> "Place":
        """The same for `take_back` only, without scratch memory on the device."""


@dataclass(frozen=True)
class InTensor:
    """`memory[where]` of one tensor [storage]."""

    memory: Tensor
    where: slice | Tensor
    patterns: Tensor
    old: Tensor

    @property
    def nbytes(self) -> int:
        """Scratch memory that it takes."""
        return self.patterns.nbytes + self.old.nbytes + (self.where.nbytes if isinstance(self.where, Tensor) else 0)

    @property
    def touched(self) -> frozenset[int]:
        """The storage it lies in, by data pointer."""
        return frozenset((self.memory.data_ptr(),))

    def write(self) -> None:
        """Put the patterns in place."""
        self._put(self.patterns)

    def _put(self, patterns: Tensor) -> None:
        if isinstance(self.where, slice):
            self.memory[self.where] = patterns
        else:
            self.memory.scatter_(0, self.where.to(self.memory.device), patterns)

    def read(self) -> Tensor:
        """What is there now, [n]."""
        return self.memory[self.where] if isinstance(self.where, slice) else self.memory.index_select(0, self.where)

    def take_back(self) -> None:
        """Put the old patterns back."""
        self._put(self.old.to(self.memory.device))

    def on_host(self) -> "InTensor":
        """The same for `take_back` only, without scratch memory on the device."""
        where = self.where.cpu() if isinstance(self.where, Tensor) else self.where
        return replace(self, where=where, old=self.old.cpu(), patterns=self.patterns.new_empty(0))


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
