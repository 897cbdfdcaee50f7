"""Whether an engine that has work still gets on with it.

Knows times; knows nothing of engines.
"""

import time


class StallWatch:
    """Stalled is who has had work for `limit_s` and made no step in that time, as far as was looked."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._last_step = 0.0
        self._since = time.monotonic()

    def is_stalled(self, has_work: bool, last_step: float) -> bool:
        """`last_step` is any number that changes with every step; look often."""
        if not has_work or last_step != self._last_step:
            self._last_step, self._since = last_step, time.monotonic()
        return time.monotonic() - self._since > self._limit_s
