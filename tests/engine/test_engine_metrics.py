"""What a real engine tells while it samples: vLLM's metrics beside ours, and a count of tokens that is exact."""

import pytest
from prometheus_client import REGISTRY
from tests.helpers.real_engine import LoopThread

from flashrl_rollout.engine import Engine
from flashrl_rollout.metrics import Metrics
from flashrl_rollout.process_memory import process_memory
from flashrl_wire.messages import Sampling

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1200)]


def test_tokens_are_counted_as_they_are_drawn(int8_engine: Engine, loop: LoopThread) -> None:
    before = loop.run(int8_engine.stats()).generated_tokens
    samples = loop.run(int8_engine.generate("count", int8_engine.encode("2 + 2"), 3, Sampling(max_tokens=17), 0))
    drawn = sum(len(sample.token_ids) for sample in samples)
    assert loop.run(int8_engine.stats()).generated_tokens - before == drawn > 0


def test_metrics_of_vllm_stand_beside_ours(int8_engine: Engine, loop: LoopThread) -> None:
    loop.run(int8_engine.generate("show", int8_engine.encode("2 + 2"), 1, Sampling(max_tokens=2), 0))
    text = Metrics().text().decode()
    for name in ("vllm:num_requests_running{", "vllm:generation_tokens_total{", "vllm:kv_cache_usage_perc{"):
        assert f"\n{name}" in text
    assert REGISTRY.get_sample_value("process_resident_memory_bytes")
    stats = loop.run(int8_engine.stats())
    assert 0 <= stats.extra["kv_cache_usage"] < 1


def test_memory_of_the_engine_is_that_of_its_processes(int8_engine: Engine) -> None:
    assert process_memory().engine_bytes > 100 << 20
