"""Brings replicas that are not in use back to what they should hold, and notices those that answer no more.

Works beside training, in threads of its own. Knows nothing of samples or of the policy.
"""

import time
from collections.abc import Callable
from concurrent.futures import Future

from flashrl_trainer.fleet import Fleet
from flashrl_trainer.jobs import spawn
from flashrl_trainer.publisher import StoppedError
from flashrl_trainer.replica import Replica
from flashrl_trainer.rollout_client import ServiceUnreachableError
from flashrl_wire.errors import WireError

TICK_S = 0.1
PROBE_EVERY_S, PROBE_TIMEOUT_S, MAX_MISSES = 1.0, 5.0, 3
STARTING_EVERY_S = 0.5
FIND_EVERY_S = 2.0


class Keeper:
    """`find` gives the URLs that there are now, and `make` a replica for one of them."""

    def __init__(self, fleet: Fleet, find: Callable[[], list[str]], make: Callable[[str], Replica]) -> None:
        self._fleet, self._find, self._make = fleet, find, make
        self._jobs: dict[Replica, Future[None]] = {}
        self._find_at = 0.0

    def start(self) -> None:
        """Until the fleet is closed."""
        spawn(self._run, "keeper")

    def _run(self) -> None:
        while not self._fleet.stopping.wait(TICK_S):
            self.find()
            for replica in self._fleet.replicas:
                if replica.is_due and self._is_idle(replica):
                    self._jobs[replica] = spawn(self._look_after(replica), f"keeper of {replica.url}")

    def find(self) -> None:
        """Add replicas that are new; drop those that are neither named any more nor in use."""
        if time.monotonic() < self._find_at:
            return
        self._find_at = time.monotonic() + FIND_EVERY_S
        urls = self._find()
        known = {replica.url: replica for replica in self._fleet.replicas}
        for url in urls:
            if url not in known:
                self._fleet.add(self._make(url))
        for url, replica in known.items():
            if urls and url not in urls and not replica.is_in_use:
                self._fleet.drop(replica)

    def _is_idle(self, replica: Replica) -> bool:
        job = self._jobs.get(replica)
        return job is None or job.done()

    def _look_after(self, replica: Replica) -> Callable[[], None]:
        def work() -> None:
            if replica.is_in_use:
                self._probe(replica)
            else:
                self._try_to_bring_back(replica)

        return work

    def _probe(self, replica: Replica) -> None:
        """Its requests are moved only where there is another replica to move them to."""
        replica.look_again_in(PROBE_EVERY_S)
        if len(self._fleet.replicas) == 1:
            return
        alive = replica.client.is_alive(PROBE_TIMEOUT_S)
        replica.misses = 0 if alive else replica.misses + 1
        if replica.misses >= MAX_MISSES and len(self._fleet.in_use()) > 1:
            self._fleet.fence(replica, f"/health was not answered {MAX_MISSES} times")

    def _try_to_bring_back(self, replica: Replica) -> None:
        replica.put_off()
        try:
            self._bring_back(replica)
        except (WireError, ServiceUnreachableError, StoppedError, ValueError) as error:
            self._explain(replica, str(error), error)

    def _bring_back(self, replica: Replica) -> None:
        state = replica.client.ready_state()
        if state is not None:
            replica.look_again_in(STARTING_EVERY_S)
            self._explain(replica, state, None)
            return
        while not self._fleet.stopping.is_set():
            info = replica.client.weights()
            self._fleet.check(replica, info)
            if self._fleet.admit(replica, info):
                return
            update = self._fleet.update_for(info)
            if update is None:
                self._explain(replica, "poisoned" if info.poisoned else f"it holds version {info.version}", None)
                self._fleet.want_snapshot(replica)
                return
            replica.publish(update, lambda _: None, self._fleet.stopping)

    def _explain(self, replica: Replica, reason: str, error: Exception | None) -> None:
        """Still fenced, and why: what is said if no other replica comes to help."""
        if not replica.is_in_use:
            replica.fenced, replica.error = reason.partition("\n")[0], error
