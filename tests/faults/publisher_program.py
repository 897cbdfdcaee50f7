"""A trainer that publishes one update and stands still where it is told to, so that it can be killed there.

Knows the real publisher; knows nothing of what the service makes of it.
"""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from tests.faults import served
from tests.helpers.forked import LIMIT_S
from tests.helpers.outgoing import outgoing

from flashrl_trainer.rollout_client import RolloutClient
from flashrl_wire.messages import CommitReply, Manifest, TransferAccepted

Moment = Literal["before begin", "begun", "chunks", "staged", "committed"]
MOMENTS: tuple[Moment, ...] = ("before begin", "begun", "chunks", "staged", "committed")


class WatchedClient(RolloutClient):
    """Says at which moment of an update the publisher is."""

    def __init__(self, url: str, reached: Callable[[Moment], None]) -> None:
        super().__init__(url, None, request_timeout_s=LIMIT_S, retry_s=0)
        self.reached = reached

    def begin(self, manifest: Manifest) -> TransferAccepted:
        """Two moments."""
        self.reached("before begin")
        accepted = super().begin(manifest)
        self.reached("begun")
        return accepted

    def commit(self, transfer_id: str, timeout_s: float) -> CommitReply:
        """Two more."""
        self.reached("staged")
        reply = super().commit(transfer_id, timeout_s)
        self.reached("committed")
        return reply


def publish_watched(
    url: str, old: served.Stored, reached: Callable[[Moment], None], *, deadline_s: float = LIMIT_S
) -> None:
    """From `old` to the version after it."""
    publisher = served.publisher_for(WatchedClient(url, reached), deadline_s=deadline_s)
    publisher.publish(outgoing(old.delta_to(old.moved())), lambda _: reached("chunks"))


def main(arguments: list[str]) -> int:
    """`{"url": ..., "stop_at": a moment or nothing, "stopped": a file that is written there}`."""
    options = json.loads(arguments[0])

    def reached(moment: Moment) -> None:
        if moment == options["stop_at"]:
            Path(options["stopped"]).touch()
            signal.pause()

    publish_watched(options["url"], served.first(), reached)
    return 0
