"""The version gate: who may start to sample, and under which weight version.

Knows when admissions must wait; knows nothing of engines, HTTP or updates.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Literal

from flashrl_rollout.departures import Departures
from flashrl_wire.errors import NotReadyError, QueueFullError, TooLargeError, VersionNotReachedError, WireError

Reason = Literal["commit", "pause"]


class VersionGate:
    """Counts requests and their sequences, and holds new ones back while any reason keeps it closed."""

    def __init__(self, max_sequences: int, admit_timeout_s: float) -> None:
        self.version = 0
        self.active_sequences = 0
        self.active_requests = 0
        self.max_sequences = max_sequences
        self._admit_timeout_s = admit_timeout_s
        self._departures = Departures()
        self._closed_by: set[Reason] = set()
        self._fence_error: WireError | None = None
        self._fenced = asyncio.Event()
        self._settled = asyncio.Event()  # open or fenced: nobody has to wait
        self._settled.set()
        self._idle = asyncio.Event()
        self._idle.set()

    def close(self, reason: Reason) -> None:
        """Hold new requests back."""
        self._closed_by.add(reason)
        self._settle()

    def open(self, reason: Reason) -> None:
        """Take one reason away; the last one lets the waiting requests in."""
        self._closed_by.discard(reason)
        self._settle()

    def is_closed_by(self, reason: Reason) -> bool:
        """Whether `reason` keeps the gate closed."""
        return reason in self._closed_by

    def fence(self, error: WireError) -> None:
        """End what runs and what waits with `error`, and refuse whatever comes, until `unfence`."""
        self._fence_error = error
        self._fenced.set()
        self._settle()

    def unfence(self) -> None:
        """Accept requests again."""
        self._fence_error = None
        self._fenced.clear()
        self._settle()

    async def fenced(self) -> None:
        """Wait for a fence."""
        await self._fenced.wait()

    async def idle(self) -> None:
        """Wait until no request is active."""
        await self._idle.wait()

    def check(self) -> None:
        """Raise the fence's error if there is one."""
        if self._fence_error is not None:
            raise self._fence_error

    @asynccontextmanager
    async def admitted(self, num_sequences: int, min_version: int = 0) -> AsyncIterator[int]:
        """Wait until the gate is open and count the request as active; the weight version it starts under.

        TooLargeError for more sequences than ever fit, QueueFullError for more than fit now, NotReadyError where
        the gate stays closed for longer than the limit, VersionNotReachedError for a version still to come.
        """
        self.check()
        self._check_room(num_sequences)
        self.active_sequences += num_sequences
        self.active_requests += 1
        self._idle.clear()
        try:
            await self._wait_until_open()
            self._check_version(min_version)
            yield self.version
        finally:
            self.active_sequences -= num_sequences
            self._departures.add(num_sequences)
            self.active_requests -= 1
            if not self.active_requests:
                self._idle.set()

    def _settle(self) -> None:
        if self._closed_by and self._fence_error is None:
            self._settled.clear()
        else:
            self._settled.set()

    def _check_room(self, num_sequences: int) -> None:
        if num_sequences > self.max_sequences:
            raise TooLargeError(f"prompts x n is {num_sequences} sequences, at most {self.max_sequences} in a request")
        excess = self.active_sequences + num_sequences - self.max_sequences
        if excess > 0:
            raise QueueFullError(
                f"{self.active_sequences} sequences run or wait, the limit is {self.max_sequences}",
                retry_after_s=self._departures.seconds_until(excess),
            )

    async def _wait_until_open(self) -> None:
        try:
            async with asyncio.timeout(self._admit_timeout_s):
                while not self._settled.is_set():  # may have closed again by the time this task runs
                    await self._settled.wait()
        except TimeoutError:
            reasons = " and ".join(sorted(self._closed_by))
            raise NotReadyError(f"sampling stood still for {self._admit_timeout_s:g} s: {reasons}") from None
        self.check()

    def _check_version(self, min_version: int) -> None:
        if min_version > self.version:
            raise VersionNotReachedError(
                f"min_weight_version is {min_version}, the service has {self.version}", version=self.version
            )
