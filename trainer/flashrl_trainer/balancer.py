"""Requests over the replicas in use: to the least busy one, and to another where one is lost.

A request is one group or several, so a prompt's samples share their prefix on one replica. Knows nothing of rewards
or weights.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, suppress

import httpx

from flashrl_trainer.fleet import Fleet, NeedsSnapshotError
from flashrl_trainer.replica import Replica
from flashrl_trainer.rollout_client import ServiceUnreachableError
from flashrl_wire.errors import NotReadyError, UpdateInProgressError, VersionNotReachedError, WireError
from flashrl_wire.messages import GenerateRequest, GenerateResponse

MAX_CONCURRENT_REQUESTS = 64  # at each replica
_POLL_S = 0.25

OnDone = Callable[[GenerateResponse], None]


class Balancer:
    """Blocking; `deadline_s` is how long a request waits while no replica can answer it. `moved` counts requests that
    were lost with a replica and asked again."""

    def __init__(self, fleet: Fleet, *, deadline_s: float) -> None:
        self._fleet, self._deadline_s = fleet, deadline_s
        self._lock = threading.Lock()
        self._rounds: set[_Round] = set()
        self.moved = 0

    def generate(self, requests: Sequence[GenerateRequest], on_done: OnDone = lambda _: None) -> list[GenerateResponse]:
        """Replies in the order of `requests`, sent concurrently; `on_done` is called as each arrives.

        NeedsSnapshotError: no replica has the weights asked for, and only the trainer can help. May be called from
        several threads; asyncio.CancelledError after `cancel`.
        """
        began = _Round(self, self._fleet, self._deadline_s, on_done)
        with self._lock:
            self._rounds.add(began)
        try:
            return asyncio.run(began.run(requests))
        except ExceptionGroup as group:  # the requests fail for one reason; the first says it
            raise group.exceptions[0] from None
        finally:
            with self._lock:
                self._rounds.remove(began)

    def cancel(self) -> None:
        """Give up what other threads are waiting for."""
        with self._lock:
            for one in self._rounds:
                one.cancel()

    def reserve(self, replica: Replica, sequences: int) -> None:
        """Count a request that goes to `replica`, or with a negative number one that came back."""
        with self._lock:
            replica.outstanding += sequences

    def count_moved(self) -> None:
        """A request was lost with its replica."""
        with self._lock:
            self.moved += 1


class _Round:
    """One call of `generate`, in one event loop."""

    def __init__(self, balancer: Balancer, fleet: Fleet, deadline_s: float, on_done: OnDone) -> None:
        self._balancer, self._fleet, self._deadline_s, self._on_done = balancer, fleet, deadline_s, on_done
        self._stack = AsyncExitStack()
        self._sessions: dict[str, httpx.AsyncClient] = {}
        self._requests: dict[Replica, int] = {}
        self._freed = asyncio.Condition()
        self._task: asyncio.Task[list[GenerateResponse]] | None = None

    def cancel(self) -> None:
        """From another thread."""
        if self._task is not None:
            with suppress(RuntimeError):  # it has just ended
                self._task.get_loop().call_soon_threadsafe(self._task.cancel)

    async def run(self, requests: Sequence[GenerateRequest]) -> list[GenerateResponse]:
        self._task = asyncio.current_task()
        async with self._stack, asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._one(request)) for request in requests]
        return [task.result() for task in tasks]

    async def _one(self, request: GenerateRequest) -> GenerateResponse:
        end: float | None = None
        while True:
            replica = await self._pick(request, end)
            try:
                reply = await self._ask(replica, request)
            except _LostError as lost:
                end = end or time.monotonic() + self._deadline_s
                if time.monotonic() >= end:
                    raise lost.error from None
                self._balancer.count_moved()
            else:
                self._on_done(reply)
                return reply
            finally:
                await self._free(replica, request)

    async def _pick(self, request: GenerateRequest, end: float | None) -> Replica:
        """The least busy replica that can answer, as soon as it has room."""
        while True:
            able = self._fleet.in_use(request.min_weight_version)
            with_room = [r for r in able if self._requests.get(r, 0) < MAX_CONCURRENT_REQUESTS]
            if with_room:
                replica = min(with_room, key=lambda r: r.outstanding)
                self._requests[replica] = self._requests.get(replica, 0) + 1
                self._balancer.reserve(replica, _sequences(request))
                return replica
            if not able:
                end = end or time.monotonic() + self._deadline_s
                self._require_hope(request, end)
            async with self._freed:
                try:
                    async with asyncio.timeout(_POLL_S):
                        await self._freed.wait()
                except TimeoutError:
                    pass  # a replica may have come back without a word to this loop

    def _require_hope(self, request: GenerateRequest, end: float) -> None:
        if self._fleet.wants_snapshot:
            raise NeedsSnapshotError(self._fleet.describe())
        if time.monotonic() < end:
            return
        errors = [replica.error for replica in self._fleet.replicas if replica.error is not None]
        if errors:
            raise errors[0]
        wanted = f"no replica has version {request.min_weight_version} after {self._deadline_s:g} s"
        raise ServiceUnreachableError(self._fleet.describe() or wanted)

    async def _free(self, replica: Replica, request: GenerateRequest) -> None:
        self._requests[replica] -= 1
        self._balancer.reserve(replica, -_sequences(request))
        async with self._freed:
            self._freed.notify_all()

    async def _ask(self, replica: Replica, request: GenerateRequest) -> GenerateResponse:
        asked = asyncio.ensure_future(replica.client.generate(self._session(replica), request))
        try:
            while not asked.done():
                await asyncio.wait({asked}, timeout=_POLL_S)
                if not replica.is_in_use and not asked.done() and self._fleet.in_use(request.min_weight_version):
                    raise _LostError(ServiceUnreachableError(f"rollout service at {replica.url}: {replica.fenced}"))
            return self._checked(replica, asked)
        finally:
            asked.cancel()

    def _checked(self, replica: Replica, asked: "asyncio.Future[GenerateResponse]") -> GenerateResponse:
        try:
            return asked.result()
        except (ServiceUnreachableError, WireError) as error:
            if not _may_pass(error):
                raise
            self._fleet.fence(replica, str(error), error)
            raise _LostError(error) from error

    def _session(self, replica: Replica) -> httpx.AsyncClient:
        if replica.url not in self._sessions:
            self._sessions[replica.url] = session = replica.client.session(MAX_CONCURRENT_REQUESTS)
            self._stack.push_async_callback(session.aclose)
        return self._sessions[replica.url]


class _LostError(Exception):
    """A request that has to be asked again, and why."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


def _sequences(request: GenerateRequest) -> int:
    return len(request.prompts) * request.n


def _may_pass(error: Exception) -> bool:
    """Whether the replica is lost, for a while or for good, rather than the request wrong."""
    if isinstance(error, ServiceUnreachableError):
        return isinstance(error.__cause__, httpx.HTTPError) and not isinstance(
            error.__cause__, httpx.UnsupportedProtocol | httpx.ReadTimeout
        )
    if isinstance(error, UpdateInProgressError):
        return not error.facts.keys() & {"transfer_id", "run_id"}
    return isinstance(error, NotReadyError | VersionNotReachedError)
