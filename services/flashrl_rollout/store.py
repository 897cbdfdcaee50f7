"""Updates from begin to commit: one at a time, all of it or nothing.

Knows transfers, staged files and who is followed; knows nothing of sockets (`receiver`), HTTP (`app`) or how weights
are replaced (`weights`).
"""

import asyncio
import logging
import time
import uuid
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from flashrl_rollout.active import ActiveTransfer
from flashrl_rollout.checkpoint_path import resolve_checkpoint
from flashrl_rollout.engine import Engine, EngineError
from flashrl_rollout.history import History
from flashrl_rollout.lease import RunLease
from flashrl_rollout.manifest_checks import Base, check_manifest, staged_bytes
from flashrl_rollout.stage_dir import StageDir
from flashrl_rollout.staged import StagedUpdate
from flashrl_rollout.staging import stage
from flashrl_rollout.transfer import Transfer
from flashrl_rollout.weights import Weights, poisoned_error
from flashrl_wire.errors import (
    ERRORS,
    BadUpdateError,
    DrainTimeoutError,
    EngineFailedError,
    TooLargeError,
    UnknownTransferError,
    UpdateInProgressError,
    WireError,
)
from flashrl_wire.frames import Failed, Staged
from flashrl_wire.messages import CommitReply, LoadCheckpoint, Manifest, TransferAccepted

_MESSAGE_CHARACTERS = 1000  # a frame's header is small

logger = logging.getLogger(__name__)


class UpdateReceiver(Protocol):
    """What the store needs of `receiver.Receiver`."""

    port: int

    def open(self, transfer: Transfer, listener: Callable[[Transfer], None]) -> None:
        """Accept the frames of `transfer`; `listener` is called once, from any thread, at its end."""

    def finish(self, outcome: Staged | Failed) -> None:
        """Tell the trainer how its transfer ended."""


@dataclass(frozen=True)
class UpdateSettings:
    """Limits of updates."""

    credit_bytes: int = 16 << 20
    max_update_bytes: int = 64 << 30
    transfer_deadline_s: float = 60.0
    checkpoint_roots: tuple[Path, ...] = ()


