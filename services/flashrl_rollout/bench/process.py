"""A child process with its log in a file: started in a group of its own, watched, and ended with all that it started.

Knows processes; knows nothing of what they do.
"""

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from flashrl_rollout.bench.arms import ArmFailedError

_STOP_S = 30.0
_LOG_LINES = 15
_READ_BYTES = 1 << 16
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


class Child:
    """One process that takes lines on its standard input and gives lines on its standard output; errors go to `log`.

    When this process is killed, its standard input ends; one that does not read it `stops_by_signal`, on Linux.
    """

    def __init__(
        self,
        what: str,
        command: Sequence[str],
        environ: Mapping[str, str],
        log: Path,
        *,
        stops_by_signal: bool = False,
    ) -> None:
        self._what, self._log, self._unread = what, log, b""
        with log.open("wb") as out:
            # a group of its own: Ctrl-C reaches the benchmark alone, which then ends its children in order
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=out,
                env=environ,
                start_new_session=True,
                preexec_fn=_stop_with_parent if stops_by_signal else None,
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout

    def log(self) -> str:
        """Everything it has logged."""
        return self._log.read_text(errors="replace")

    def check(self) -> None:
        """ArmFailedError, with the end of the log, once it has ended."""
        code = self._process.poll()
        if code is not None:
            raise self.failed(f"ended with exit code {code}")

    def failed(self, why: str) -> ArmFailedError:
        """The error to raise: what happened, and the end of the log."""
        end = "\n".join(self.log().splitlines()[-_LOG_LINES:])
        return ArmFailedError(f"{self._what} {why}; the end of its log:\n{end}")

    def send(self, line: str) -> None:
        """Write a line to its standard input."""
        try:
            self._stdin.write(line.encode() + b"\n")
            self._stdin.flush()
        except OSError as error:
            raise self.failed(f"no longer listens ({error.strerror})") from error

    def line(self, timeout_s: float) -> str | None:
        """Its next line; None if none came in time, ArmFailedError if none will."""
        end = time.monotonic() + timeout_s
        while b"\n" not in self._unread:
            if not select.select([self._stdout], [], [], max(0.0, end - time.monotonic()))[0]:
                return None
            read = os.read(self._stdout.fileno(), _READ_BYTES)
            if not read:
                raise self._ended()
            self._unread += read
        line, _, self._unread = self._unread.partition(b"\n")
        return line.decode()

    def _ended(self) -> ArmFailedError:
        """The error for a process that has closed its output."""
        with suppress(subprocess.TimeoutExpired):
            return self.failed(f"ended with exit code {self._process.wait(_STOP_S)}")
        return self.failed("says nothing any more")

    def cpu_s(self) -> float:
        """CPU time of this one process, its children not counted."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S

    def terminate(self) -> None:
        """Ask it to stop, and do not wait."""
        if self._process.poll() is None:
            self._process.terminate()

    def stop(self) -> None:
        """Close its input and wait for its end for a while, then kill it and whatever else is in its group."""
        with suppress(OSError):
            self._stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_STOP_S)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._stdout.close()


def _stop_with_parent() -> None:
    """In the child, before its program: SIGTERM once the thread that started it is gone, even after SIGKILL."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def arm_environment(name: str) -> dict[str, str]:
    """This process's environment for an arm: without settings of the service, and with a vLLM cache of its own.

    Arms compile at the same time, and vLLM does not expect others to write the same files of its cache.
    """
    environ = {key: value for key, value in os.environ.items() if not key.startswith("FLASHRL_")}
    root = environ.get("VLLM_CACHE_ROOT") or Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllm"
    environ["VLLM_CACHE_ROOT"] = str(Path(root) / "flashrl-bench" / name.replace("/", "-"))
    return environ
