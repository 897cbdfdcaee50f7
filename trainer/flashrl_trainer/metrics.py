"""One dict a step -> metrics.jsonl, samples.jsonl, the console and Weights & Biases.

It does not know how any number is computed, only which ones there must be.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, Protocol
from uuid import uuid4

from flashrl_trainer.config import dump_toml
from flashrl_trainer.console import open_console
from flashrl_trainer.jsonl import keep_until, to_line
from flashrl_trainer.metric_rows import METRIC_KEYS, Row, complete_row, sample_rows
from flashrl_trainer.samples import Group
from flashrl_trainer.settings import TrainerConfig

__all__ = ["METRIC_KEYS", "MetricsWriter", "WandbMirror", "complete_row", "start_wandb"]

WANDB_TIMEOUT_S = 30.0  # for starting, and for what is left to upload at the end

WandbMode = Literal["online", "offline"]
Progress = Callable[[int, int], None]


class SampledGroups(Protocol):
    """The part of a step's sampling that is written down."""

    @property
    def groups(self) -> Sequence[Group]: ...


class Display(Protocol):
    """Where a person watches."""

    def phase(self, name: str) -> Progress: ...
    def row(self, row: Row) -> None: ...
    def note(self, text: str) -> None: ...
    def close(self) -> None: ...


class Mirror(Protocol):
    """A second place for rows; it must neither raise nor wait long."""

    def log(self, row: Row) -> None: ...
    def samples(self, rows: Sequence[Mapping[str, Any]]) -> None: ...
    def close(self) -> None: ...


OpenDisplay = Callable[[TrainerConfig, int], Display]
OpenMirror = Callable[[TrainerConfig, Path, Callable[[str], None]], Mirror | None]


class MetricsWriter:
    """Writes a run's rows as they come, from `begin` on: each is on disk before `write` returns."""

    def __init__(
        self,
        run_dir: Path,
        config: TrainerConfig,
        *,
        active: bool = True,
        open_display: OpenDisplay | None = None,
        open_mirror: OpenMirror | None = None,
    ) -> None:
        """Opens nothing yet. `active` off: a rank that does not record, and calls `begin` and `close` at most."""
        self._run_dir, self._config, self._active = run_dir, config, active
        self._open_display: OpenDisplay = open_display or open_console
        self._open_mirror: OpenMirror = open_mirror or start_wandb
        self._files: dict[str, IO[str]] = {}
        self._display: Display | None = None
        self._mirror: Mirror | None = None

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def begin(self, step: int) -> None:
        """Writes config.toml and goes on after `step`, dropping later rows; 0 starts anew, without any."""
        if not self._active:
            return
        self._run_dir.mkdir(parents=True, exist_ok=True)
        (self._run_dir / "config.toml").write_text(dump_toml(self._config), encoding="utf-8")
        for name in ("metrics", "samples"):
            path = self._run_dir / f"{name}.jsonl"
            if step > 0:
                keep_until(path, step)
            self._files[name] = path.open("a" if step > 0 else "w", encoding="utf-8")
        self._display = self._open_display(self._config, step)
        self._mirror = self._open_mirror(self._config, self._run_dir, self._display.note)

    def phase(self, name: str) -> Progress:
        """Shows that `name` has begun; the function returned takes (done, total), or (bytes, 0)."""
        assert self._display is not None
        return self._display.phase(name)

    def note(self, text: str) -> None:
        """A line for the person who watches."""
        assert self._display is not None
        self._display.note(text)

    def write(self, row: Mapping[str, float | None]) -> None:
        """One step; ValueError, and nothing written, if `complete_row` refuses it."""
        assert self._display is not None
        complete = complete_row(row)
        _append(self._files["metrics"], [complete])
        self._display.row(complete)
        if self._mirror is not None:
            self._mirror.log(complete)

    def samples(self, step: int, sampled: SampledGroups) -> None:
        """A few completions, from as many groups as there are."""
        rows = sample_rows(step, sampled.groups, self._config.run.samples_logged)
        _append(self._files["samples"], rows)
        if self._mirror is not None and rows:
            self._mirror.samples(rows)

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        if self._mirror is not None:
            self._mirror.close()
        if self._display is not None:
            self._display.close()


def _append(file: IO[str], rows: Sequence[Mapping[str, Any]]) -> None:
    file.write("".join(map(to_line, rows)))
    file.flush()


def start_wandb(config: TrainerConfig, run_dir: Path, warn: Callable[[str], None]) -> "WandbMirror | None":
    """A mirror in Weights & Biases as `run.wandb` says; None where it is off or does not start, which is warned of."""
    setting = config.run.wandb
    if setting == "off":
        return None
    online = setting == "online" or (setting == "auto" and bool(os.environ.get("WANDB_API_KEY")))
    mirror = WandbMirror(warn)
    mirror.start(config, run_dir, "online" if online else "offline")
    return mirror if mirror.alive else None


class WandbMirror:
    """Rows in Weights & Biases. Whatever goes wrong there is warned of once, and the run goes on without it."""

    def __init__(self, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._run: Any = None

    @property
    def alive(self) -> bool:
        return self._run is not None

    def start(self, config: TrainerConfig, run_dir: Path, mode: WandbMode) -> None:
        self._guarded(lambda: self._start(config, run_dir, mode))

    def log(self, row: Row) -> None:
        if self.alive:
            self._guarded(lambda: self._run.log({key: value for key, value in row.items() if value is not None}))

    def samples(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """A step's completions as a table `samples`, which W&B shows by step."""
        if self.alive:
            self._guarded(lambda: self._log_table(rows))

    def close(self) -> None:
        if self.alive:
            self._guarded(lambda: self._run.finish())

    def _log_table(self, rows: Sequence[Mapping[str, Any]]) -> None:
        import wandb

        columns = list(rows[0])
        # as text: a column of W&B's has one type, and a prompt is text or a list of messages
        cells = [[value if isinstance(value, int | float) else str(value) for value in row.values()] for row in rows]
        self._run.log({"samples": wandb.Table(columns=columns, data=cells), "step": rows[0]["step"]})

    def _start(self, config: TrainerConfig, run_dir: Path, mode: WandbMode) -> None:
        import wandb  # here, because it takes a second, and a broken one must not end the run

        limits = {"init_timeout": WANDB_TIMEOUT_S, "finish_timeout": WANDB_TIMEOUT_S}
        self._run = wandb.init(
            project=config.run.wandb_project,
            name=run_dir.name,
            id=_wandb_id(run_dir),
            resume="allow" if mode == "online" else None,
            mode=mode,
            dir=str(run_dir),
            config=config.model_dump(),
            # console: it would wrap the streams that the progress bar draws on
            settings=wandb.Settings(console="off", silent=True, **limits),
        )
        self._run.define_metric("*", step_metric="step")  # a resumed run may repeat steps

    def _guarded(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # a logging service must not end a run, and it fails in many ways
            self._run = None
            self._warn(f"Weights & Biases is off from here: {' '.join(str(error).split())}")


def _wandb_id(run_dir: Path) -> str:
    """The same after a resume."""
    file = run_dir / "wandb" / "flashrl-run-id"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(uuid4().hex[:12])
    return file.read_text()
