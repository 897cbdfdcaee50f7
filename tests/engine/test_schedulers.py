"""Forgetting the prefix cache through vLLM's own pool of blocks, pinned version and all."""

from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = pytest.mark.engine


def test_every_block_with_a_hash_is_forgotten_and_no_other_is_visited() -> None:
    from vllm.v1.core.block_pool import BlockPool

    from flashrl_rollout.schedulers import _Holding

    pool = BlockPool(num_gpu_blocks=9, enable_caching=True, hash_block_size=16)
    every = pool.blocks
    for number, key in ((2, b"a"), (5, b"a"), (7, b"b")):  # two blocks of one hash, one of another
        every[number].set_block_hash(key)  # type: ignore[arg-type]
        pool.cached_block_hash_to_block.insert(key, every[number])  # type: ignore[arg-type]
    visited: list[int] = []

    class Vllms:
        kv_cache_manager = SimpleNamespace(block_pool=pool)

        def reset_prefix_cache(self, running: bool) -> bool:
            assert running
            visited.extend(block.block_id for block in pool.blocks)
            return pool.reset_prefix_cache()

    class Scheduler(_Holding, Vllms):
        def __init__(self) -> None:
            pass

    scheduler: Any = Scheduler()
    assert scheduler.reset_prefix_cache(True)
    assert sorted(visited) == [2, 5, 7]
    assert all(block.block_hash is None for block in every)
    assert len(pool.cached_block_hash_to_block) == 0
    assert pool.blocks is every
