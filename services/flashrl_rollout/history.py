"""What became of updates: the answers to repeated calls, the latest update, and when the next audit is due.

Knows outcomes; knows nothing of how they came about.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

from flashrl_rollout.update_log import Kind, UpdateLog
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
        self.log = UpdateLog()
        self.on_result = on_result
        self._audit_every = audit_every
        self._commits = 0
        self._finished: OrderedDict[str, Outcome] = OrderedDict()

    def outcome(self, transfer_id: str) -> Outcome | None:
        """How a transfer ended, if it has and that is not long ago; an error is a new one to raise."""
        outcome = self._finished.get(transfer_id)
        return _untraced(outcome) if isinstance(outcome, WireError) else outcome

    def finish(self, transfer_id: str, outcome: Outcome) -> None:
        """Remember how a transfer ended."""
        self._finished[transfer_id] = _untraced(outcome) if isinstance(outcome, WireError) else outcome
        while len(self._finished) > _REMEMBERED:
            self._finished.popitem(last=False)

    def commit(
        self,
        kind: Literal["checkpoint", "snapshot", "delta"],
        reply: CommitReply,
        seconds: float,
        run_id: str | None = None,
    ) -> bool:
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
        self.log.committed(self.last_update, reply, run_id)
        self.on_result("committed", self.last_update)
        return self._audit_every > 0 and self._commits % self._audit_every == 0

    def fail(self, kind: Kind, version: int, result: str, message: str, run_id: str | None = None) -> None:
        """Note an update that was not committed; `result` is an error's code, "aborted" or "expired"."""
        self.log.failed(kind, version, result, message, run_id)
        self.on_result(result, None)

    @contextmanager
    def refusing(self, kind: Kind, version: int, run_id: str | None = None) -> Iterator[None]:
        """Note what is refused inside."""
        try:
            yield
        except WireError as error:
            self.fail(kind, version, error.code, error.message, run_id)
            raise

    def audit(self, version: int, passed: bool) -> None:
        """Note an audit."""
        self.log.audited(version, passed)
        self.on_result("audit_passed" if passed else "audit_failed", None)


def _untraced(error: WireError) -> WireError:
    """The same error; a raised one holds the frames that it passed through, and these the update's memory."""
    return type(error)(error.message, **error.facts)
