"""A call beside the work of a device: in a thread and, on CUDA, on a stream of its own.

Knows threads and streams; knows nothing of what is called.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch

T = TypeVar("T")


class Background(Generic[T]):
    """Begins at once. What it leaves on the device is whole once `result` has returned."""

    def __init__(self, device: torch.device, call: Callable[[], T]) -> None:
        self._device = device
        self._outcome: T | BaseException | None = None
        self._before = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._thread = threading.Thread(target=self._run, args=(call,), name="flashrl-ahead", daemon=True)
        self._thread.start()

    def _run(self, call: Callable[[], T]) -> None:
        try:
            with torch.no_grad(), self._own_stream():
                self._outcome = call()
        except BaseException as error:
            self._outcome = error

    @contextmanager
    def _own_stream(self) -> Iterator[None]:
        """A stream that begins after what the caller's holds, and has run empty at the end."""
        if self._before is None:
            yield
            return
        torch.cuda.set_device(self._device)
        stream: torch.cuda.Stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream.wait_stream(self._before)
        with torch.cuda.stream(stream):
            yield
        stream.synchronize()

    @property
    def is_done(self) -> bool:
        """Whether `result` would return at once."""
        return not self._thread.is_alive()

    def result(self) -> T:
        """What the call returned, or raise what it raised, once it has ended."""
        self._thread.join()
        if isinstance(self._outcome, BaseException):
            raise self._outcome
        assert self._outcome is not None
        return self._outcome
