"""An update as it leaves: immutable, encoded once, the same for every replica.

Knows what it leads from and to; knows nothing of replicas or of how it was computed.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from flashrl_trainer.baseline import Baseline, EncodedUpdate
from flashrl_wire.messages import Chunk, Manifest, Segment


class Held(NamedTuple):
    """Weights that a replica holds, or is to hold."""

    version: int
    digest: str


@dataclass(frozen=True)
class Outgoing:
    """A delta from `base` to `target`, or a snapshot of `target` (`base` is None)."""

    base: Held | None
    target: Held
    layout_hash: str
    changed_elements: int
    segments: list[Segment]
    chunks: list[Chunk]
    payloads: list[bytes]

    @property
    def kind(self) -> Literal["delta", "snapshot"]:
        """As the manifest says it."""
        return "snapshot" if self.base is None else "delta"

    @property
    def wire_bytes(self) -> int:
        """Compressed bytes."""
        return sum(chunk.wire_bytes for chunk in self.chunks)

    def manifest(self, run_id: str, there: Held) -> Manifest:
        """The declaration for a replica that holds `there`."""
        return Manifest(
            kind=self.kind,
            run_id=run_id,
            base_version=there.version,
            base_digest=there.digest if self.base is None else self.base.digest,
            version=self.target.version,
            digest=self.target.digest,
            layout_hash=self.layout_hash,
            changed_elements=self.changed_elements,
            segments=self.segments,
            chunks=self.chunks,
        )


def outgoing(update: EncodedUpdate, baseline: Baseline, base_version: int, version: int) -> Outgoing:
    """`update` of `baseline`, which is version `base_version`, as `version`."""
    return Outgoing(
        base=Held(base_version, baseline.digest()) if update.kind == "delta" else None,
        target=Held(version, baseline.digest(update.digests)),
        layout_hash=baseline.layout.hash,
        changed_elements=update.changed_elements,
        segments=update.segments,
        chunks=update.chunks,
        payloads=update.payloads,
    )
