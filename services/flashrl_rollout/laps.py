"""Where the time of something goes. Knows a clock and names; knows nothing of what is timed."""

import time


class Laps:
    """`laps.end("write")` ends a stretch of that name, which began where the one before it ended."""

    def __init__(self) -> None:
        self._began = self._last = time.monotonic()
        self._ms: dict[str, float] = {}

    def end(self, name: str) -> None:
        """What has passed since the last end is called `name`."""
        now = time.monotonic()
        self._ms[name] = (now - self._last) * 1e3
        self._last = now

    def total_ms(self) -> float:
        """Since the beginning."""
        return (time.monotonic() - self._began) * 1e3

    def __str__(self) -> str:
        return " ".join(f"{name}={ms:.1f}" for name, ms in self._ms.items())