class WeightStore:
    """Begin, commit, abort and checkpoint loads; all calls come from one event loop."""

    def __init__(
        self,
        engine: Engine,
        weights: Weights,
        receiver: UpdateReceiver,
        stage_dir: StageDir,
        lease: RunLease,
        history: History,
        settings: UpdateSettings,
    ) -> None:
        self._engine, self._weights, self._receiver, self._stage_dir = engine, weights, receiver, stage_dir
        self._lease, self._history, self._settings = lease, history, settings
        self._active: ActiveTransfer | None = None
        self._loading: asyncio.Task[CommitReply] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()

    def begin(self, manifest: Manifest) -> TransferAccepted:
        """Await the chunks of `manifest`; the WireError of `check_manifest`, or UpdateInProgressError."""
        self._lease.check(manifest.run_id)
        self._check_idle(manifest.run_id)
        with self._history.refusing(manifest.kind, manifest.version, manifest.run_id):
            check_manifest(manifest, self._base(), self._settings.max_update_bytes)
            self._stage_dir.check_room(staged_bytes(manifest.segments))
            active = ActiveTransfer(self._transfer(manifest))
        self._lease.take(manifest.run_id)
        self._active = active
        active.watch = asyncio.create_task(self._watch(active))
        self._receiver.open(active.transfer, self._arrived)
        return TransferAccepted(
            transfer_id=active.id,
            weights_port=self._receiver.port,
            credit_bytes=self._settings.credit_bytes,
            deadline_s=self._settings.transfer_deadline_s,
        )

    def _base(self) -> Base:
        weights = self._weights
        return Base(weights.version, weights.digest, weights.layout.hash, weights.parts, weights.poisoned)

    def _transfer(self, manifest: Manifest) -> Transfer:
        try:
            return Transfer(uuid.uuid4().hex, manifest, self._settings.credit_bytes)
        except OSError as error:
            raise TooLargeError(f"no memory for {manifest.raw_bytes} raw bytes: {error.strerror}") from error

    def _check_idle(self, run_id: str | None) -> None:
        if self._loading is not None:
            raise UpdateInProgressError("a checkpoint is being loaded")
        if self._active is not None:
            own = self._active.transfer.manifest.run_id == run_id
            facts = {"transfer_id": self._active.id} if own else {}  # whoever has the id may abort it
            raise UpdateInProgressError("another transfer is under way", **facts)

    def _arrived(self, transfer: Transfer) -> None:
        self._loop.call_soon_threadsafe(self._on_arrived, transfer)

    def _on_arrived(self, transfer: Transfer) -> None:
        active = self._active
        if active is None or active.transfer is not transfer:
            return
        if isinstance(transfer.outcome, Failed):
            self._drop(active, ERRORS[transfer.outcome.code](transfer.outcome.message))
            return
        active.is_staging = True
        self._spawn(self._stage(active))

    async def _stage(self, active: ActiveTransfer) -> None:
        try:
            path = self._stage_dir.file(active.id)
            staged = await asyncio.to_thread(stage, active.transfer, path, self._weights.parts)
        except WireError as error:
            self._drop(active, error)
            return
        finally:
            active.is_staging = False
            active.transfer.touch()
            if self._active is not active:
                self._stage_dir.drop(active.id)  # dropped while the thread was still writing
        if self._active is active:
            active.staged = staged
            self._receiver.finish(Staged(active.id))

    async def _watch(self, active: ActiveTransfer) -> None:
        deadline_s = self._settings.transfer_deadline_s
        await active.quiet(deadline_s)
        active.watch = None
        error = UnknownTransferError(f"dropped: the transfer did not get on for {deadline_s:g} s")
        self._drop(active, error, "expired")

    def _drop(self, active: ActiveTransfer, error: WireError, result: str = "") -> None:
        """End a transfer without effect; nothing where it has ended already."""
        if self._active is not active:
            return
        self._end(active, error)
        self._receiver.finish(Failed(active.id, error.code, error.message[:_MESSAGE_CHARACTERS]))
        self._failed(active, result or error.code, error)

    def _failed(self, active: ActiveTransfer, result: str, error: WireError) -> None:
        manifest = active.transfer.manifest
        self._history.fail(manifest.kind, manifest.version, result, error.message, manifest.run_id)

    def _end(self, active: ActiveTransfer, outcome: CommitReply | WireError) -> None:
        self._active = None
        if active.watch is not None:
            active.watch.cancel()
        self._stage_dir.drop(active.id)
        self._history.finish(active.id, outcome)

    async def commit(self, transfer_id: str) -> CommitReply:
        """Make a staged update the served version; a repeated call gets the first one's answer."""
        match self._history.outcome(transfer_id):
            case CommitReply() as reply:
                return reply
            case WireError() as error:
                raise error
        active = self._require(transfer_id)
        staged = active.require_staged()
        if active.commit is None:
            active.commit = asyncio.create_task(self._commit(active, staged))
        return await asyncio.shield(active.commit)  # a client that leaves must not leave half a commit behind

    def _require(self, transfer_id: str) -> ActiveTransfer:
        if self._active is None or self._active.id != transfer_id:
            raise UnknownTransferError(f"no transfer {transfer_id}")
        return self._active

    async def _commit(self, active: ActiveTransfer, staged: StagedUpdate) -> CommitReply:
        manifest = active.transfer.manifest
        try:
            pause_ms = await self._weights.replace(
                lambda: self._engine.apply(staged),
                manifest.version,
                manifest.digest,
                prepare=lambda: self._engine.prepare(staged),
            )
        except DrainTimeoutError as error:
            active.commit = None  # still staged: the trainer may try again
            active.transfer.touch()
            self._failed(active, error.code, error)
            raise
        except WireError as error:
            self._drop(active, error)
            raise
        reply = CommitReply(
            version=manifest.version,
            digest=manifest.digest,
            pause_ms=pause_ms,
            changed_elements=manifest.changed_elements,
            wire_bytes=manifest.wire_bytes,
        )
        self._lease.take(manifest.run_id)
        self._end(active, reply)
        if self._history.commit(manifest.kind, reply, time.monotonic() - active.began, manifest.run_id):
            self._spawn(self._audit())  # after the gate has opened: it may take longer than a pause should
        return reply

    async def _audit(self) -> None:
        try:
            passed = await self._weights.audit()
        except EngineError as error:
            logger.error("the audit could not run: %s", error)
        else:
            self._history.audit(self._weights.version, passed)

    def abort(self, transfer_id: str) -> None:
        """Drop a transfer; harmless when repeated. UnknownTransferError for one never begun or already committed."""
        match self._history.outcome(transfer_id):
            case WireError():
                return
            case CommitReply() as reply:
                raise UnknownTransferError(f"transfer {transfer_id} is committed already, as version {reply.version}")
        active = self._require(transfer_id)
        if active.is_committing:
            raise UpdateInProgressError(f"transfer {transfer_id} is being committed")
        self._drop(active, UnknownTransferError("aborted"), "aborted")

    async def load_checkpoint(self, request: LoadCheckpoint) -> CommitReply:
        """Replace all weights by those of a folder on this machine's disk."""
        with self._history.refusing("checkpoint", request.version):
            folder = await asyncio.to_thread(resolve_checkpoint, request.path, self._settings.checkpoint_roots)
        self._check_idle(None)
        if self._weights.poisoned:
            raise poisoned_error()
        self._loading = asyncio.create_task(self._load(folder, request.version))
        return await asyncio.shield(self._loading)

    async def _load(self, folder: Path, version: int) -> CommitReply:
        began = time.monotonic()
        try:
            pause_ms = await self._weights.replace(lambda: self._engine.load_checkpoint(folder), version, None)
        except EngineFailedError as error:  # what it was given is the likeliest cause
            bad = BadUpdateError(f"{folder.name} was not loaded: {error}")
            self._history.fail("checkpoint", version, bad.code, bad.message)
            raise bad from error
        except WireError as error:
            self._history.fail("checkpoint", version, error.code, error.message)
            raise
        finally:
            self._loading = None
        digest, elements = self._weights.digest, self._weights.num_elements
        reply = CommitReply(version=version, digest=digest, pause_ms=pause_ms, changed_elements=elements, wire_bytes=0)
        if self._history.commit("checkpoint", reply, time.monotonic() - began):
            self._spawn(self._audit())
        return reply

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)  # the loop itself keeps no reference
        task.add_done_callback(self._tasks.discard)

    async def close(self, timeout_s: float) -> None:
        """Drop the transfer under way, and let a write that has begun come to its end."""
        running = [task for task in (self._active and self._active.commit, self._loading, *self._tasks) if task]
        if self._active is not None and not self._active.is_committing:
            self._drop(self._active, UnknownTransferError("the service is stopping"), "aborted")
        if running:
            await asyncio.wait(running, timeout=timeout_s)
