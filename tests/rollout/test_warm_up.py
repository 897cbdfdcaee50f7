"""What an engine is asked before it is ready: every kind of request, alone and in a batch."""

from dataclasses import replace

import pytest
from tests.helpers.rig import INFO, LAYOUT

from flashrl_rollout import stored_state
from flashrl_rollout.engine import EngineCompletion
from flashrl_rollout.scripted_engine import ScriptedEngine
from flashrl_rollout.warm_up import warm_up
from flashrl_wire.messages import Sampling

pytestmark = pytest.mark.anyio


class Asked(ScriptedEngine):
    """Notes what it is asked, and how much of it at a time."""

    def __init__(self, max_model_len: int = INFO.max_model_len) -> None:
        info = replace(INFO, max_model_len=max_model_len)
        super().__init__(LAYOUT, stored_state.random_parts(LAYOUT, 0), info, token_s=1e-4)
        self.requests: list[tuple[Sampling, int]] = []
        self.prompt_lengths: set[int] = set()
        self.most_at_once = 0

    async def generate(
        self, request_id: str, prompt_token_ids: list[int], n: int, sampling: Sampling, top_logprobs: int
    ) -> list[EngineCompletion]:
        self.requests.append((sampling, top_logprobs))
        self.prompt_lengths.add(len(prompt_token_ids))
        self.most_at_once = max(self.most_at_once, self.running_requests + 1)
        return await super().generate(request_id, prompt_token_ids, n, sampling, top_logprobs)


async def test_every_kind_of_request_is_made() -> None:
    engine = Asked()
    await warm_up(engine)
    asked = [sampling for sampling, _ in engine.requests]
    for kind in (
        lambda sampling: sampling.temperature == 0,
        lambda sampling: sampling.seed is None and sampling.top_p < 1,
        lambda sampling: sampling.seed is not None and sampling.top_p < 1,
        lambda sampling: sampling.top_k > 0,
        lambda sampling: sampling.stop,
    ):
        assert any(map(kind, asked))
    # 1 + top_logprobs columns, rounded up to a power of two, and sixteen itself; in the model's dtype and in fp32
    for temperature in (1.0, 0.7):
        columns = {1 + top for sampling, top in engine.requests if sampling.temperature == temperature}
        assert {1 << (count - 1).bit_length() for count in columns} == {1, 2, 4, 8, 16, 32}
        assert 16 in columns


async def test_requests_of_all_kinds_run_together() -> None:
    engine = Asked()
    await warm_up(engine)
    assert engine.most_at_once > 16
    assert engine.most_at_once % 16
    assert engine.running_requests == 0


async def test_a_short_context_is_enough() -> None:
    engine = Asked(max_model_len=3)
    await warm_up(engine)
    assert max(engine.prompt_lengths) == 2
