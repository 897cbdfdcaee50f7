"""What must be true of a manifest before its first byte is accepted.

Knows declared sizes and the state they start from; knows nothing of transfers, sockets or engines.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flashrl_wire import CODEC_VERSION, PROTOCOL_VERSION, codec
from flashrl_wire.errors import BadUpdateError, InvalidFieldError, StaleBaseError, TooLargeError
from flashrl_wire.frames import MAX_FRAME_BYTES
from flashrl_wire.layout import ITEM_BYTES, PartSpec
from flashrl_wire.messages import Manifest, Segment

MAX_CHUNKS = 1 << 16
MAX_SEGMENTS = 1 << 18
_INDEX_BYTES = 8
_ALIGNMENT_BYTES = 2 * 64  # of a staged change: its indices and its values


@dataclass(frozen=True)
class Base:
    """The state that a manifest has to fit."""

    version: int
    digest: str
    layout_hash: str
    parts: Mapping[str, PartSpec]
    poisoned: bool


def check_manifest(manifest: Manifest, base: Base, max_update_bytes: int) -> None:
    """StaleBaseError, TooLargeError, BadUpdateError or InvalidFieldError for what cannot become the next state."""
    _check_versions(manifest)
    if manifest.layout_hash != base.layout_hash:
        raise BadUpdateError(f"weight layout hash is {base.layout_hash} here, {manifest.layout_hash} in the update")
    if manifest.kind == "delta":
        _check_base(manifest, base)
    _check_sizes(manifest, max_update_bytes)
    codec.check_segments(manifest.segments, base.parts)
    _check_counts(manifest, base.parts)


def staged_bytes(segments: Sequence[Segment]) -> int:
    """Upper bound of the staged file of these segments."""
    return sum(_staged_bytes(segment) for segment in segments)


def _staged_bytes(segment: Segment) -> int:
    index_bytes = _INDEX_BYTES if segment.encoding == "sparse" else 0
    return segment.count * (ITEM_BYTES[segment.dtype] + index_bytes) + _ALIGNMENT_BYTES


def _check_versions(manifest: Manifest) -> None:
    for name, ours, theirs in (
        ("protocol", PROTOCOL_VERSION, manifest.protocol),
        ("codec", CODEC_VERSION, manifest.codec),
    ):
        if ours != theirs:
            raise BadUpdateError(f"{name} version is {ours} here, {theirs} in the update")
    if manifest.kind == "delta" and manifest.version <= manifest.base_version:
        raise InvalidFieldError(f"version: must be above base_version {manifest.base_version}, got {manifest.version}")


def _check_base(manifest: Manifest, base: Base) -> None:
    facts = {"version": base.version, "digest": base.digest, "poisoned": base.poisoned}
    if base.poisoned:
        raise StaleBaseError("the service is poisoned and accepts only a snapshot", **facts)
    if (manifest.base_version, manifest.base_digest) != (base.version, base.digest):
        raise StaleBaseError(
            f"the delta starts from version {manifest.base_version} ({manifest.base_digest}), "
            f"the service has version {base.version} ({base.digest})",
            **facts,
        )


def _check_sizes(manifest: Manifest, max_update_bytes: int) -> None:
    for name, count, limit in (
        ("chunks", len(manifest.chunks), MAX_CHUNKS),
        ("segments", len(manifest.segments), MAX_SEGMENTS),
        ("raw bytes", manifest.raw_bytes, max_update_bytes),
        ("raw bytes in a chunk", max((c.raw_bytes for c in manifest.chunks), default=0), codec.MAX_BLOCK_BYTES),
        ("wire bytes in a chunk", max((c.wire_bytes for c in manifest.chunks), default=0), MAX_FRAME_BYTES),
    ):
        if count > limit:
            raise TooLargeError(f"the update has {count} {name}, at most {limit}")
    needed = sum(map(codec.segment_bytes, manifest.segments))
    if needed != manifest.raw_bytes:
        raise BadUpdateError(f"segments need {needed} raw bytes, the chunks declare {manifest.raw_bytes}")


def _check_counts(manifest: Manifest, parts: Mapping[str, PartSpec]) -> None:
    """No part has more values than elements; a snapshot has every element exactly once."""
    segments: dict[str, list[Segment]] = defaultdict(list)
    for segment in manifest.segments:
        segments[segment.part].append(segment)
    for name, own in segments.items():
        count = sum(segment.count for segment in own)
        if count > parts[name].numel:
            raise BadUpdateError(f"{name}: {count} values for {parts[name].numel} elements")
    if manifest.kind == "snapshot":
        for part in parts.values():
            _check_whole(part, segments[part.name])
    declared, total = manifest.changed_elements, sum(segment.count for segment in manifest.segments)
    if declared > total:
        raise InvalidFieldError(f"changed_elements: {declared} of {total} values sent")


def _check_whole(part: PartSpec, segments: Sequence[Segment]) -> None:
    end = 0
    for segment in sorted(segments, key=lambda segment: segment.start):
        if segment.encoding != "dense" or segment.start != end:
            raise BadUpdateError(f"{part.name}: a snapshot holds each element once, in dense segments")
        end += segment.count
    if end != part.numel:
        raise BadUpdateError(f"{part.name}: the snapshot has {end} of {part.numel} elements")
