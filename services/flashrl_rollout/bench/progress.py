"""What a person sees while a benchmark runs: who is loading, and a line a turn with what is left.

Knows the terminal; knows nothing of arms.
"""

from collections.abc import Sequence

from rich.console import Console

from flashrl_rollout.bench.report import Turn
from flashrl_rollout.bench.settings import ArmName

_QUIET_S = 30.0


class Progress:
    """On a terminal one line that is renewed while arms load, elsewhere a line every half minute."""

    def __init__(self, num_turns: int, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self._status = self._console.status("starting")
        self._said_s = -_QUIET_S
        self._num_turns, self._done, self._spent_s = num_turns, 0, 0.0

    def __enter__(self) -> "Progress":
        self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._status.stop()

    def say(self, text: str) -> None:
        """A line that stays."""
        self._console.print(text, markup=False)

    def loading(self, waiting: Sequence[ArmName], ready: int, elapsed_s: float) -> None:
        names = ", ".join(map(str, waiting))
        line = f"{ready} of {ready + len(waiting)} ready after {elapsed_s:.0f} s" + (
            f"; loading {names}" if names else ""
        )
        self._status.update(line)
        if not names or (not self._console.is_terminal and elapsed_s - self._said_s >= _QUIET_S):
            self._said_s = elapsed_s
            self.say(line)

    def warming(self, arm: ArmName) -> None:
        self._status.update(f"warming up {arm}")

    def turn(self, turn: Turn) -> None:
        self._done += 1
        self._spent_s += turn.seconds
        left_s = self._spent_s / self._done * (self._num_turns - self._done)
        self.say(
            f"round {turn.round}  {turn.arm!s:<13} {turn.tokens_per_s:>9,.0f} tokens/s  {turn.seconds:6.2f} s"
            f"  ({self._done}/{self._num_turns}, {left_s:.0f} s left)"
        )
        self._status.update(f"{self._num_turns - self._done} turns left")
