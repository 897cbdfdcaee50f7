"""Where a step's samples come from when sampling runs ahead of training: from a thread, a few steps early.

With `max_ahead` = 1 the next step is sampled while this one is trained, so a sample is at most one weight version old
when its turn comes; and so on. Knows the order of steps; knows nothing of how one is sampled.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from flashrl_trainer.collect import Progress
from flashrl_trainer.source import Drawn, Draws

_POLL_S = 0.2
_STOP_S = 5.0


class Ahead:
    """Steps are begun in order, each at most `max_ahead` steps before the one being trained.

    `last` is the number of the last step (None: no end); `cancel` makes a sampler at work give up.
    """

    def __init__(self, sampler: Draws, max_ahead: int, last: int | None, cancel: Callable[[], None]) -> None:
        self._sampler, self._max_ahead, self._last, self._cancel = sampler, max_ahead, last, cancel
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._states: deque[dict[str, Any]] = deque()  # before each step that was begun and not taken
        self._ready: deque[Drawn] = deque()
        self._error: BaseException | None = None
        self._is_error_raised = False
        self._version = 0  # that the first step not yet trained trains on
        self._begun = self._trained = 0  # steps of the run
        self._is_stopped = False
        self._progress: Progress = _quiet

    def take(self, version: int, progress: Progress) -> Drawn:
        """The next step's groups; what went wrong with them is raised, and tried again the next time."""
        with self._changed:
            if self._thread is None:
                self._version = version
                self._start()
            if self._is_error_raised:  # and mended since
                self._error, self._is_error_raised = None, False
                self._changed.notify_all()
            self._progress = progress
            try:
                while not self._ready:
                    if self._error is not None:
                        self._is_error_raised = True
                        raise self._error
                    self._changed.wait(_POLL_S)  # a signal's handler runs in between
            finally:
                self._progress = _quiet
            self._states.popleft()
            return self._ready.popleft()

    def trained(self, version: int) -> None:
        """One more step may be begun."""
        with self._changed:
            self._version = version
            self._trained += 1
            self._changed.notify_all()

    def state_dict(self) -> dict[str, Any]:
        """As it was before the step after the one taken last was begun: that one is sampled anew after a resume."""
        with self._changed:
            return self._states[0] if self._states else self._sampler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Before the first step."""
        self._sampler.load_state_dict(state)
        self._begun = self._trained = state["step"]

    def stop(self) -> None:
        """Give up what is being sampled."""
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()
        self._cancel()
        if self._thread is not None:
            self._thread.join(_STOP_S)

    def _start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="sampling ahead", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while self._may_begin():
            start = time.monotonic()
            drawn = None
            while drawn is None and not self._is_stopped:
                drawn = self._try(start)
            if drawn is not None:
                with self._changed:
                    self._ready.append(drawn)
                    self._changed.notify_all()

    def _may_begin(self) -> bool:
        """Wait for the next step's turn, and begin it; False at the end."""
        with self._changed:
            while not self._is_stopped and self._begun > self._trained + self._max_ahead:
                self._changed.wait()
            if self._is_stopped or self._begun == self._last:
                return False
            self._states.append(self._sampler.state_dict())
            # each step trained moves the version by one
            self._sampler.begin(self._version + self._begun - self._trained)
            self._begun += 1
            return True

    def _try(self, start: float) -> Drawn | None:
        try:
            sampled = self._sampler.fill(self._version, self._show)
        except BaseException as error:  # whoever takes the step gets it; it is over once somebody has mended it
            with self._changed:
                self._error = error
                self._changed.notify_all()
                while self._error is not None and not self._is_stopped:
                    self._changed.wait()
            return None
        return Drawn(sampled, time.monotonic() - start)

    def _show(self, done: int, total: int) -> None:
        self._progress(done, total)


def _quiet(done: int, total: int) -> None:
    """While nobody waits for samples, another phase is shown."""
