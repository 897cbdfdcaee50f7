"""A recipe of whole training steps in seconds, and ways to start services and trainers around it.

Knows settings and folders; knows nothing of what is tested.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.helpers.forked import Ended, Program, ServiceProgram, free_ports

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "examples/tiny_arith/model"
STEM = "recipe"
STEPS = 4
RECIPE = f"""
[run]
steps = {STEPS}
seed = 1
wandb = "off"
threads = 1

[model]
path = "{MODEL}"
compute_dtype = "float32"
device = "cpu"

[data]
train = "{ROOT}/examples/tiny_arith/data/train.jsonl"
eval = "{ROOT}/examples/tiny_arith/data/heldout.jsonl"
prompt_template = "{{question}}\\n"
chat_template = false
max_prompt_tokens = 128
reward = "tests.helpers.rewards:parity"

[rollout]
connect_deadline_s = 20.0
request_timeout_s = 30.0

[sampling]
prompts_per_step = 2
samples_per_prompt = 2
max_tokens = 8

[algorithm]
overlong = "none"

[optim]
lr = 1e-4
mini_batch_prompts = 2
max_tokens_per_micro_batch = 256

[eval]
every = 2
problems = 2

[checkpoint]
every = 1
keep = 10
"""

Row = dict[str, Any]


@dataclass
class Workshop:
    """Starts programs in a folder; `end` ends what is left of them."""

    folder: Path
    started: list[Program] = field(default_factory=list)

    @property
    def runs(self) -> Path:
        """Where runs are written."""
        return self.folder / "runs"

    def service(self, ports: list[int] | None = None, **options: Any) -> ServiceProgram:
        """A service with the weights of the tiny model."""
        service = ServiceProgram(self._log(), ports or free_ports(2), **{"folder": str(MODEL)} | options)
        self.started.append(service)
        return service

    def trainer(
        self,
        url: str,
        *arguments: str,
        command: str = "train",
        variables: dict[str, str] | None = None,
        **settings: Any,
    ) -> Program:
        """`flashrl-trainer` with the recipe; `optim__lr=0.1` sets optim.lr."""
        recipe = self.folder / f"{STEM}.toml"
        if not recipe.exists():
            recipe.write_text(RECIPE)
        values = {"run__dir": self.runs, "rollout__urls": url} | settings
        overrides = [f"--set={key.replace('__', '.')}={value}" for key, value in values.items()]
        line = [command, "--config", str(recipe), *overrides, *arguments]
        self.started.append(Program("trainer", line, self._log(), variables or {}))
        return self.started[-1]

    def ranks(self, count: int, url: str, *arguments: str, **settings: Any) -> list[Program]:
        """The same as one job of `count` processes, each told its place as torchrun does."""
        job = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports(1)[0])}
        places = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
        return [self.trainer(url, *arguments, variables=job | place, **settings) for place in places]

    def _log(self) -> Path:
        return self.folder / f"program-{len(self.started)}"

    def run_folder(self) -> Path:
        """The only run there is."""
        (folder,) = self.runs.iterdir()
        return folder

    def recorded(self) -> list[Row]:
        """What the only run has recorded so far; nothing while there is none."""
        folders = list(self.runs.iterdir()) if self.runs.exists() else []
        return rows(folders[0]) if folders else []

    def end(self) -> None:
        """Leave no process behind."""
        for program in self.started:
            program.kill()


def rows(run: Path) -> list[Row]:
    """What a run has recorded so far."""
    file = run / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def state(run: Path, step: int) -> dict[str, Any]:
    """The trainer's own state in a checkpoint."""
    content = json.loads((run / "checkpoints" / f"step-{step:06d}" / "trainer.json").read_text())
    return dict(content["state"])


def until(condition: Callable[[], object], trainer: Program) -> None:
    """Return once the condition holds; AssertionError if the trainer ends before that."""
    while not condition():
        assert not trainer.ends_within(0.02), trainer.errors


@dataclass(frozen=True)
class Straight:
    """A run of STEPS in one go, which interrupted ones are held to, and the service's last word about its weights."""

    folder: Path
    ended: Ended
    digest: str
    version: int


def timeless(row: Row) -> Row:
    """The row without what depends on the clock, or on how often a service was lost."""
    clock = {"sync/seconds", "sync/pause_ms", "sampling/requests_moved"}
    return {key: value for key, value in row.items() if key not in clock and not key.startswith("perf/")}
