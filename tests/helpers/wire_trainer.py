"""The smallest trainer: turns two stored states into an update and sends it, frame by frame, as a test wants it.

Knows the wire only; shares no code with the real publisher.
"""

import asyncio
import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

import httpx
import zmq
import zmq.asyncio

from flashrl_rollout import stored_state
from flashrl_rollout.security import ServiceKeys
from flashrl_rollout.stored_state import Parts
from flashrl_wire import codec, delta, frames
from flashrl_wire.delta import Change
from flashrl_wire.frames import ChunkFrame, Failed, Frame, Hello, Staged
from flashrl_wire.layout import WeightLayout
from flashrl_wire.messages import Manifest

TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Update:
    """A manifest and the bytes it declares."""

    manifest: Manifest
    payloads: list[bytes]

    def declaring(self, **fields: object) -> "Update":
        """The same bytes under a manifest with other fields."""
        return dataclasses.replace(self, manifest=self.manifest.model_copy(update=fields))


def delta_update(layout: WeightLayout, old: Parts, new: Parts, *, base: int = 0, block_bytes: int = 256) -> Update:
    """What moves `old`, version `base`, to `new`, the version after it."""
    found = [delta.diff(name, old[name], new[name]) for name in old]
    return _update("delta", layout, old, new, [pair[0] for pair in found if pair], base, block_bytes)


def snapshot_update(layout: WeightLayout, old: Parts, new: Parts, *, base: int = 0, block_bytes: int = 256) -> Update:
    """Every element of `new`."""
    changes = [delta.snapshot(name, values) for name, values in new.items()]
    return _update("snapshot", layout, old, new, changes, base, block_bytes)


def update_of(changes: Iterable[Change], like: Update, block_bytes: int = 256) -> Update:
    """The manifest of `like` over other changes."""
    encoded = codec.encode(changes, block_bytes)
    fields = {"segments": encoded.segments, "chunks": encoded.chunks, "changed_elements": 0}
    return Update(like.manifest.model_copy(update=fields), encoded.payloads)


def _update(
    kind: str, layout: WeightLayout, old: Parts, new: Parts, changes: list[Change], base: int, block_bytes: int
) -> Update:
    encoded = codec.encode(changes, block_bytes)
    manifest = Manifest.model_validate(
        {
            "kind": kind,
            "run_id": "run-a",
            "base_version": base,
            "base_digest": stored_state.combined(layout, stored_state.digests(old)),
            "version": base + 1,
            "digest": stored_state.combined(layout, stored_state.digests(new)),
            "layout_hash": layout.hash,
            "changed_elements": encoded.changed_elements,
            "segments": encoded.segments,
            "chunks": encoded.chunks,
        }
    )
    return Update(manifest, encoded.payloads)


class Wire:
    """A DEALER connection to a weights port."""

    def __init__(self, port: int, keys: ServiceKeys | None = None, server_key: bytes | None = None) -> None:
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.DEALER)
        if keys is not None:
            self._socket.curve_publickey, self._socket.curve_secretkey = keys.public, keys.secret
            self._socket.curve_serverkey = server_key
        self._socket.connect(f"tcp://127.0.0.1:{port}")

    async def send(self, frame: Frame, payload: bytes | None = None) -> None:
        """One frame, and a payload part where there is one."""
        await self.send_parts(frames.pack(frame), *([] if payload is None else [payload]))

    async def send_parts(self, *parts: bytes) -> None:
        """Whatever bytes."""
        await self._socket.send_multipart(list(parts))

    async def receive(self, timeout_s: float = TIMEOUT_S) -> Frame:
        """The next frame; TimeoutError if none comes."""
        return frames.unpack(await asyncio.wait_for(self._socket.recv(), timeout_s))

    async def receive_last(self, transfer_id: str) -> Staged | Failed:
        """Skip to the end of a transfer."""
        while True:
            frame = await self.receive()
            if isinstance(frame, Staged | Failed) and frame.transfer_id == transfer_id:
                return frame

    async def push(self, transfer_id: str, payloads: list[bytes], indices: Iterable[int] | None = None) -> None:
        """Send chunks without waiting for anything."""
        for index in range(len(payloads)) if indices is None else indices:
            await self.send(ChunkFrame(transfer_id, index), payloads[index])

    def close(self) -> None:
        """Drop the connection and what it has not sent."""
        self._context.destroy(linger=0)


class WireTrainer:
    """HTTP and ZeroMQ of one trainer."""

    def __init__(self, http: httpx.AsyncClient, wire: Wire) -> None:
        self.http, self.wire = http, wire

    async def begin(self, update: Update) -> httpx.Response:
        """POST the manifest."""
        return await self.http.post("/load_weights", content=update.manifest.model_dump_json())

    async def accepted(self, update: Update) -> str:
        """POST the manifest; the transfer id."""
        reply = await self.begin(update)
        assert reply.status_code == 202, reply.text
        return str(reply.json()["transfer_id"])

    async def sent(self, update: Update) -> Staged | Failed:
        """Begin and send everything; how the transfer ended."""
        transfer_id = await self.accepted(update)
        await self.wire.send(Hello(transfer_id))
        await self.wire.push(transfer_id, update.payloads)
        return await self.wire.receive_last(transfer_id)

    async def staged(self, update: Update) -> str:
        """The same; the transfer id once it is staged."""
        outcome = await self.sent(update)
        assert isinstance(outcome, Staged), outcome
        return outcome.transfer_id

    async def failed(self, update: Update) -> Failed:
        """The same; how it failed."""
        outcome = await self.sent(update)
        assert isinstance(outcome, Failed), outcome
        return outcome

    async def commit(self, transfer_id: str) -> httpx.Response:
        """POST the commit."""
        return await self.http.post(f"/load_weights/{transfer_id}/commit")

    async def abort(self, transfer_id: str) -> httpx.Response:
        """DELETE the transfer."""
        return await self.http.delete(f"/load_weights/{transfer_id}")

    async def publish(self, update: Update) -> httpx.Response:
        """All of it."""
        return await self.commit(await self.staged(update))
