"""A line that shows a long wait going on, where there is a terminal to show it.

Knows the terminal; knows nothing of what is waited for.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

logger = logging.getLogger(__name__)


@contextmanager
def waiting_line(what: str) -> Iterator[None]:
    """`loading model 0:00:34` on a terminal; elsewhere one log line before and one after."""
    console = Console(stderr=True)
    start = time.monotonic()
    if not console.is_terminal:
        logger.info("%s", what)
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        progress.add_task(what, total=None)
        yield
    logger.info("%s took %.0f s", what, time.monotonic() - start)
