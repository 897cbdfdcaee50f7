"""What a container runs: the trainer or the service, as one child, and the end of one as the end of both.

`compose up` ends when every container has ended, and a service has no end of its own: the trainer leaves a file in
/state, and the services stop at it. Knows command lines, exit codes and that file; knows nothing of training.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

STATE = Path("/state")
MAX_FAILURES = 5
"""After so many exits with code 1 since `compose up` the trainer is not tried again. A kill is no such exit."""
FAILURE, USAGE = 1, 2
_POLL_S = 0.5
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class End:
    """The file by which the trainer says that there is nothing more to do, and its exit code."""

    def __init__(self, folder: Path) -> None:
        self._file, self._failures = folder / "end", folder / "failures"

    def code(self) -> int | None:
        """The exit code that the trainer ended with; None while it has work."""
        return int(self._file.read_text()) if self._file.exists() else None

    def count(self, code: int) -> None:
        """Take note of an exit: 0 and a wrong setting are the end, and so is one failure too many."""
        if code == FAILURE:
            with self._failures.open("a") as file:
                file.write(".")
        if code in (0, USAGE) or (code == FAILURE and self._failures.stat().st_size >= MAX_FAILURES):
            partial = self._file.with_suffix(".part")
            partial.write_text(str(code))
            partial.rename(self._file)

    def reset(self) -> None:
        """A new `compose up` has begun."""
        self._file.unlink(missing_ok=True)
        self._failures.unlink(missing_ok=True)


def cores() -> int:
    """Those that this container may use."""
    return len(os.sched_getaffinity(0))


def rollout_command(environ: Mapping[str, str]) -> list[str]:
    """`flashrl-rollout serve`; on the CPU with threads that leave the trainer its share."""
    command = ["flashrl-rollout", "serve", *shlex.split(environ.get("FLASHRL_SERVE_ARGS", ""))]
    if environ.get("FLASHRL_ROLLOUT_DEVICE") == "cpu" and not environ.get("FLASHRL_ROLLOUT_THREADS"):
        command += ["--threads", str(max(1, min(4, cores() // 2)))]
    return command


def trainer_command(environ: Mapping[str, str]) -> list[str]:
    """`flashrl-trainer train --resume auto`, under torchrun where there are several processes or nodes.

    The run is named after its recipe: one that is killed before its first checkpoint begins again under the same name,
    which is all that the service follows it by.
    """
    recipe = environ["FLASHRL_RECIPE"]
    name = environ.get("FLASHRL_RUN") or Path(recipe).stem
    command = [*launcher(environ), "-m", "flashrl_trainer", "train", "--config", recipe, "--resume", "auto"]
    return [*command, "--set", f"run.name={name}", *shlex.split(environ.get("FLASHRL_TRAIN_ARGS", ""))]


def launcher(environ: Mapping[str, str]) -> list[str]:
    """Python, or torchrun with as many processes a node as FLASHRL_PROCESSES says, on FLASHRL_NODES nodes."""
    processes, nodes = (int(environ.get(name) or 1) for name in ("FLASHRL_PROCESSES", "FLASHRL_NODES"))
    if nodes > 1:
        meeting = ["--rdzv-backend", "c10d", "--rdzv-id", "flashrl", "--rdzv-endpoint", environ["FLASHRL_RENDEZVOUS"]]
        return ["torchrun", "--nnodes", str(nodes), *meeting, "--nproc-per-node", str(processes)]
    return ["torchrun", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else [sys.executable]


def run(command: list[str], end: End | None) -> int:
    """The exit code of `command` as a shell has it; signals are passed on, and the file in `end` is one."""
    child = subprocess.Popen(command)
    for number in _SIGNALS:
        signal.signal(number, lambda number, _: child.send_signal(number))
    while end is not None and child.poll() is None:
        if end.code() is not None:
            child.terminate()
            break
        time.sleep(_POLL_S)
    code = child.wait()
    return 128 - code if code < 0 else code


def main(arguments: list[str], environ: Mapping[str, str], state: Path) -> int:
    """Run this container's part, or the command in `arguments` as it, to its end; the exit code."""
    end = End(state)
    ended = end.code()
    if environ["FLASHRL_PART"] == "rollout-cpu":
        # pieces of vLLM's sampler are compiled even with enforce_eager, and this image has no compiler for them
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    if environ["FLASHRL_PART"] != "trainer":
        return 0 if ended is not None else run(arguments or rollout_command(environ), end)
    if ended is not None:  # Docker starts what has failed again; the service may be gone already
        return ended
    code = run(arguments or trainer_command(environ), None)
    end.count(code)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ, STATE))
