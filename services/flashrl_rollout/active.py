"""The transfer under way, from begin to its end.

Knows how far it is and when it has been quiet for too long; knows nothing of what it carries.
"""

import asyncio
import time
from dataclasses import dataclass, field

from flashrl_rollout.staged import StagedUpdate
from flashrl_rollout.transfer import Transfer
from flashrl_wire.errors import NotStagedError
from flashrl_wire.messages import CommitReply


@dataclass(eq=False)
class ActiveTransfer:
    """`staged` is set once every chunk is verified, `commit` while or after it was tried."""

    transfer: Transfer
    began: float = field(default_factory=time.monotonic)
    staged: StagedUpdate | None = None
    is_staging: bool = False
    commit: asyncio.Task[CommitReply] | None = None
    watch: asyncio.Task[None] | None = None

    @property
    def id(self) -> str:
        """The transfer's id."""
        return self.transfer.id

    @property
    def is_committing(self) -> bool:
        """Whether weights are being replaced now."""
        return self.commit is not None and not self.commit.done()

    def require_staged(self) -> StagedUpdate:
        """The staged update; NotStagedError while there is none."""
        if self.staged is None:
            missing = self.transfer.missing_chunks
            raise NotStagedError(f"{missing} chunks are missing, the others not decoded yet", missing_chunks=missing)
        return self.staged

    async def quiet(self, deadline_s: float) -> None:
        """Return once the transfer has not got on for `deadline_s`, while nothing was to be done on this side."""
        while True:
            left_s = self.transfer.touched + deadline_s - time.monotonic()
            if self.is_staging or self.is_committing:
                left_s = deadline_s
            if left_s <= 0:
                return
            await asyncio.sleep(left_s)
