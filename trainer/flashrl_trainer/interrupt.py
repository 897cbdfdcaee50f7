"""Ctrl-C and SIGTERM: at once where nothing can be lost, else at the end of the step; a second one always at once.

Knows nothing of what is interrupted.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupt:
    """Raises KeyboardInterrupt inside `anywhere()`, elsewhere only remembers that it was asked."""

    def __init__(self) -> None:
        self.requested = False
        self._anywhere = False

    def install(self) -> None:
        """Take over SIGINT and SIGTERM of this process's main thread."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    @contextmanager
    def anywhere(self) -> Iterator[None]:
        """Code that may stop between any two instructions."""
        if self.requested:
            raise KeyboardInterrupt
        self._anywhere = True
        try:
            yield
        finally:
            self._anywhere = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again, self.requested = self.requested, True
        if self._anywhere or again:
            raise KeyboardInterrupt


def ignore_signals() -> None:
    """For ranks other than 0: torchrun signals all of them, and rank 0 decides."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
