"""One replica of the rollout service as a run sees it: what it holds, whether it is in use, and how it is updated.

Knows one client and one publisher; which replicas there are and what they should hold is `fleet`'s business.
"""

import threading
import time
from collections.abc import Callable

from flashrl_trainer.outgoing import Held, Outgoing
from flashrl_trainer.publisher import Publisher, Sent
from flashrl_trainer.rollout_client import RolloutClient

MIN_RETRY_S, MAX_RETRY_S = 0.25, 5.0


class Replica:
    """`fenced` says why it gets no prompts, and is empty while it does. State is changed under the fleet's lock."""

    def __init__(self, client: RolloutClient, publisher: Publisher) -> None:
        self.client, self._publisher = client, publisher
        self.held: Held | None = None
        self.fenced = "it was not asked yet"
        self.error: BaseException | None = None  # what fenced it, where something failed
        self.wants_snapshot = False
        self.outstanding = 0  # sequences asked for and not answered
        self.misses = 0
        self.fenced_at = time.monotonic()
        self._retry_at, self._retry_s = 0.0, MIN_RETRY_S
        self._publishing = threading.Lock()

    @property
    def url(self) -> str:
        """Where it is."""
        return self.client.url

    @property
    def is_in_use(self) -> bool:
        """Whether it gets prompts."""
        return not self.fenced

    @property
    def is_due(self) -> bool:
        """Whether it is time to look after it again."""
        return time.monotonic() >= self._retry_at

    def publish(self, update: Outgoing, on_bytes: Callable[[int], None], stop: threading.Event) -> Sent:
        """One update; two at a time would only get in each other's way."""
        with self._publishing:
            return self._publisher.publish(update, on_bytes, stop)

    def fence(self, reason: str, error: BaseException | None = None, *, retry_s: float = 0.0) -> bool:
        """No prompts for now, and another look after `retry_s`; whether it was in use."""
        was_in_use = self.is_in_use
        if was_in_use:
            self.fenced_at, self._retry_s = time.monotonic(), MIN_RETRY_S
        self.fenced, self.error = reason, error
        self.look_again_in(retry_s)
        return was_in_use

    def put_off(self) -> None:
        """Look again later, and later still the next time."""
        self.look_again_in(self._retry_s)
        self._retry_s = min(2 * self._retry_s, MAX_RETRY_S)

    def look_again_in(self, seconds: float) -> None:
        """Not before."""
        self._retry_at = time.monotonic() + seconds

    def admit(self, held: Held) -> float:
        """Prompts from now on; for how many seconds there were none."""
        self.held, self.fenced, self.error, self.wants_snapshot, self.misses = held, "", None, False, 0
        return time.monotonic() - self.fenced_at
