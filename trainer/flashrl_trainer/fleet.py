"""The replicas of a run: which are in use, what they should hold, and one update for all of them at once.

Lives on rank 0. Knows nothing of requests (`balancer`), of bringing a lost replica back (`keeper`) or of the policy.
"""

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait

from flashrl_trainer.delta_ring import DeltaRing
from flashrl_trainer.jobs import spawn
from flashrl_trainer.outgoing import Held, Outgoing
from flashrl_trainer.publisher import Sent, StoppedError
from flashrl_trainer.replica import Replica
from flashrl_trainer.rollout_client import ServiceUnreachableError
from flashrl_wire.errors import (
    DrainTimeoutError,
    NotReadyError,
    StaleBaseError,
    UnknownTransferError,
)
from flashrl_wire.messages import WeightsInfo

PASSING = (
    DrainTimeoutError, NotReadyError, ServiceUnreachableError, StaleBaseError, StoppedError, UnknownTransferError,
)  # fmt: skip
"""Failures of an update after which the same replica may take it later."""

MAX_PUSHES = 3  # of one update, while no replica has taken it
_POLL_S = 0.2
_RELEASE_S = 6.0

Check = Callable[[str, WeightsInfo], None]
"""Raises for a replica, by URL and facts, that does not fit the run."""


class NeedsSnapshotError(ServiceUnreachableError):
    """No replica is in use, and one that is there cannot be brought back by deltas."""


