"""Regions: geometry worked by hand, and every way through them against a dense reference."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flashrl_rollout.runtime_map import Axis, Held, Region, RuntimePart, check_disjoint, patterns_of
from flashrl_wire.delta import Change
from flashrl_wire.digest import PartDigest, digest_at, digest_range
from flashrl_wire.layout import PartSpec

# columns 3..5 of a [2, 6] part, held as rows 1..2 of a [4, 3] tensor
SLICE = Region.of(3, 3, iter([Axis(2, 6, 3), Axis(3, 1, 1)]))


def test_consecutive_axes_are_joined_to_a_run() -> None:
    region = Region.of(0, 12, iter([Axis(4, 3, 3), Axis(1, 99, 7), Axis(3, 1, 1)]))
    assert region.axes == (Axis(12, 1, 1),)
    assert region.is_run
    assert not SLICE.is_run


@pytest.mark.parametrize("axes", [[Axis(2, 0, 1)], [Axis(2, 1, 0)], [Axis(2, 2, 3), Axis(3, 1, 1)]])
def test_boxes_that_repeat_elements_are_refused(axes: list[Axis]) -> None:
    with pytest.raises(ValueError, match=r"overlap|several"):
        Region.of(0, 0, iter(axes))


def test_elements_of_a_column_slice_by_hand() -> None:
    indices, addresses = SLICE.elements(0, 6, torch.device("cpu"))
    assert indices.tolist() == [3, 4, 5, 9, 10, 11]
    assert addresses.tolist() == [3, 4, 5, 6, 7, 8]


def test_locate_finds_only_what_lies_inside() -> None:
    positions, addresses = SLICE.locate(torch.tensor([0, 3, 5, 6, 8, 9, 11, 12, 15]))
    assert positions.tolist() == [1, 2, 5, 6]
    assert addresses.tolist() == [3, 5, 6, 8]


@pytest.mark.parametrize(("index", "before"), [(0, 0), (3, 0), (4, 1), (6, 3), (9, 3), (10, 4), (12, 6), (100, 6)])
def test_rank_counts_elements_below_an_index(index: int, before: int) -> None:
    assert SLICE.rank(index) == before


@st.composite
def regions(draw: st.DrawFn) -> Region:
    """Boxes of up to three nested axes, whose memory order may differ from their order in the part."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    axes, part, memory = [], 1, 1
    for size in reversed(sizes):
        axes.append([size, part, 0])
        part *= size + draw(st.integers(0, 2))
    for axis in draw(st.permutations(axes)):
        axis[2] = memory
        memory *= axis[0] + draw(st.integers(0, 2))
    offsets = draw(st.tuples(st.integers(0, 5), st.integers(0, 5)))
    return Region.of(*offsets, iter([Axis(*axis) for axis in axes]))


@given(regions())
def test_locate_and_rank_agree_with_counting_through(region: Region) -> None:
    indices, addresses = region.elements(0, region.numel, torch.device("cpu"))
    assert indices.tolist() == sorted(set(indices.tolist()))
    everything = torch.arange(int(indices.max()) + 5)
    positions, found = region.locate(everything)
    assert positions.tolist() == indices.tolist()
    assert found.tolist() == addresses.tolist()
    assert [region.rank(i) for i in everything.tolist()] == [int((indices < i).sum()) for i in everything.tolist()]


def _part(region: Region, memory: torch.Tensor) -> RuntimePart:
    spec = PartSpec("w", "fp32", (20, 20))
    return RuntimePart(spec, (Held(region, patterns_of(memory)),))


def _write(part: RuntimePart, change: Change) -> None:
    for piece in part.pieces(change):
        piece.memory[piece.where] = piece.patterns


@given(regions(), st.data())
def test_changes_reach_the_right_elements(region: Region, data: Any) -> None:
    """A sparse change and a range change against element-by-element assignment."""
    memory, expected = torch.zeros(400), torch.zeros(400)
    indices, addresses = region.elements(0, region.numel, torch.device("cpu"))
    where = dict(zip(indices.tolist(), addresses.tolist(), strict=True))
    start, count = data.draw(st.tuples(st.integers(0, 100), st.integers(1, 100)))
    picked = torch.tensor(sorted(data.draw(st.sets(st.integers(0, 200), min_size=1))))
    dense = Change("w", torch.rand(count), start=start)
    sparse = Change("w", torch.rand(len(picked)), indices=picked)
    for index, value in zip(range(start, start + count), dense.values, strict=True):
        if index in where:
            expected[where[index]] = value
    for index, value in zip(picked.tolist(), sparse.values, strict=True):
        if index in where:
            expected[where[index]] = value
    part = _part(region, memory)
    _write(part, dense)
    _write(part, sparse)
    assert torch.equal(memory, expected)
    assert part.digests() == {region.key: digest_at(indices, memory[addresses])}


def test_two_slices_of_columns_add_up_to_the_whole_digest() -> None:
    whole = torch.randn(6, 8).to(torch.bfloat16)
    total = PartDigest()
    for column in (0, 5):
        width = 5 if column == 0 else 3
        mine = whole[:, column : column + width].contiguous()
        region = Region.of(column, 0, iter([Axis(6, 8, width), Axis(width, 1, 1)]))
        (digest,) = RuntimePart(PartSpec("w", "bf16", (6, 8)), (Held(region, patterns_of(mine)),)).digests().values()
        total = total + digest
    assert total == digest_range(whole)


def test_copies_of_a_part_must_agree() -> None:
    run = Region.of(0, 0, iter([Axis(4, 1, 1)]))
    held = (Held(run, patterns_of(torch.zeros(4))), Held(run, patterns_of(torch.ones(4))))
    with pytest.raises(ValueError, match="two copies of w differ"):
        RuntimePart(PartSpec("w", "fp32", (4,)), held).digests()


def test_names_that_share_memory_are_refused() -> None:
    memory = patterns_of(torch.zeros(4))
    top, bottom, all_of_it = (Region.of(0, at, iter([Axis(n, 1, 1)])) for at, n in ((0, 2), (2, 2), (0, 4)))
    held = {
        name: RuntimePart(PartSpec(name, "fp32", (2,)), (Held(region, memory),))
        for name, region in (("q", top), ("k", bottom))
    }
    check_disjoint(held)
    with pytest.raises(ValueError, match="model: lm_head shares memory"):
        check_disjoint(held | {"lm_head": RuntimePart(PartSpec("lm_head", "fp32", (4,)), (Held(all_of_it, memory),))})
