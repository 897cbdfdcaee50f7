"""Memory that was freed is the system's again."""

import platform

import psutil  # type: ignore[import-untyped]
import pytest
import torch

from flashrl_rollout import heap

MIB = 1 << 20


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library does as it likes")
def test_freed_scratch_is_given_back() -> None:
    """Two hundred megabytes in small pieces, with one above them that stays and holds the heap's end in its place."""
    scratch = [torch.zeros(4096) for _ in range(200 * MIB // (4 * 4096))]
    above = [torch.zeros(4096) for _ in range(100)]
    process = psutil.Process()
    with_scratch = process.memory_info().rss
    scratch.clear()
    heap.trim()
    assert with_scratch - process.memory_info().rss > 150 * MIB
    assert len(above) == 100
