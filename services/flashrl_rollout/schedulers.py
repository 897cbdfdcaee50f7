"""vLLM's schedulers, which pass on the tokens of sequences that nobody reads before the end many at a time.

vLLM finds them through its setting `scheduler_cls`. Knows what is held and when all of it must go out; not how.
"""

from collections.abc import Iterator
from typing import Any

from vllm.sampling_params import RequestOutputKind
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs

from flashrl_rollout.held_outputs import HeldOutputs

INTERVAL_KEY = "flashrl_output_interval"
"""Where `additional_config` has the number of tokens."""

_CLIENT = 0  # the service is its engine's only client


class _Holding:
    """Before one of vLLM's schedulers. The version of the weights is a message's: nothing is held through a pause."""

    requests: dict[str, Any]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config: Any = self.vllm_config  # type: ignore[attr-defined]
        self._held = HeldOutputs(int(config.additional_config[INTERVAL_KEY]))

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> dict[int, Any]:
        """The messages of a step; while paused, with everything that was held."""
        messages: dict[int, Any] = super().update_from_output(scheduler_output, model_runner_output)  # type: ignore[misc]
        if self._is_paused():
            if self._held:
                message = messages.setdefault(_CLIENT, EngineCoreOutputs())
                message.outputs = self._held.release(message.outputs)
            return messages
        for message in messages.values():
            if message.outputs:
                message.outputs = self._held.thin(message.outputs, self._may_hold)
        return messages

    def has_requests(self) -> bool:
        """True also while something is held in a pause: the engine takes another step, and is at rest after it."""
        return super().has_requests() or (self._is_paused() and bool(self._held))  # type: ignore[misc]

    def finish_requests(self, request_ids: Any, finished_status: Any) -> Any:
        """End requests from outside; what was held of them is dropped."""
        finished = super().finish_requests(request_ids, finished_status)  # type: ignore[misc]
        for request in finished:
            self._held.drop(request.request_id)
        return finished

    def reset_prefix_cache(self, *args: Any, **kwargs: Any) -> bool:
        """vLLM's own, for which the cache consists of the blocks with something to forget.

        It goes through every block there is, in Python: 10 ms of each commit's pause for the 150,000 of a small model.
        """
        pool = self.kv_cache_manager.block_pool  # type: ignore[attr-defined]
        every = pool.blocks
        pool.blocks = list(_cached_blocks(pool))
        try:
            return bool(super().reset_prefix_cache(*args, **kwargs))  # type: ignore[misc]
        finally:
            pool.blocks = every

    def _is_paused(self) -> bool:
        return bool(self.pause_state != PauseState.UNPAUSED)  # type: ignore[attr-defined]

    def _may_hold(self, request_id: str) -> bool:
        request = self.requests.get(request_id)
        parameters = request and request.sampling_params
        return bool(
            parameters
            and parameters.output_kind == RequestOutputKind.FINAL_ONLY
            and not parameters.stop  # the service looks for stop strings, token by token
            and parameters.num_logprobs != -1  # a row of the whole vocabulary each
            and parameters.prompt_logprobs is None
        )


def _cached_blocks(pool: Any) -> Iterator[Any]:
    """Those that prompts may share: a hash stands for one, or for several by their ids."""
    for found in pool.cached_block_hash_to_block._cache.values():
        if isinstance(found, dict):
            yield from found.values()
        else:
            yield found


class HoldingScheduler(_Holding, Scheduler):  # type: ignore[misc]
    """Where steps are not overlapped: on the CPU."""


class HoldingAsyncScheduler(_Holding, AsyncScheduler):  # type: ignore[misc]
    """Where the next step is scheduled while one runs."""
