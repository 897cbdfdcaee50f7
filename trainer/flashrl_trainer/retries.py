"""Which failed calls are made again, when, and for how long. Knows errors; knows nothing of routes or sockets."""

from collections.abc import Callable
from typing import Any

import httpx
from tenacity import RetryCallState, retry_if_exception, retry_if_exception_type, wait_exponential

from flashrl_wire.errors import NotReadyError, QueueFullError, UpdateInProgressError, WireError

RETRY_AFTER_FACT = "retry_after_s"  # where a reply's Retry-After header is kept


def policy(retry_s: float) -> dict[str, Any]:
    """Keyword arguments of tenacity's Retrying, for a single call; the last error comes out as it is."""
    return {
        "retry": retry_if_exception(_may_pass),
        "stop": _stop_after_failing_for(retry_s),
        "wait": _wait,
        "reraise": True,
    }


def while_full(retry_s: float) -> dict[str, Any]:
    """The same for /generate: only a full queue is waited for; for anything else another replica may be better."""
    return policy(retry_s) | {"retry": retry_if_exception_type(QueueFullError)}


def _stop_after_failing_for(limit_s: float) -> Callable[[RetryCallState], bool]:
    """Counted from the first failure: a service may be lost at the end of a request that took longer than the limit."""
    first_failure: list[float] = []

    def stop(state: RetryCallState) -> bool:
        assert state.outcome_timestamp is not None
        first_failure.append(state.outcome_timestamp)
        return state.outcome_timestamp - first_failure[0] >= limit_s

    return stop


_BACKOFF = wait_exponential(multiplier=0.2, max=5.0)


def _wait(state: RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    asked = error.facts.get(RETRY_AFTER_FACT) if isinstance(error, WireError) else None
    return float(asked) if isinstance(asked, int | float) else _BACKOFF(state)


def _may_pass(error: BaseException) -> bool:
    """Whether the same call may succeed later: a lost connection, a full queue, a service that is starting.

    Not where only the trainer can help (poisoned weights, a transfer of its own) or another run has to end.
    """
    if isinstance(error, httpx.HTTPError):
        return not isinstance(error, httpx.UnsupportedProtocol | httpx.ReadTimeout)
    if not isinstance(error, NotReadyError | QueueFullError | UpdateInProgressError):
        return False
    return not error.facts.keys() & {"poisoned", "transfer_id", "run_id"}
