"""One process that calls a user's reward, replaced when it does not answer in time or dies.

Knows the protocol of `reward_worker`; knows nothing of prompts, groups or what a failure means.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from typing import Any

from flashrl_trainer.token_file import TOKEN_VARIABLE

IMPORT_LIMIT_S = 120.0  # a user's module may import torch, or a symbolic algebra system


def _without_token() -> dict[str, str]:
    """It judges texts that a model made up: what it does not need it does not get."""
    return {name: value for name, value in os.environ.items() if name != TOKEN_VARIABLE}


class RewardError(RuntimeError):
    """A reward raised, hung, died or returned no finite number; the message says which."""


class RewardProcess:
    """`call` is for one thread at a time."""

    def __init__(self, name: str, timeout_s: float) -> None:
        self._name, self._timeout_s = name, timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: socket.socket | None = None
        self._unread = b""

    @property
    def pid(self) -> int | None:
        """None where no process runs."""
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Import the function; ValueError that names it if that fails or takes longer than IMPORT_LIMIT_S."""
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "flashrl_trainer.reward_worker", self._name, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=sys.stderr.fileno(),
                pass_fds=[theirs.fileno()],
                env=_without_token() | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
                start_new_session=True,  # Ctrl-C is not for it, and what it starts ends with it
            )
        self._connection, self._unread = ours, b""
        try:
            reply = self._receive(ours, time.monotonic(), IMPORT_LIMIT_S)
        except RewardError as error:
            raise ValueError(f"reward: {self._name!r} cannot be imported: {error}") from None
        if "error" in reply:
            self.stop()
            raise ValueError(reply["error"])

    def call(self, text: str, answer: str) -> float:
        """The reward; RewardError if there is none, and the next call has a new process if this one is of no use."""
        if self._process is None:
            self.start()
        connection, began = self._connection, time.monotonic()
        assert connection is not None
        with suppress(OSError):  # it died, or does not even listen: there will be no reply either
            connection.settimeout(self._timeout_s)
            connection.sendall(json.dumps({"text": text, "answer": answer}).encode() + b"\n")
        reply = self._receive(connection, began, self._timeout_s)
        if "error" in reply:
            raise RewardError(reply["error"])
        return float(reply["value"])

    def stop(self) -> None:
        """End it, and whatever it has started."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _receive(self, connection: socket.socket, began: float, limit_s: float) -> dict[str, Any]:
        while b"\n" not in self._unread:
            try:
                connection.settimeout(max(0.001, began + limit_s - time.monotonic()))
                block = connection.recv(1 << 16)
            except TimeoutError:
                self.stop()
                raise RewardError(f"no result within {limit_s:g} s") from None
            except OSError:
                block = b""
            if not block:
                raise RewardError(self._death())
            self._unread += block
        line, _, self._unread = self._unread.partition(b"\n")
        return dict(json.loads(line))

    def _death(self) -> str:
        process = self._process
        if process is None:  # stopped by another thread
            return "the run ends"
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=1.0)
        code = process.returncode
        self.stop()
        if code is not None and code < 0:
            return f"its process was ended by {signal.Signals(-code).name}"
        return f"its process ended with exit code {code}"
