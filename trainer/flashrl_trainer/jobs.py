"""Work in a thread of its own that must not keep the process alive. Knows nothing of what the work is."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def spawn(work: Callable[[], T], name: str) -> "Future[T]":
    """Run `work` beside the caller; a pool's threads would be waited for at exit, however long their calls hang."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            result = work()
        except BaseException as error:  # whoever waits for the result gets it
            future.set_exception(error)
        else:
            future.set_result(result)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future
