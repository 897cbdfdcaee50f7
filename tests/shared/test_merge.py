"""Merged updates against the same updates written one after another."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from flashrl_wire.delta import Change, diff, equal_bits, snapshot, write
from flashrl_wire.merge import merge

DTYPES = [torch.int8, torch.float8_e4m3fn, torch.float32, torch.bfloat16]


def random_values(numel: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    patterns = torch.randint(0, 256, (numel * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    return patterns.view(dtype)


def test_last_writer_wins_by_hand() -> None:
    first = Change("w", torch.tensor([1.0, 2.0]), torch.tensor([2, 7]), changed=2)
    second = Change("w", torch.tensor([3.0, 4.0]), torch.tensor([0, 7]), changed=2)
    other = Change("v", torch.tensor([9.0]), start=4, changed=1)
    merged = merge([first, other, second])
    assert [change.part for change in merged] == ["w", "v"]
    assert merged[0].indices is not None
    assert (merged[0].indices.tolist(), merged[0].values.tolist(), merged[0].changed) == ([0, 2, 7], [3.0, 1.0, 4.0], 3)
    assert merged[1] is other


def test_ranges_that_touch_become_one() -> None:
    merged = merge([Change("w", torch.tensor([5.0, 6.0]), start=2, changed=2), Change("w", torch.ones(2), start=4)])
    assert len(merged) == 1
    assert (merged[0].is_dense, merged[0].start, merged[0].values.tolist()) == (True, 2, [5.0, 6.0, 1.0, 1.0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("density", [0.005, 0.02, 0.3, 1.0])
def test_merged_walk_ends_where_the_single_steps_end(dtype: torch.dtype, density: float) -> None:
    generator = torch.Generator().manual_seed(7)
    states = [random_values(200, dtype, generator)]
    for _ in range(5):
        state = states[-1].clone()
        drawn = torch.rand(200, generator=generator) < density
        bits = state.view(torch.uint8).reshape(200, -1)
        bits[drawn] = random_values(200, dtype, generator).view(torch.uint8).reshape(200, -1)[drawn]
        states.append(state)
    steps = [diff("w", old, new) for old, new in pairwise(states)]
    merged = merge([step[0] for step in steps if step])
    walked = states[0].clone()
    for change in merged:
        write(change, walked)
    assert len(merged) == 1
    assert equal_bits(walked, states[-1])


def test_what_follows_a_snapshot_of_shards_is_written_over_it() -> None:
    new = torch.arange(6, dtype=torch.float32)
    shards = [snapshot("w", new[:4]), snapshot("w", new[4:], start=4)]
    merged = merge([*shards, Change("w", torch.tensor([-1.0]), torch.tensor([5]), changed=1)])
    assert [(change.is_dense, change.values.tolist()) for change in merged] == [(True, [0, 1, 2, 3, 4, -1])]
