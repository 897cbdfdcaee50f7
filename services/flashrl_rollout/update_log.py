"""The latest updates and audits, for people: a row of the status page and a log line each.

Knows what is worth telling; knows nothing of how an update works.
"""

import logging
import time
from collections import deque
from dataclasses import dataclass
from typing import Literal

from flashrl_rollout.logs import fields
from flashrl_wire.messages import CommitReply, LastUpdate

Kind = Literal["checkpoint", "snapshot", "delta", "audit"]

_KEPT = 20
_SHORT = 8  # digits of a digest that tell two apart at a glance
_MESSAGE_CHARACTERS = 300

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class UpdateRow:
    """How an update ended, `ended` in seconds since 1970; the numbers are those of a commit."""

    ended: float
    kind: Kind
    version: int
    result: str
    run_id: str | None = None
    changed_elements: int | None = None
    wire_bytes: int | None = None
    pause_ms: float | None = None
    seconds: float | None = None
    message: str | None = None


class UpdateLog:
    """Remembers the last ones."""

    def __init__(self) -> None:
        self._rows: deque[UpdateRow] = deque(maxlen=_KEPT)

    def rows(self) -> list[UpdateRow]:
        """The newest first."""
        return list(reversed(self._rows))

    def committed(self, update: LastUpdate, reply: CommitReply, run_id: str | None) -> None:
        """An update is served now."""
        numbers = update.model_dump(exclude={"kind", "version"})
        self._rows.append(UpdateRow(time.time(), update.kind, update.version, "committed", run_id, **numbers))
        numbers |= {"pause_ms": round(update.pause_ms, 1), "seconds": round(update.seconds, 3)}
        facts = {"kind": update.kind, "version": update.version, "digest": reply.digest[:_SHORT], "run_id": run_id}
        logger.info("committed", extra=fields(**facts, **numbers))

    def failed(self, kind: Kind, version: int, result: str, message: str, run_id: str | None) -> None:
        """An update was refused, given up or taken back: the old weights are served, or it says otherwise."""
        brief = message[:_MESSAGE_CHARACTERS]
        self._rows.append(UpdateRow(time.time(), kind, version, result, run_id, message=brief))
        logger.warning("update %s", result, extra=fields(kind=kind, version=version, run_id=run_id, error=brief))

    def audited(self, version: int, passed: bool) -> None:
        """All weights were read back between two commits."""
        result = "passed" if passed else "failed"
        self._rows.append(UpdateRow(time.time(), "audit", version, result))
        logger.log(logging.INFO if passed else logging.ERROR, "audit %s", result, extra=fields(version=version))
