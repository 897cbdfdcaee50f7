"""The ZeroMQ side of weight updates: a ROUTER socket in a thread of its own.

Knows frames and connections; knows nothing of what chunks contain (`transfer`) or of commits (`store`).
"""

import functools
import logging
import operator
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import zmq
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils.monitor import parse_monitor_message

from flashrl_rollout.refusals import Refusals
from flashrl_rollout.security import ServiceKeys
from flashrl_rollout.transfer import Transfer
from flashrl_wire import frames
from flashrl_wire.errors import MalformedError, UnknownTransferError
from flashrl_wire.frames import ChunkFrame, Failed, Frame, Hello, Staged

Listener = Callable[[Transfer], None]
"""Called in the receiver's thread, once, when a transfer is complete or has failed."""

_HEARTBEAT_MS = 2_000
_HEARTBEAT_TIMEOUT_MS = 10_000
_LINGER_MS = 500  # so long a last Failed or Staged may take to leave at the end
_REPLIES_QUEUED = 1 << 17  # above the most chunks of an update: a slow reader loses no acknowledgement
_CHUNKS_QUEUED = 16  # times MAX_FRAME_BYTES is what a client that ignores its credit can make us hold
_LARGEST_BURST = 64  # frames handled before commands are looked at again
_POLL_MS = 1_000

_STRANGER = "a weights connection: no key, one made for another service, or no ZeroMQ at all"
_HANDSHAKES = {
    zmq.EVENT_HANDSHAKE_FAILED_AUTH: "a weights connection: its key is not in the allow-list",
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL: _STRANGER,
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL: _STRANGER,
}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Open:
    transfer: Transfer
    listener: Listener


@dataclass(frozen=True)
class _Finish:
    outcome: Staged | Failed


@dataclass(frozen=True)
class _Stop:
    pass


class BindError(Exception):
    """The address cannot be listened on."""


