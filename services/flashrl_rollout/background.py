"""Calls beside the work of a device: in one thread and, on CUDA, on one stream of their own.

One for all calls: a new thread would have a heap of its own, and a new stream scratch memory of its own. Knows threads
and streams; knows nothing of what is called.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")


class Background:
    """`start(call)` gives a Future; what the call leaves on the device is whole once that has its result."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="flashrl-ahead")
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def start(self, call: Callable[[], T]) -> "Future[T]":
        """Call it after what has been started before, and after what the caller's stream holds now."""
        before = None if self._stream is None else torch.cuda.current_stream(self._device)
        return self._thread.submit(self._run, call, before)

    def _run(self, call: Callable[[], T], before: torch.cuda.Stream | None) -> T:
        with torch.no_grad(), self._own_stream(before):
            return call()

    @contextmanager
    def _own_stream(self, before: torch.cuda.Stream | None) -> Iterator[None]:
        """The stream goes on from `before`, and has run empty at the end."""
        if self._stream is None or before is None:
            yield
            return
        torch.cuda.set_device(self._device)
        self._stream.wait_stream(before)
        with torch.cuda.stream(self._stream):
            yield
        self._stream.synchronize()
