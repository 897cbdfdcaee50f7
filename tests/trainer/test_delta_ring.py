"""What the ring keeps, for whom it has something, and that one merged delta does what the single ones do."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from flashrl_trainer.delta_ring import DeltaRing
from flashrl_trainer.outgoing import Held, Outgoing
from flashrl_wire import codec
from flashrl_wire.delta import diff, equal_bits, write
from flashrl_wire.layout import TensorSpec, WeightLayout

LAYOUT = WeightLayout.of([TensorSpec(name="a", shape=(100, 40), storage="bf16")])
PARTS = {part.name: part for part in LAYOUT.parts()}
BLOCK_BYTES = 1024


def states(count: int) -> list[Tensor]:
    """Each differs from the one before in twenty places, some of them again and again."""
    generator = torch.Generator().manual_seed(3)
    found = [torch.randn(4000, generator=generator).bfloat16()]
    for _ in range(count - 1):
        new = found[-1].clone()
        new[torch.randint(0, 60, (20,), generator=generator)] = torch.randn(20, generator=generator).bfloat16()
        found.append(new)
    return found


def held(version: int) -> Held:
    """Digests of their own; the ring compares and never computes them."""
    return Held(version, f"{version:032x}")


def deltas(walk: list[Tensor]) -> list[Outgoing]:
    made = []
    for version, (old, new) in enumerate(pairwise(walk)):
        found = diff("a", old, new)
        assert found is not None
        encoded = codec.encode([found[0]], BLOCK_BYTES)
        made.append(
            Outgoing(
                held(version),
                held(version + 1),
                LAYOUT.hash,
                encoded.changed_elements,
                encoded.segments,
                encoded.chunks,
                encoded.payloads,
            )
        )
    return made


def filled(made: list[Outgoing], max_bytes: int = 1 << 20) -> DeltaRing:
    ring = DeltaRing(LAYOUT, max_bytes, BLOCK_BYTES)
    for delta in made:
        ring.add(delta)
    return ring


def applied(delta: Outgoing, old: Tensor) -> Tensor:
    raw = b"".join(map(codec.decompress, delta.chunks, delta.payloads))
    new = old.clone()
    for change in codec.decode(delta.segments, np.frombuffer(raw, dtype=np.uint8), PARTS):
        write(change, new)
    return new


@pytest.mark.parametrize("start", range(5))
def test_merged_delta_leads_from_any_state_to_the_last(start: int) -> None:
    walk = states(6)
    ring = filled(deltas(walk))
    path = ring.since(held(start))
    assert [delta.base for delta in path] == [held(version) for version in range(start, 5)]
    merged = ring.merged(path)
    assert (merged.base, merged.target, merged.kind) == (held(start), held(5), "delta")
    assert equal_bits(applied(merged, walk[start]), walk[5])
    assert merged.wire_bytes <= sum(delta.wire_bytes for delta in path)


def test_oldest_make_room_and_then_there_is_nothing_for_those_who_need_them() -> None:
    made = deltas(states(6))
    ring = filled(made, max_bytes=sum(delta.wire_bytes for delta in made[3:]))
    assert ring.since(held(2)) == []
    assert [delta.target for delta in ring.since(held(3))] == [held(4), held(5)]
    assert ring.wire_bytes <= sum(delta.wire_bytes for delta in made[3:])


def test_delta_larger_than_the_ring_empties_it() -> None:
    made = deltas(states(3))
    ring = filled(made, max_bytes=min(delta.wire_bytes for delta in made) - 1)
    assert (ring.wire_bytes, ring.since(held(0))) == (0, [])


def test_chain_that_is_broken_starts_anew() -> None:
    made = deltas(states(5))
    ring = filled([made[0], made[2]])
    assert ring.since(held(0)) == []
    assert ring.since(held(2)) == [made[2]]


@pytest.mark.parametrize("there", [held(5), held(9), Held(2, "f" * 32)], ids=["the last", "a later one", "a stranger"])
def test_nothing_leads_from_states_that_are_not_before_it(there: Held) -> None:
    assert filled(deltas(states(6))).since(there) == []


def test_same_weights_count_under_another_number() -> None:
    made = deltas(states(6))
    assert filled(made).since(Held(0, held(3).digest)) == made[3:]


def test_deltas_that_are_larger_than_the_whole_are_still_one() -> None:
    walk = [torch.zeros(4000).bfloat16()]
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(4000, generator=generator).bfloat16()
        walk.append(torch.where(torch.rand(4000, generator=generator) < 0.5, drawn, walk[-1]))
    ring = filled(deltas(walk))
    assert ring.wire_bytes > LAYOUT.num_bytes
    assert equal_bits(applied(ring.merged(ring.since(held(0))), walk[0]), walk[-1])


def test_what_was_merged_is_gone_on_with_from_the_same_start_only() -> None:
    walk = states(9)
    made = deltas(walk)
    ring = filled(made[:4])
    for count in range(4, len(made)):
        for start in (0, 0, 2):  # again, and a replica that missed less
            assert equal_bits(applied(ring.merged(ring.since(held(start))), walk[start]), walk[count])
        ring.add(made[count])
