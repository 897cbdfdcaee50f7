"""Updates as a trainer makes them: digests kept up to date by what changed, never computed anew.

Knows stored states and manifests; knows nothing of sockets. Unlike the publisher's, the states are plain tensors.
"""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from tests.helpers.wire_trainer import Update
from torch import Tensor

from flashrl_rollout import stored_state
from flashrl_wire import codec, delta
from flashrl_wire.delta import Change
from flashrl_wire.digest import PartDigest
from flashrl_wire.layout import WeightLayout
from flashrl_wire.messages import Manifest

Parts = Mapping[str, Tensor]


@dataclass(frozen=True)
class State:
    """A stored state, its version and the digests of its parts."""

    layout: WeightLayout
    parts: Parts
    digests: Mapping[str, PartDigest]
    version: int = 0

    @classmethod
    def of(cls, layout: WeightLayout, parts: Parts, version: int = 0) -> "State":
        """Digest everything once."""
        return cls(layout, parts, stored_state.digests(parts), version)

    @property
    def digest(self) -> str:
        """The combined digest."""
        return stored_state.combined(self.layout, self.digests)

    @property
    def num_bytes(self) -> int:
        """Stored bytes."""
        return sum(values.nbytes for values in self.parts.values())


@dataclass(frozen=True)
class Made:
    """An update, the state that it leads to, and what making it took."""

    update: Update
    state: State
    seconds: float


def make_delta(old: State, new: Parts, block_bytes: int) -> Made:
    """What moves `old` to `new`, the version after it."""
    started = time.monotonic()
    changes, digests = [], dict(old.digests)
    for name, values in new.items():
        found = delta.diff(name, old.parts[name], values)
        if found is not None:
            changes.append(_on_cpu(found[0]))
            digests[name] = digests[name] + found[1]
    state = State(old.layout, new, digests, old.version + 1)
    update = _encode("delta", changes, old, state, block_bytes)
    return Made(update, state, time.monotonic() - started)


def make_snapshot(old: State, new: State, block_bytes: int) -> Made:
    """All of `new`, as the version after `old`."""
    started = time.monotonic()
    state = State(old.layout, new.parts, new.digests, old.version + 1)
    changes = (_on_cpu(delta.snapshot(name, values)) for name, values in new.parts.items())
    update = _encode("snapshot", changes, old, state, block_bytes)
    return Made(update, state, time.monotonic() - started)


def _encode(
    kind: Literal["delta", "snapshot"], changes: Iterable[Change], old: State, new: State, block_bytes: int
) -> Update:
    encoded = codec.encode(changes, block_bytes)
    manifest = Manifest(
        kind=kind,
        run_id="run-a",
        base_version=old.version,
        base_digest=old.digest,
        version=new.version,
        digest=new.digest,
        layout_hash=old.layout.hash,
        changed_elements=encoded.changed_elements,
        segments=encoded.segments,
        chunks=encoded.chunks,
    )
    return Update(manifest, encoded.payloads)


def _on_cpu(change: Change) -> Change:
    indices = None if change.indices is None else change.indices.cpu()
    return Change(change.part, change.values.cpu(), indices, change.start, change.changed)
