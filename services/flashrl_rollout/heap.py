"""Gives memory that this process has freed back to the system.

Knows the C library; knows nothing of what was held.
"""

import ctypes


def trim() -> None:
    """Let go of free pages inside the heap, a matter of milliseconds; nothing where the C library cannot (musl).

    Scratch of an update as large as the model leaves holes that glibc keeps: resident memory would creep up to
    whatever the most unlucky moment has needed.
    """
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)