class Fleet:
    """Thread-safe. `deadline_s`: how long to wait for a replica while none is in use; `straggler_s`: how long the
    others may take for an update that one has committed. `note` takes lines for the person who watches."""

    def __init__(
        self, replicas: Iterable[Replica], *, deadline_s: float, straggler_s: float, note: Callable[[str], None]
    ) -> None:
        self.note = note
        self.stopping = threading.Event()
        self.target: Held | None = None
        self.fences = 0
        self._replicas = list(replicas)
        self._deadline_s, self._straggler_s = deadline_s, straggler_s
        self._ring: DeltaRing | None = None
        self._snapshot: Outgoing | None = None
        self._check: Check = lambda url, info: None
        self._changed = threading.Condition()

    @property
    def replicas(self) -> list[Replica]:
        """All, in use or not."""
        with self._changed:
            return list(self._replicas)

    def in_use(self, version: int = 0) -> list[Replica]:
        """Those that sample from `version` or a later one."""
        return [r for r in self.replicas if r.is_in_use and r.held is not None and r.held.version >= version]

    @property
    def wants_snapshot(self) -> bool:
        """Whether a replica waits for a snapshot."""
        return any(replica.wants_snapshot for replica in self.replicas)

    def add(self, replica: Replica) -> None:
        """A replica that is to be brought to the target."""
        with self._changed:
            self._replicas.append(replica)

    def drop(self, replica: Replica) -> None:
        """Forget one that is gone for good."""
        with self._changed:
            self._replicas.remove(replica)

    def begin(self, target: Held, ring: DeltaRing, check: Check) -> None:
        """What everybody should hold from now on, and who may join."""
        with self._changed:
            self.target, self._ring, self._check, self._snapshot = target, ring, check, None
            self._fence_those_behind()

    def check(self, replica: Replica, info: WeightsInfo) -> None:
        """Raises for a replica that does not fit the run."""
        self._check(replica.url, info)

    def fence(self, replica: Replica, reason: str, error: BaseException | None = None) -> None:
        """No prompts for it until the keeper has brought it back."""
        with self._changed:
            was_in_use = replica.fence(reason, error)
            replica.wants_snapshot = False
            self.fences += was_in_use
            in_use = sum(other.is_in_use for other in self._replicas)
            self._changed.notify_all()
        if was_in_use:
            self.note(f"{replica.url} gets no prompts: {reason} ({in_use} of {len(self.replicas)} in use)")

    def admit(self, replica: Replica, info: WeightsInfo) -> bool:
        """Take a replica into use if it holds the target."""
        held = Held(info.version, info.digest)
        with self._changed:
            if info.poisoned or (self.target is not None and held != self.target):
                return False
            was_in_use = replica.is_in_use
            seconds = replica.admit(held)
            if all(other.is_in_use for other in self._replicas):
                self._snapshot = None
            self._changed.notify_all()
        if not was_in_use and self.target is not None:
            self.note(f"{replica.url} is in use at version {held.version}, after {seconds:.1f} s without prompts")
        return True

    def update_for(self, info: WeightsInfo) -> Outgoing | None:
        """What brings a replica nearer to the target; None, and it waits for a snapshot, where there is nothing."""
        with self._changed:
            ring, snapshot = self._ring, self._snapshot
            path = ring.since(Held(info.version, info.digest)) if ring and not info.poisoned else []
            if ring and snapshot and not path:
                leads_on = snapshot.target == self.target or ring.since(snapshot.target)
                return snapshot if leads_on else None
        return ring.merged(path) if ring and path else None

    def want_snapshot(self, replica: Replica) -> None:
        """Deltas do not help it."""
        with self._changed:
            replica.wants_snapshot = True
            self._changed.notify_all()

    def offer(self, snapshot: Outgoing) -> None:
        """A snapshot of the target for those that wait for one; training goes on meanwhile."""
        with self._changed:
            self._snapshot = snapshot
            for replica in self._replicas:
                if replica.wants_snapshot:
                    replica.wants_snapshot = False
                    replica.look_again_in(0.0)

    def remember(self, delta: Outgoing) -> None:
        """Keep a delta for those that missed it."""
        with self._changed:
            if self._ring is not None:
                self._ring.add(delta)

    def push(self, update: Outgoing, on_bytes: Callable[[int], None] = lambda _: None) -> list[Sent]:
        """Make `update` the target: as soon as one replica has committed it, it is decided.

        The others have `straggler_s` from then on, and are fenced while they take longer. With none that takes it:
        NeedsSnapshotError, ServiceUnreachableError or what a replica said, and the target is what it was.
        """
        end = time.monotonic() + self._deadline_s
        for attempt in range(MAX_PUSHES):
            sent, errors = self._push_once(update, on_bytes)
            if sent:
                return sent
            if fatal := [error for error in errors if not isinstance(error, PASSING)]:
                raise fatal[0]
            if errors and (attempt == MAX_PUSHES - 1 or time.monotonic() > end):
                raise errors[0]
            self.wait_for_one(end)
        raise AssertionError("an attempt without an error found a replica in use")

    def wait_for_one(self, end: float) -> None:
        """Return once a replica is in use; NeedsSnapshotError if one waits for that, else what keeps them at `end`."""
        with self._changed:
            while not any(replica.is_in_use for replica in self._replicas):
                if any(replica.wants_snapshot for replica in self._replicas):
                    raise NeedsSnapshotError(self.describe())
                if time.monotonic() >= end:
                    raise ServiceUnreachableError(self.describe())
                self._changed.wait(_POLL_S)  # a signal's handler runs in between

    def describe(self) -> str:
        """Why each replica that is not in use is not, in one line."""
        return "; ".join(_with_url(replica) for replica in self.replicas if not replica.is_in_use)

    def _push_once(self, update: Outgoing, on_bytes: Callable[[int], None]) -> tuple[list[Sent], list[BaseException]]:
        stop = threading.Event()

        def count(num_bytes: int) -> None:
            with self._changed:
                on_bytes(num_bytes)

        def publish(replica: Replica) -> Callable[[], Sent]:
            return lambda: replica.publish(update, count, stop)

        jobs = {spawn(publish(replica), f"push to {replica.url}"): replica for replica in self._takers(update)}
        try:
            sent, errors, late = self._settle(jobs)
        except BaseException:  # Ctrl-C: no replica must wait for us
            stop.set()
            wait(jobs, timeout=self._straggler_s)
            raise
        if sent:
            self._decide(update, sent, late)
        return list(sent.values()), errors

    def _takers(self, update: Outgoing) -> Sequence[Replica]:
        if update.base is None:
            return [replica for replica in self.replicas if replica.is_in_use or replica.wants_snapshot]
        return [r for r in self.in_use() if r.held is not None and r.held.digest == update.base.digest]

    def _settle(
        self, jobs: dict["Future[Sent]", Replica]
    ) -> tuple[dict[Replica, Sent], list[BaseException], list[Replica]]:
        """How each push ended, and which replicas are late; one that the keeper fenced meanwhile is not waited for."""
        sent: dict[Replica, Sent] = {}
        errors: list[BaseException] = []
        pending, end = set(jobs), float("inf")
        in_use_before = {replica for replica in jobs.values() if replica.is_in_use}

        def is_lost(job: "Future[Sent]") -> bool:
            return jobs[job] in in_use_before and not jobs[job].is_in_use

        while pending and time.monotonic() < end and not (sent and all(map(is_lost, pending))):
            done, pending = wait(pending, timeout=_POLL_S, return_when=FIRST_COMPLETED)
            for job in done:
                error = job.exception()
                if error is None:
                    sent[jobs[job]] = job.result()
                    end = min(end, time.monotonic() + self._straggler_s)
                else:
                    errors.append(error)
                    self.fence(jobs[job], _first_line(error), error)
        return sent, errors, [jobs[job] for job in pending if not is_lost(job)]

    def _decide(self, update: Outgoing, sent: Iterable[Replica], late: Iterable[Replica]) -> None:
        with self._changed:
            self.target = update.target
            if update.base is not None and self._ring is not None:
                self._ring.add(update)
            for replica in sent:
                replica.admit(update.target)
        for replica in late:
            self.fence(replica, f"version {update.target.version} did not arrive within {self._straggler_s:g} s")
        with self._changed:
            self._fence_those_behind()

    def _fence_those_behind(self) -> None:
        for replica in self._replicas:
            if replica.is_in_use and replica.held != self.target:
                replica.fence("it has yet to get the last version")

    def close(self, run_id: str) -> None:
        """Look after nobody any more, and let other runs be followed."""
        self.stopping.set()
        wait([spawn(_release(replica, run_id), "release") for replica in self.replicas], timeout=_RELEASE_S)
        for replica in self.replicas:
            replica.client.close()


def _release(replica: Replica, run_id: str) -> Callable[[], None]:
    return lambda: replica.client.release(run_id)


def _with_url(replica: Replica) -> str:
    return replica.fenced if replica.url in replica.fenced else f"rollout service at {replica.url}: {replica.fenced}"


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
