"""Whether an engine that has work still gets on with it.

Knows times; knows nothing of engines.
"""

import time
from collections.abc import Callable


class StallWatch:
    """Stalled is who has had work for `limit_s` and made no step in that time, as far as was looked."""

    def __init__(self, limit_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit_s, self._clock = limit_s, clock
        self._last_step = 0.0
        self._since = clock()

    def is_stalled(self, has_work: bool, last_step: float) -> bool:
        """`last_step` is any number that changes with every step; look often."""
        if not has_work or last_step != self._last_step:
            self._last_step, self._since = last_step, self._clock()
        return self._clock() - self._since > self._limit_s
