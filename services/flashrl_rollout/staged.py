"""A verified update as a file in shared memory, on its way from the service to the engine's workers.

Knows offsets and dtypes; knows nothing of codecs, transfers or runtime parameters.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel

from flashrl_wire.codec import PART_DTYPE, TORCH_DTYPE
from flashrl_wire.delta import Change
from flashrl_wire.digest import bits
from flashrl_wire.layout import ITEM_BYTES, PartDtype

_ALIGN = 64


class StagedChange(BaseModel):
    """Where a change lies in the file; `indices_at` is -1 for a consecutive range from `start`."""

    part: str
    dtype: PartDtype
    count: int
    start: int
    values_at: int
    indices_at: int


class StagedUpdate(BaseModel):
    """A file (mode 0600) of index and value arrays, and what lies where."""

    path: str
    changes: list[StagedChange]

    @property
    def num_bytes(self) -> int:
        """Bytes of values and indices."""
        return sum(c.count * (ITEM_BYTES[c.dtype] + 8 * (c.indices_at >= 0)) for c in self.changes)


def write_staged(path: Path, changes: Iterable[Change]) -> StagedUpdate:
    """Write CPU changes to `path`; OSError where there is no room."""
    with path.open("xb") as file:
        path.chmod(0o600)
        return StagedUpdate(path=str(path), changes=[_write_change(file, change) for change in changes])


def _write_change(file: BinaryIO, change: Change) -> StagedChange:
    indices_at = -1 if change.indices is None else _append(file, change.indices.numpy())
    values_at = _append(file, bits(change.values).numpy())
    return StagedChange(
        part=change.part,
        dtype=PART_DTYPE[change.values.dtype],
        count=change.values.numel(),
        start=change.start,
        values_at=values_at,
        indices_at=indices_at,
    )


def _append(file: BinaryIO, array: NDArray[np.generic]) -> int:
    file.write(bytes(-file.tell() % _ALIGN))
    offset = file.tell()
    file.write(array.data)
    return offset


def read_staged(update: StagedUpdate) -> Iterator[Change]:
    """The changes, as CPU tensors over the mapped file."""
    if not update.changes:
        return
    mapped = np.memmap(update.path, dtype=np.uint8, mode="c")  # copy-on-write: torch wants memory it may write
    for staged in update.changes:
        values = _view(mapped, staged.values_at, staged.count, TORCH_DTYPE[staged.dtype], ITEM_BYTES[staged.dtype])
        indices = None
        if staged.indices_at >= 0:
            indices = _view(mapped, staged.indices_at, staged.count, torch.int64, 8)
        yield Change(staged.part, values, indices, staged.start)


def _view(mapped: NDArray[np.uint8], offset: int, count: int, dtype: torch.dtype, item: int) -> torch.Tensor:
    return torch.from_numpy(mapped[offset : offset + count * item]).view(dtype)
