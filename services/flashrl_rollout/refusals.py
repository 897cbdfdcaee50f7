"""A line in the log about strangers, and not one for each of their tries: clients try again ten times a second.

Knows kinds of refusals and a clock; knows nothing of tokens, keys or sockets.
"""

import logging
import math
import time
from collections import Counter
from collections.abc import Callable

_QUIET_S = 60.0

logger = logging.getLogger(__name__)


class Refusals:
    """Used by one thread. A kind is logged when it comes up, and again, with how many there were, a minute later."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._said_at: dict[str, float] = {}
        self._unsaid: Counter[str] = Counter()

    def note(self, kind: str) -> None:
        """`kind` is one of a few fixed texts, never a client's own words."""
        now = self._clock()
        if now - self._said_at.get(kind, -math.inf) < _QUIET_S:
            self._unsaid[kind] += 1
            return
        more = self._unsaid.pop(kind, 0)
        self._said_at[kind] = now
        logger.warning("refused %s%s", kind, f" ({more} more since the last line)" if more else "")
