"""A run as a person watches it: one line a step, and below them a bar with what goes on and how long it will take.

It does not know where rows come from nor where else they go.
"""

import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from flashrl_trainer.metric_rows import Row
from flashrl_trainer.settings import TrainerConfig
from flashrl_trainer.units import format_bytes, format_seconds

LEGEND = (
    "weights: their version; reward: mean over all samples of the step; eval: held-out problems solved;\n"
    "KL: sampler against trainer; capped: tokens whose importance weight hit the cap; tokens: mean of a response;\n"
    "update: bytes sent of the full weights; pause: of sampling; time: of the step; left: to the last step"
)
HEADER = (
    f"{'step':>9} {'weights':>8} {'reward':>7} {'eval':>7} {'KL':>8} {'capped':>7} {'tokens':>7} "
    f"{'update':>17} {'pause':>8} {'time':>7} {'left':>8}"
)
STEPS_BETWEEN_HEADERS = 20


def open_console(config: TrainerConfig, first_step: int) -> "ConsoleDisplay":
    """The display of a run that goes on after `first_step`."""
    return ConsoleDisplay(config.run.steps or None, first_step)


class ConsoleDisplay:
    """Lines and a bar on a terminal, lines alone in a file or pipe."""

    def __init__(
        self,
        total_steps: int | None,
        first_step: int = 0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`total_steps` None: not known in advance; `first_step` is the last one finished before a resume."""
        self._total, self._first, self._clock = total_steps, first_step, clock
        self._started = clock()
        self._rows = 0
        self._console = console or Console(soft_wrap=True, highlight=False)
        self._bar = Progress(
            TextColumn("step {task.fields[step]}"),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[left]} left  {task.fields[doing]}"),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task(
            "", total=total_steps, completed=first_step, step=self._counted(first_step), left="?", doing="starting"
        )
        self._bar.start()

    def phase(self, name: str) -> Callable[[int, int], None]:
        """Names what goes on; the function returned takes (done, total), or (bytes, 0) where no total is known."""
        self._bar.update(self._task, doing=name)

        def progress(done: int, total: int) -> None:
            amount = f"{done}/{total}" if total else format_bytes(done)
            self._bar.update(self._task, doing=f"{name} {amount}")

        return progress

    def row(self, row: Row) -> None:
        step, left = int(_number(row, "step")), self._left(int(_number(row, "step")))
        if self._rows == 0:
            self._console.print(LEGEND, style="dim")
        if self._rows % STEPS_BETWEEN_HEADERS == 0:
            self._console.print(HEADER, style="bold")
        self._rows += 1
        self._console.print(format_row(row, self._counted(step), left))
        self._bar.update(self._task, completed=step, step=self._counted(step), left=left, doing="")

    def note(self, text: str) -> None:
        self._console.print(text, style="yellow", markup=False)

    def close(self) -> None:
        self._bar.stop()

    def _counted(self, step: int) -> str:
        return f"{step}/{self._total}" if self._total else str(step)

    def _left(self, step: int) -> str:
        """At the pace since the start of this process; evaluations and checkpoints are in it."""
        done = step - self._first
        if self._total is None or done <= 0:
            return "?"
        return format_seconds((self._clock() - self._started) / done * max(self._total - step, 0))


def format_row(row: Row, step: str, left: str) -> str:
    """One line under HEADER; cells that mean nothing for the row are empty."""
    version = f"v{_number(row, 'weight_version'):.0f}"
    start = f"{step:>9} {version:>8}"
    accuracy = row["eval/accuracy"]
    score = "" if accuracy is None else f"{accuracy:.1%}"
    if row["step"] == 0:
        return f"{start} {'':>7} {score:>7}  before training".rstrip()
    update = f"{format_bytes(_number(row, 'sync/wire_bytes'))} of {format_bytes(_number(row, 'sync/full_bytes'))}"
    return (
        f"{start} {_number(row, 'reward/mean'):>7.3f} {score:>7} {_number(row, 'mismatch/k3_kl'):>8.5f} "
        f"{_number(row, 'tis/capped_fraction'):>7.2%} {_number(row, 'response/mean_tokens'):>7.1f} {update:>17} "
        f"{_number(row, 'sync/pause_ms'):>5.1f} ms {format_seconds(_number(row, 'perf/step_seconds')):>7} {left:>8}"
    )


def _number(row: Row, key: str) -> float:
    value = row[key]
    assert value is not None
    return value
