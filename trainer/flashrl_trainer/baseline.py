"""What the service last committed, sharded over the ranks: quantize, compare, encode, and move on once it is decided.

Every rank works on the rows it owns and needs the others for one sum only. Knows nothing of sockets or HTTP.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from flashrl_trainer.distributed import Ranks
from flashrl_trainer.model import Policy, Shard
from flashrl_wire import codec, digest
from flashrl_wire.delta import Change, diff, snapshot, write
from flashrl_wire.digest import PartDigest
from flashrl_wire.layout import SCALE_SUFFIX, PartSpec, TensorSpec, WeightLayout
from flashrl_wire.messages import Chunk, Segment
from flashrl_wire.quantize import quantize_rows


@dataclass(frozen=True)
class LocalPart:
    """This rank's shard of a stored array: `values` are the elements from flat index `start` on."""

    spec: PartSpec
    values: Tensor
    start: int


@dataclass(frozen=True)
class EncodedUpdate:
    """An update before it has a transfer: the whole of it on rank 0, this rank's changes elsewhere."""

    kind: str
    segments: list[Segment]
    chunks: list[Chunk]
    payloads: list[bytes]
    changed_elements: int
    digests: dict[str, PartDigest]
    changes: list[Change]  # this rank's, on its device

    @property
    def wire_bytes(self) -> int:
        """Compressed bytes."""
        return sum(chunk.wire_bytes for chunk in self.chunks)


class Baseline:
    """The committed stored form: this rank's shards of it, and the digests of the whole."""

    def __init__(self, layout: WeightLayout, ranks: Ranks, block_bytes: int) -> None:
        self._layout, self._ranks, self._block_bytes = layout, ranks, block_bytes
        self._parts = {part.name: part for part in layout.parts()}
        self._combiner = digest.Combiner(layout.parts())
        self._committed: dict[str, Tensor] = {}
        self._digests: dict[str, PartDigest] = {}

    @property
    def layout(self) -> WeightLayout:
        """What is stored how."""
        return self._layout

    def digest(self, digests: dict[str, PartDigest] | None = None) -> str:
        """The combined digest of the committed form, or of `digests`."""
        values = self._digests if digests is None else digests
        return self._combiner.combine(values)

    def capture(self, policy: Policy) -> None:
        """Take the policy's present weights as committed; ValueError names a tensor that is NaN or Inf."""
        self._committed = {}
        local = {name: PartDigest() for name in self._parts}
        for part in self._stored(policy):
            self._committed[part.spec.name] = part.values.reshape(-1).clone()
            local[part.spec.name] = digest.digest_range(part.values, part.start)
        self._digests = self._sum(local)

    def delta(self, policy: Policy) -> EncodedUpdate:
        """What differs from the committed form."""
        changes, shifts = [], {name: PartDigest() for name in self._parts}
        for part in self._stored(policy):
            found = diff(part.spec.name, self._committed[part.spec.name], part.values, part.start)
            if found is not None:
                changes.append(found[0])
                shifts[part.spec.name] = found[1]
        total = self._sum(shifts)
        digests = {name: self._digests[name] + total[name] for name in self._parts}
        return self._gather("delta", changes, digests)

    def snapshot(self, policy: Policy) -> EncodedUpdate:
        """Everything, for a service that holds another base."""
        local = {name: PartDigest() for name in self._parts}
        changes = []
        for part in self._stored(policy):
            changes.append(snapshot(part.spec.name, part.values, part.start))
            local[part.spec.name] = digest.digest_range(part.values, part.start)
        return self._gather("snapshot", changes, self._sum(local))

    def advance(self, update: EncodedUpdate) -> None:
        """Take a committed update as the new base."""
        for change in update.changes:
            start = self._start(change)
            write(_moved(change, start), self._committed[change.part])
        self._digests = update.digests

    def _start(self, change: Change) -> int:
        rows, row_elements = _rows(self._parts[change.part])
        return self._ranks.first_row(rows) * row_elements

    def _stored(self, policy: Policy) -> Iterator[LocalPart]:
        specs = {spec.name: spec for spec in self._layout.tensors}
        for shard in policy.shards(self._ranks):
            yield from _stored_parts(shard, specs[shard.name])

    def _sum(self, local: dict[str, PartDigest]) -> dict[str, PartDigest]:
        lanes = torch.tensor([[_signed(d.low), _signed(d.high)] for d in local.values()], dtype=torch.int64)
        total = self._ranks.sum(lanes).tolist()
        mask = (1 << 64) - 1
        return {name: PartDigest(low & mask, high & mask) for name, (low, high) in zip(local, total, strict=True)}

    def _gather(self, kind: str, changes: list[Change], digests: dict[str, PartDigest]) -> EncodedUpdate:
        encoded = codec.encode((_on_cpu(change) for change in changes), self._block_bytes)
        pieces = self._ranks.gather(encoded)
        return EncodedUpdate(
            kind=kind,
            segments=[segment for piece in pieces for segment in piece.segments],
            chunks=[chunk for piece in pieces for chunk in piece.chunks],
            payloads=[payload for piece in pieces for payload in piece.payloads],
            changed_elements=sum(piece.changed_elements for piece in pieces),
            digests=digests,
            changes=changes,
        )


def _stored_parts(shard: Shard, spec: TensorSpec) -> Iterable[LocalPart]:
    values = shard.local.to(torch.bfloat16)
    row_elements = values[:1].numel() if shard.local.shape[0] else 0
    try:
        if spec.storage == "bf16":
            if not bool(torch.isfinite(values).all()):
                raise ValueError("a weight is NaN or Inf")
            return [LocalPart(spec.parts()[0], values, shard.first_row * row_elements)]
        codes, scales = quantize_rows(values, spec.storage)
    except ValueError as error:
        raise ValueError(f"{shard.name}: {error}; it was not published") from error
    codes_spec, scales_spec = spec.parts()
    assert scales_spec.name == spec.name + SCALE_SUFFIX
    return [
        LocalPart(codes_spec, codes, shard.first_row * row_elements),
        LocalPart(scales_spec, scales, shard.first_row),
    ]


def _rows(part: PartSpec) -> tuple[int, int]:
    return part.shape[0], part.numel // part.shape[0]


def _moved(change: Change, start: int) -> Change:
    """The change with positions relative to a shard that begins at `start`."""
    indices = None if change.indices is None else change.indices - start
    return Change(change.part, change.values, indices, change.start - start if indices is None else 0)


def _on_cpu(change: Change) -> Change:
    indices = None if change.indices is None else change.indices.cpu()
    return Change(change.part, change.values.cpu(), indices, change.start, change.changed)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
