"""An encoded update on its way into a replica: begin, chunks with credit, commit; undone by an abort if anything fails.

The only ZeroMQ user of the trainer. Knows nothing of how an update was computed.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import zmq
import zmq.auth

from flashrl_trainer.outgoing import Held, Outgoing
from flashrl_trainer.rollout_client import RolloutClient, ServiceUnreachableError
from flashrl_wire import frames
from flashrl_wire.errors import ERRORS, UpdateInProgressError, WireError
from flashrl_wire.frames import ChunkFrame, Credit, Failed, Hello, Resend, Staged
from flashrl_wire.messages import CommitReply, Manifest, TransferAccepted

_HELLO_EVERY_S = 2.0  # also tells a waiting service that the trainer is alive


@dataclass(frozen=True)
class CurveKeys:
    """The trainer's key pair and the service's public key (Z85)."""

    public: bytes
    secret: bytes
    server: bytes


@dataclass(frozen=True)
class Sent:
    """A committed update as the metrics want it."""

    reply: CommitReply
    kind: str
    wire_bytes: int
    seconds: float


class StoppedError(Exception):
    """Sending was given up because this side asked for it."""


class Publisher:
    """Pushes updates into one replica. `run_id` names this trainer to the service."""

    def __init__(self, client: RolloutClient, run_id: str, *, deadline_s: float, keys: CurveKeys | None) -> None:
        self.run_id = run_id
        self._client, self._deadline_s, self._keys = client, deadline_s, keys

    def publish(
        self,
        update: Outgoing,
        on_bytes: Callable[[int], None] = lambda _: None,
        stop: threading.Event | None = None,
    ) -> Sent:
        """Make `update` what the service holds.

        WireError, ServiceUnreachableError, StoppedError (`stop` was set): it holds what it held.
        """
        start = time.monotonic()
        info = self._client.weights()
        manifest = update.manifest(self.run_id, Held(info.version, info.digest))
        accepted = self._begin(manifest)
        try:
            self._stream(accepted, update.payloads, on_bytes, stop or threading.Event())
            reply = self._commit(accepted, manifest)
        except BaseException:  # Ctrl-C too: the service must not wait for us
            self._abort(accepted)
            raise
        return Sent(reply, manifest.kind, manifest.wire_bytes, time.monotonic() - start)

    def _begin(self, manifest: Manifest) -> TransferAccepted:
        try:
            return self._client.begin(manifest)
        except UpdateInProgressError as error:
            left_over = error.facts.get("transfer_id")
            if left_over is None:
                raise
            # of this run: the reply to its begin was lost, or the trainer was killed during it and resumed
            self._client.abort(str(left_over))
            return self._client.begin(manifest)

    def _commit(self, accepted: TransferAccepted, manifest: Manifest) -> CommitReply:
        try:
            return self._client.commit(accepted.transfer_id, self._deadline_s)
        except ServiceUnreachableError:
            info = self._client.weights()  # a lost reply: the service's own state decides
            if (info.version, info.digest) != (manifest.version, manifest.digest):
                raise
            pause_ms = info.last_update.pause_ms if info.last_update else 0.0
            return CommitReply(
                version=info.version,
                digest=info.digest,
                pause_ms=pause_ms,
                changed_elements=manifest.changed_elements,
                wire_bytes=manifest.wire_bytes,
            )

    def _abort(self, accepted: TransferAccepted) -> None:
        try:
            self._client.abort(accepted.transfer_id)
        except (WireError, ServiceUnreachableError):
            return  # the service drops the transfer itself at its deadline

    def _stream(
        self,
        accepted: TransferAccepted,
        payloads: list[bytes],
        on_bytes: Callable[[int], None],
        stop: threading.Event,
    ) -> None:
        host = urlsplit(self._client.url).hostname
        socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        try:
            self._configure(socket)
            socket.connect(f"tcp://{host}:{accepted.weights_port}")
            _Stream(socket, accepted.transfer_id, payloads, self._deadline_s, on_bytes).run(stop)
        finally:
            socket.close(linger=0)

    def _configure(self, socket: zmq.Socket[bytes]) -> None:
        socket.set(zmq.MAXMSGSIZE, frames.MAX_FRAME_BYTES)
        socket.set(zmq.SNDHWM, 0)  # credit bounds what is in flight
        socket.set(zmq.HEARTBEAT_IVL, 2000)
        socket.set(zmq.HEARTBEAT_TIMEOUT, 10000)
        socket.set(zmq.IPV6, 1)
        if self._keys is not None:
            socket.curve_publickey, socket.curve_secretkey = self._keys.public, self._keys.secret
            socket.curve_serverkey = self._keys.server


class _Stream:
    """The sending side of one transfer: never more outstanding than the service has granted."""

    def __init__(
        self,
        socket: zmq.Socket[bytes],
        transfer_id: str,
        payloads: list[bytes],
        deadline_s: float,
        on_bytes: Callable[[int], None],
    ) -> None:
        self._socket, self._id, self._payloads = socket, transfer_id, payloads
        self._deadline_s, self._on_bytes = deadline_s, on_bytes
        self._queue = deque(range(len(payloads)))
        self._credit = 0
        self._acknowledged: set[int] = set()

    def run(self, stop: threading.Event) -> None:
        """Send until all is staged; WireError if the service refuses, ServiceUnreachableError if it is silent."""
        got_on = last_hello = time.monotonic()
        self._socket.send(frames.pack(Hello(self._id)))
        while not stop.is_set():
            if self._socket.poll(200):
                frame = frames.unpack(self._socket.recv())
                if self._take(frame):
                    return
                if frame != Credit(self._id, 0, -1):  # the answer to a repeated hello is no progress
                    got_on = time.monotonic()
            now = time.monotonic()
            if now - got_on > self._deadline_s:
                raise ServiceUnreachableError(f"transfer {self._id} did not get on for {self._deadline_s:g} s")
            if now - max(got_on, last_hello) > _HELLO_EVERY_S:
                self._socket.send(frames.pack(Hello(self._id)))
                last_hello = now
        raise StoppedError(f"transfer {self._id} was given up")

    def _take(self, frame: frames.Frame) -> bool:
        match frame:
            case Credit(num_bytes=window, index=-1) if window:
                # a new connection: what was in flight is lost, and acknowledgements of what is there follow
                self._credit = window
                self._queue = deque(i for i in range(len(self._payloads)) if i not in self._acknowledged)
            case Credit(num_bytes=num_bytes, index=index):
                self._credit += num_bytes
                if index >= 0 and index not in self._acknowledged:
                    self._acknowledged.add(index)
                    self._on_bytes(len(self._payloads[index]))
            case Resend(index=index):
                self._credit += len(self._payloads[index])
                self._queue.appendleft(index)
            case Failed(code=code, message=message):
                raise ERRORS.get(code, WireError)(message)
            case Staged():
                return True
            case _:
                raise WireError(f"unexpected {type(frame).__name__} from the service")
        self._send_what_fits()
        return False

    def _send_what_fits(self) -> None:
        while self._queue:
            index = self._queue[0]
            payload = self._payloads[index]
            if index in self._acknowledged:
                self._queue.popleft()
                continue
            if len(payload) > self._credit:
                return
            self._queue.popleft()
            self._credit -= len(payload)
            self._socket.send(frames.pack(ChunkFrame(self._id, index)), zmq.SNDMORE)
            self._socket.send(payload, copy=False)


def load_curve_keys(folder: Path) -> CurveKeys:
    """The keys in the folder `trainer` of `flashrl-rollout keys`; ValueError for what is missing or too open."""
    secret_file, server_file = folder / "trainer.key_secret", folder / "server.key"
    for file in (secret_file, server_file):
        if not file.is_file():
            raise ValueError(f"rollout.keys_dir: no file {file}; `flashrl-rollout keys DIR` writes it to DIR/trainer")
    if secret_file.stat().st_mode & 0o077:
        raise ValueError(f"rollout.keys_dir: {secret_file} is readable by others; run chmod 600 on it")
    public, secret = _load_keys(secret_file)
    server, _ = _load_keys(server_file)
    if secret is None:
        raise ValueError(f"rollout.keys_dir: {secret_file} holds no secret key")
    return CurveKeys(public, secret, server)


def _load_keys(file: Path) -> tuple[bytes, bytes | None]:
    try:
        return zmq.auth.load_certificate(file)
    except (OSError, ValueError) as error:
        raise ValueError(f"rollout.keys_dir: {file}: {error}") from error
