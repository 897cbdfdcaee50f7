"""What a person sees while a measurement runs: the piece that it is at.

Knows the terminal; knows nothing of what is measured.
"""

from rich.console import Console


class Progress:
    """On a terminal one line that is renewed, elsewhere (a log, a pipe) a line a piece, on stderr."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self._status = self._console.status("starting")

    def __enter__(self) -> "Progress":
        self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._status.stop()

    def piece(self, text: str) -> None:
        """What is begun now."""
        self._status.update(text)
        if not self._console.is_terminal:
            self._console.print(text, markup=False)
