"""What became of updates: the answers to repeated calls, the latest update, and when the next audit is due.

Knows outcomes; knows nothing of how they came about.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Literal

from flashrl_wire.errors import WireError
from flashrl_wire.messages import CommitReply, LastUpdate

Outcome = CommitReply | WireError
OnResult = Callable[[str, LastUpdate | None], None]
"""Gets the code of every ending ("committed", "aborted", "expired", "audit_failed" or an error's).

And the update, if it was committed."""

_REMEMBERED = 64


class History:
    """Outcomes of the last transfers and the latest update."""

    def __init__(self, audit_every: int, on_result: OnResult) -> None:
        self.last_update: LastUpdate | None = None
        self.on_result = on_result
        self._audit_every = audit_every
        self._commits = 0
        self._finished: OrderedDict[str, Outcome] = OrderedDict()

    def outcome(self, transfer_id: str) -> Outcome | None:
        """How a transfer ended, if it has and that is not long ago; an error is a new one to raise."""
        outcome = self._finished.get(transfer_id)
        return type(outcome)(outcome.message, **outcome.facts) if isinstance(outcome, WireError) else outcome

    def finish(self, transfer_id: str, outcome: Outcome) -> None:
        """Remember how a transfer ended."""
        self._finished[transfer_id] = outcome
        while len(self._finished) > _REMEMBERED:
            self._finished.popitem(last=False)

    def commit(self, kind: Literal["checkpoint", "snapshot", "delta"], reply: CommitReply, seconds: float) -> bool:
        """Note a committed update; whether an audit is due."""
        self.last_update = LastUpdate(
            kind=kind,
            version=reply.version,
            changed_elements=reply.changed_elements,
            wire_bytes=reply.wire_bytes,
            pause_ms=reply.pause_ms,
            seconds=seconds,
        )
        self._commits += 1
        self.on_result("committed", self.last_update)
        return self._audit_every > 0 and self._commits % self._audit_every == 0
