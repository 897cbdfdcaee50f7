"""The last deltas, for replicas that missed some: within a limit of bytes, and as one delta to whoever asks.

Knows encoded updates; knows nothing of replicas, sockets or the policy.
"""

from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np

from flashrl_trainer.outgoing import Held, Outgoing
from flashrl_wire import codec
from flashrl_wire.delta import Change
from flashrl_wire.layout import WeightLayout
from flashrl_wire.merge import merge


class DeltaRing:
    """A chain: each delta starts where the one before it ended. Used under its owner's lock."""

    def __init__(self, layout: WeightLayout, max_bytes: int, block_bytes: int) -> None:
        self._max_bytes, self._block_bytes = max_bytes, block_bytes
        self._parts = {part.name: part for part in layout.parts()}
        self._deltas: deque[Outgoing] = deque()
        self._merged: Outgoing | None = None

    @property
    def wire_bytes(self) -> int:
        """What is kept."""
        return sum(delta.wire_bytes for delta in self._deltas)

    def add(self, delta: Outgoing) -> None:
        """Keep a delta that was committed somewhere; the oldest ones make room for it."""
        if self._deltas and self._deltas[-1].target != delta.base:
            self._deltas.clear()
        self._deltas.append(delta)
        while self._deltas and self.wire_bytes > self._max_bytes:
            self._deltas.popleft()

    def since(self, held: Held) -> list[Outgoing]:
        """The deltas that lead from `held` to the latest state; none where it is too old.

        A state counts by its digest: the same weights may stand under another number.
        """
        deltas = list(self._deltas)
        if not deltas or held.version >= deltas[-1].target.version:
            return []
        for start in reversed(range(len(deltas))):
            base = deltas[start].base
            if base is not None and base.digest == held.digest:
                return deltas[start:]
        return []

    def merged(self, path: Sequence[Outgoing]) -> Outgoing:
        """The deltas of `since` as one.

        The last one made is kept: services start again from the same weights, so the next begins where it did.
        """
        last = self._merged
        covered = [delta.target for delta in path]
        if last is not None and last.base == path[0].base and last.target in covered:
            path = [last, *path[covered.index(last.target) + 1 :]]
        if len(path) == 1:
            return path[0]
        self._merged = self._as_one(path)
        return self._merged

    def _as_one(self, path: Sequence[Outgoing]) -> Outgoing:
        changes = merge(change for delta in path for change in self._changes(delta))
        encoded = codec.encode(changes, self._block_bytes)
        return Outgoing(
            base=path[0].base,
            target=path[-1].target,
            layout_hash=path[-1].layout_hash,
            changed_elements=encoded.changed_elements,
            segments=encoded.segments,
            chunks=encoded.chunks,
            payloads=encoded.payloads,
        )

    def _changes(self, delta: Outgoing) -> Iterator[Change]:
        # each rank's segments begin in a chunk of their own, and the raw stream is all of them in order
        raw = b"".join(map(codec.decompress, delta.chunks, delta.payloads))
        return codec.decode(delta.segments, np.frombuffer(raw, dtype=np.uint8), self._parts)
