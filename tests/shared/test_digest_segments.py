"""Digests of many parts at once against one at a time."""

import pytest
import torch

from flashrl_wire.digest import digest_at, digest_segments


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
@pytest.mark.parametrize("lengths", [[1], [3, 1, 4], [1] * 9, [1000, 1, 70000]])
def test_segments_are_digested_as_if_alone(dtype: torch.dtype, lengths: list[int]) -> None:
    generator = torch.Generator().manual_seed(sum(lengths))
    values = torch.randint(-(1 << 31), 1 << 31, (sum(lengths),), generator=generator).to(dtype)
    indices = torch.randint(0, 1 << 40, (sum(lengths),), generator=generator)
    kept = indices.clone()
    pairs = zip(indices.split(lengths), values.split(lengths), strict=True)
    assert digest_segments(indices, values, lengths) == [digest_at(at, patterns) for at, patterns in pairs]
    assert torch.equal(indices, kept)
