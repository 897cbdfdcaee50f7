"""Ctrl-C and SIGTERM: at once where nothing can be lost, else at the end of the step; a second one always at once.

Knows nothing of what is interrupted.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

ECHO_S = 2.0  # torchrun passes a terminal's Ctrl-C on, so one key press arrives twice within this time


class Interrupt:
    """Raises KeyboardInterrupt inside `anywhere()`, elsewhere only remembers that it was asked.

    `requested` after the first signal, `insisted` after a second one: then not even a checkpoint may be waited for.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.requested = False
        self.insisted = False
        self._anywhere = False
        self._clock, self._first_at = clock, 0.0

    def install(self) -> None:
        """Take over SIGINT and SIGTERM of this process's main thread."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    @contextmanager
    def anywhere(self) -> Iterator[None]:
        """Code that may stop between any two instructions."""
        try:
            self._anywhere = True  # first: a signal after a look at `requested` would be missed
            if self.requested:
                raise KeyboardInterrupt
            yield
        finally:
            self._anywhere = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = self._clock()
        if self.requested:
            self.insisted = self.insisted or now - self._first_at > ECHO_S
        else:
            self.requested, self._first_at = True, now
            if not self._anywhere:
                os.write(2, b"stopping after this step; Ctrl-C again stops at once, without it\n")
        if self._anywhere or self.insisted:
            self._anywhere = False  # what cleans up after the first one is not to be stopped by its echo
            raise KeyboardInterrupt


def ignore_signals() -> None:
    """For ranks other than 0: torchrun signals all of them, and rank 0 decides."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
