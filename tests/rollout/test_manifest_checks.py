"""Manifests that must be refused before their first byte, and the facts the refusal carries."""

import pytest
import torch
from tests.helpers.rig import LAYOUT
from tests.helpers.wire_trainer import Update, delta_update, snapshot_update

from flashrl_rollout import stored_state
from flashrl_rollout.manifest_checks import Base, check_manifest, staged_bytes
from flashrl_wire.delta import Change
from flashrl_wire.errors import BadUpdateError, InvalidFieldError, StaleBaseError, TooLargeError, WireError
from flashrl_wire.messages import Segment

OLD, NEW = stored_state.random_parts(LAYOUT, 0), stored_state.random_parts(LAYOUT, 1)
DIGEST = stored_state.combined(LAYOUT, stored_state.digests(OLD))
LIMIT = 1 << 20


def base(*, poisoned: bool = False) -> Base:
    return Base(3, DIGEST, LAYOUT.hash, {part.name: part for part in LAYOUT.parts()}, poisoned)


@pytest.fixture
def delta() -> Update:
    new = {name: values.clone() for name, values in OLD.items()}
    new["norm.weight"][:3] = 1.0
    return delta_update(LAYOUT, OLD, new, base=3)


@pytest.fixture
def snapshot() -> Update:
    return snapshot_update(LAYOUT, OLD, NEW, base=3)


def refused(update: Update, error: type[WireError], message: str, *, limit: int = LIMIT, **fields: object) -> WireError:
    with pytest.raises(error, match=message) as found:
        check_manifest(update.declaring(**fields).manifest, base(), limit)
    return found.value


def test_good_ones_pass(delta: Update, snapshot: Update) -> None:
    check_manifest(delta.manifest, base(), LIMIT)
    check_manifest(snapshot.manifest, base(), LIMIT)
    check_manifest(
        snapshot.declaring(base_version=9, base_digest="0" * 32, version=1).manifest, base(poisoned=True), LIMIT
    )


def test_versions_of_protocol_and_codec(delta: Update) -> None:
    refused(delta, BadUpdateError, "protocol version is 1 here, 2 in the update", protocol=2)
    refused(delta, BadUpdateError, "codec version is 1 here, 9 in the update", codec=9)


def test_stale_base_names_both_sides(delta: Update) -> None:
    error = refused(delta, StaleBaseError, "starts from version 2", base_version=2)
    assert error.facts == {"version": 3, "digest": DIGEST, "poisoned": False}
    refused(delta, StaleBaseError, "f" * 32, base_digest="f" * 32)


def test_poisoned_takes_no_delta(delta: Update) -> None:
    with pytest.raises(StaleBaseError, match="only a snapshot"):
        check_manifest(delta.manifest, base(poisoned=True), LIMIT)


def test_delta_must_move_forward(delta: Update) -> None:
    refused(delta, InvalidFieldError, "version: must be above base_version 3, got 3", version=3)
    check_manifest(delta.declaring(version=17).manifest, base(), LIMIT)  # merged deltas skip versions


def test_layout_must_be_the_same(delta: Update) -> None:
    refused(delta, BadUpdateError, "layout hash", layout_hash="0" * 32)


def test_declared_sizes_are_capped(snapshot: Update) -> None:
    refused(snapshot, TooLargeError, "raw bytes, at most 100", limit=100)
    chunk = snapshot.manifest.chunks[0]
    for field, size in (("raw_bytes", (4 << 20) + 1), ("wire_bytes", 5 << 20)):
        large = chunk.model_copy(update={field: size})
        refused(snapshot, TooLargeError, "in a chunk", limit=1 << 30, chunks=[large])
    refused(snapshot, TooLargeError, "chunks, at most", limit=1 << 60, chunks=[chunk] * 65537)
    refused(snapshot, TooLargeError, "segments, at most", segments=[snapshot.manifest.segments[0]] * (2**18 + 1))


def test_chunks_must_hold_what_segments_need(delta: Update) -> None:
    refused(
        delta, BadUpdateError, "segments need 12 raw bytes, the chunks declare 24", chunks=delta.manifest.chunks * 2
    )


def segment(**fields: object) -> Segment:
    values = {"part": "norm.weight", "dtype": "bf16", "encoding": "sparse", "count": 3} | fields
    return Segment.model_validate(values)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (segment(part="other"), "other: no such part"),
        (segment(dtype="int8", wide=0, count=4), "stored as bf16, the update has int8"),
        (segment(encoding="dense", start=95, count=6), "6 values from 95, it has 100"),
    ],
)
def test_segments_must_fit_their_parts(delta: Update, wrong: Segment, message: str) -> None:
    raw = 12
    chunk = delta.manifest.chunks[0].model_copy(update={"raw_bytes": raw})
    refused(delta, BadUpdateError, message, segments=[wrong], chunks=[chunk])


def test_part_cannot_have_more_values_than_elements(delta: Update) -> None:
    halves = [segment(encoding="dense", count=60), segment(encoding="dense", count=60)]
    chunk = delta.manifest.chunks[0].model_copy(update={"raw_bytes": 240})
    refused(delta, BadUpdateError, "norm.weight: 120 values for 100 elements", segments=halves, chunks=[chunk])


def test_snapshot_must_be_whole(snapshot: Update, delta: Update) -> None:
    refused(delta, BadUpdateError, "the snapshot has 0 of 2048 elements|a snapshot holds", kind="snapshot")
    segments = list(snapshot.manifest.segments)
    gap = [s.model_copy(update={"count": s.count - 1}) if s.part == "norm.weight" else s for s in segments]
    chunk = snapshot.manifest.chunks[0].model_copy(update={"raw_bytes": snapshot.manifest.raw_bytes - 2})
    refused(snapshot, BadUpdateError, "norm.weight: the snapshot has 99 of 100", segments=gap, chunks=[chunk])


def test_shards_of_a_snapshot_may_come_in_any_order(snapshot: Update) -> None:
    segments = [s for s in snapshot.manifest.segments if s.part != "norm.weight"]
    shards = [segment(encoding="dense", start=40, count=60), segment(encoding="dense", start=0, count=40)]
    check_manifest(snapshot.declaring(segments=segments + shards).manifest, base(), LIMIT)


def test_declared_changes_cannot_be_more_than_the_values(delta: Update) -> None:
    refused(delta, InvalidFieldError, "changed_elements: 4 of 3 values", changed_elements=4)


def test_staged_bytes_bound_the_file() -> None:
    sparse = Change("norm.weight", torch.ones(3, dtype=torch.bfloat16), torch.tensor([0, 1, 2]))
    assert sparse.values.numel() * (2 + 8) <= staged_bytes([segment()]) <= 3 * (2 + 8) + 128