class Receiver:
    """Binds at construction, receives from `start` to `stop`; one transfer at a time.

    Raises BindError where the address is not free. `keys` turn on CURVE with their allow-list.
    """

    def __init__(self, host: str, port: int, keys: ServiceKeys | None = None) -> None:
        self.malformed_frames = 0
        self._context = zmq.Context()
        self._authenticator = _authenticate(self._context, keys) if keys else None
        try:
            self._router = _bind(self._context, host, port, keys)
        except zmq.ZMQError as error:
            self._end_context()
            raise BindError(str(error)) from error
        self.port = int(self._router.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2])
        self._commands: queue.SimpleQueue[_Open | _Finish | _Stop] = queue.SimpleQueue()
        self._wake, self._woken = _pair(self._context)
        self._handshakes = self._router.get_monitor_socket(functools.reduce(operator.or_, _HANDSHAKES))
        self._refusals = Refusals()
        self._thread = threading.Thread(target=self._run, name="flashrl-receiver", daemon=True)
        self._transfer: Transfer | None = None
        self._listener: Listener | None = None
        self._peer: bytes | None = None
        self._is_stopping = False

    @property
    def is_alive(self) -> bool:
        """Whether frames are being received."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Begin to receive."""
        self._thread.start()

    def open(self, transfer: Transfer, listener: Listener) -> None:
        """Accept the frames of `transfer` from now on, and no longer those of the one before."""
        self._post(_Open(transfer, listener))

    def finish(self, outcome: Staged | Failed) -> None:
        """Tell the trainer how its transfer ended; after Failed its memory is free."""
        self._post(_Finish(outcome))

    def stop(self) -> None:
        """Close the sockets; what was said last still leaves, within half a second."""
        if self._thread.is_alive():
            self._post(_Stop())
            self._thread.join()
        self._router.disable_monitor()
        self._handshakes.close(0)
        self._router.close(_LINGER_MS)
        self._woken.close(0)
        self._wake.close(0)
        self._end_context()

    def _end_context(self) -> None:
        if self._authenticator:
            self._authenticator.stop()
        self._context.term()

    def _post(self, command: _Open | _Finish | _Stop) -> None:
        self._commands.put(command)
        self._wake.send(b"")

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._router, zmq.POLLIN)
        poller.register(self._woken, zmq.POLLIN)
        poller.register(self._handshakes, zmq.POLLIN)
        while not self._is_stopping:
            ready = dict(poller.poll(_POLL_MS))
            if self._woken in ready:
                self._woken.recv()
                self._obey()
            if self._router in ready:
                self._receive_burst()
            if self._handshakes in ready:
                failed = parse_monitor_message(self._handshakes.recv_multipart())
                self._refusals.note(_HANDSHAKES[zmq.Event(failed["event"])])

    def _obey(self) -> None:
        """Every command given so far, in order."""
        while not self._commands.empty():
            match self._commands.get_nowait():
                case _Open(transfer, listener):
                    self._transfer, self._listener, self._peer = transfer, listener, None
                    self._report(transfer)  # an update without chunks is complete from the start
                case _Finish(outcome):
                    self._finish(outcome)
                case _Stop():
                    self._is_stopping = True

    def _finish(self, outcome: Staged | Failed) -> None:
        transfer = self._transfer
        if transfer is None or transfer.id != outcome.transfer_id:
            return
        transfer.outcome = outcome
        if self._peer is not None:
            self._send(self._peer, outcome)
        if isinstance(outcome, Failed):
            self._transfer = None

    def _receive_burst(self) -> None:
        for _ in range(_LARGEST_BURST):
            try:
                parts = self._router.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            self._receive(parts)

    def _receive(self, parts: Sequence[zmq.Frame]) -> None:
        try:
            frame = _read(parts)
        except MalformedError as error:
            self.malformed_frames += 1
            logger.debug("dropped a frame: %s", error)
            return
        if not self._is_open(frame.transfer_id):
            self._obey()  # it may have been opened a moment ago: its first frame overtakes the command's wake-up
        peer, transfer = parts[0].bytes, self._transfer
        if transfer is None or not self._is_open(frame.transfer_id):
            self._send(peer, Failed(frame.transfer_id, UnknownTransferError.code, "no such transfer"))
            return
        self._peer = peer
        for reply in transfer.handle(frame, parts[2].buffer if len(parts) == 3 else None, peer):
            self._send(peer, reply)
        self._report(transfer)

    def _is_open(self, transfer_id: str) -> bool:
        return self._transfer is not None and self._transfer.id == transfer_id

    def _report(self, transfer: Transfer) -> None:
        """Tell the listener once that nothing more is awaited."""
        listener = self._listener
        if listener and (transfer.is_complete or transfer.outcome is not None):
            self._listener = None
            listener(transfer)

    def _send(self, peer: bytes, frame: Frame) -> None:
        try:
            self._router.send_multipart([peer, frames.pack(frame)], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            # gone, or not reading: it says Hello again when it is back, and learns all it missed
            logger.debug("a reply was lost: %s", error)


def _read(parts: Sequence[zmq.Frame]) -> Hello | ChunkFrame:
    """The frame in the parts [peer, header] or [peer, header, payload]."""
    if not 2 <= len(parts) <= 3:
        raise MalformedError(f"message has {len(parts) - 1} parts")
    frame = frames.unpack(parts[1].buffer)
    expected = {Hello: 2, ChunkFrame: 3}.get(type(frame))
    if not isinstance(frame, Hello | ChunkFrame) or len(parts) != expected:
        raise MalformedError(f"{type(frame).__name__} with {len(parts) - 1} parts is not for a service")
    return frame


def _bind(context: zmq.Context[zmq.Socket[bytes]], host: str, port: int, keys: ServiceKeys | None) -> zmq.Socket[bytes]:
    router = context.socket(zmq.ROUTER)
    router.setsockopt(zmq.ROUTER_MANDATORY, 1)
    router.setsockopt(zmq.LINGER, _LINGER_MS)
    router.setsockopt(zmq.MAXMSGSIZE, frames.MAX_FRAME_BYTES)
    router.setsockopt(zmq.SNDHWM, _REPLIES_QUEUED)
    router.setsockopt(zmq.RCVHWM, _CHUNKS_QUEUED)
    router.setsockopt(zmq.HEARTBEAT_IVL, _HEARTBEAT_MS)
    router.setsockopt(zmq.HEARTBEAT_TIMEOUT, _HEARTBEAT_TIMEOUT_MS)
    if keys:
        router.curve_server = True
        router.curve_publickey, router.curve_secretkey = keys.public, keys.secret
    if ":" in host:
        router.setsockopt(zmq.IPV6, 1)
        host = f"[{host}]"
    try:
        router.bind(f"tcp://{host}:{port or '*'}")
    except zmq.ZMQError:
        router.close(0)
        raise
    return router


def _authenticate(context: zmq.Context[zmq.Socket[bytes]], keys: ServiceKeys) -> ThreadAuthenticator:
    """Without this allow-list a CURVE server lets in any client that knows its public key."""
    authenticator = ThreadAuthenticator(context)
    authenticator.start()
    authenticator.configure_curve(domain="*", location=str(keys.allowed_dir))
    return authenticator


def _pair(context: zmq.Context[zmq.Socket[bytes]]) -> tuple[zmq.Socket[bytes], zmq.Socket[bytes]]:
    woken = context.socket(zmq.PAIR)
    woken.bind("inproc://flashrl-receiver")
    wake = context.socket(zmq.PAIR)
    wake.connect("inproc://flashrl-receiver")
    return wake, woken
