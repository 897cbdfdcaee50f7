"""Which trainer the service follows: one run id at a time.

Knows ids and idle time; knows nothing of what runs send.
"""

import time

from flashrl_wire.errors import UpdateInProgressError


class RunLease:
    """Taken by the first update of a run; free again once released or idle for `idle_timeout_s`."""

    def __init__(self, idle_timeout_s: float) -> None:
        self._idle_timeout_s = idle_timeout_s
        self._holder: str | None = None
        self._touched = 0.0

    @property
    def run_id(self) -> str | None:
        """The run that is followed now."""
        if time.monotonic() - self._touched > self._idle_timeout_s:
            self._holder = None
        return self._holder

    def check(self, run_id: str) -> None:
        """UpdateInProgressError where another run holds the lease."""
        if self.run_id not in (None, run_id):
            raise UpdateInProgressError(
                f"the service follows run {self.run_id} until it is released or idle for {self._idle_timeout_s:g} s",
                run_id=self.run_id,
            )

    def take(self, run_id: str) -> None:
        """Follow `run_id` from now on, or go on following it."""
        self.check(run_id)
        self._holder, self._touched = run_id, time.monotonic()

    def release(self, run_id: str) -> None:
        """Follow nobody, if it was `run_id`; harmless when repeated."""
        if self._holder == run_id:
            self._holder = None
