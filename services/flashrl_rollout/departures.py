"""How fast sequences leave the queue, so that whoever finds it full is told when to come again.

Knows counts and times; knows nothing of requests.
"""

import math
import time
from collections import deque
from collections.abc import Callable

_REMEMBERED = 256
_WINDOW_S = 60.0
_SHORTEST_S, _LONGEST_S, _UNKNOWN_S = 1, 60, 5


class Departures:
    """The last departures, and the wait that follows from their rate."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._began = clock, clock()
        self._left: deque[tuple[float, int]] = deque(maxlen=_REMEMBERED)

    def add(self, num_sequences: int) -> None:
        """So many sequences have just left."""
        self._left.append((self._clock(), num_sequences))

    def seconds_until(self, num_sequences: int) -> int:
        """About how long until so many more will have left, in whole seconds from 1 to 60; 5 where nobody has left."""
        now = self._clock()
        recent = [(at, count) for at, count in self._left if now - at < _WINDOW_S]
        if not recent:
            return _UNKNOWN_S
        since = recent[0][0] if len(recent) == _REMEMBERED else max(self._began, now - _WINDOW_S)
        rate = sum(count for _, count in recent) / max(now - since, 1e-3)
        return min(_LONGEST_S, max(_SHORTEST_S, math.ceil(num_sequences / rate)))
