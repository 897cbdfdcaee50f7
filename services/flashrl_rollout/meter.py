"""How fast the engine samples: its count of tokens, read at a steady pace and remembered for some minutes.

Knows counts and times; knows nothing of engines or of who looks at it.
"""

import itertools
from collections import deque

INTERVAL_S = 1.0
_KEPT = 300
_RECENT = 3


class Meter:
    """`sample(now_s, tokens)` every INTERVAL_S with a count that only grows; None of it blocks."""

    def __init__(self) -> None:
        self._readings: deque[tuple[float, int]] = deque(maxlen=_KEPT + 1)

    def sample(self, now_s: float, tokens: int) -> None:
        """Note the count at a time; a count below the last one belongs to another engine, and begins anew."""
        if self._readings and (tokens < self._readings[-1][1] or now_s <= self._readings[-1][0]):
            self._readings.clear()
        self._readings.append((now_s, tokens))

    @property
    def tokens_per_s(self) -> float:
        """The mean over the latest readings; 0 before there are two."""
        latest = list(self._readings)[-1 - _RECENT :]
        return _rate(latest[0], latest[-1]) if len(latest) > 1 else 0.0

    def history(self) -> list[float]:
        """Tokens a second between all readings, the oldest first."""
        return [_rate(*pair) for pair in itertools.pairwise(self._readings)]


def _rate(first: tuple[float, int], last: tuple[float, int]) -> float:
    return (last[1] - first[1]) / (last[0] - first[0])
