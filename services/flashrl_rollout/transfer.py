"""One transfer's chunks as a state machine: frames in, replies out.

Knows what has arrived and what each peer is told; knows nothing of sockets, threads or engines.
"""

import itertools
import mmap
import time
from collections import Counter

import numpy as np

from flashrl_wire import codec
from flashrl_wire.codec import Bytes
from flashrl_wire.errors import BadUpdateError, TooLargeError
from flashrl_wire.frames import ChunkFrame, Credit, Failed, Frame, Hello, Resend, Staged
from flashrl_wire.messages import Manifest

MAX_RESENDS = 3  # a chunk that arrives damaged more often is damaged where it comes from
MAX_REPEATS = 3  # so many times the declared bytes may arrive in all, resends and reconnections included


class RawBuffer:
    """Anonymous memory for a raw stream, given back to the system piece by piece as it is decoded."""

    def __init__(self, num_bytes: int) -> None:
        self._map = mmap.mmap(-1, max(1, num_bytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.bytes: Bytes = np.frombuffer(self._map, dtype=np.uint8)[:num_bytes]
        self._released = 0

    def write(self, offset: int, block: bytes) -> None:
        """Copy a decompressed block to its place."""
        self.bytes[offset : offset + len(block)] = np.frombuffer(block, dtype=np.uint8)

    def release(self, end: int) -> None:
        """Give the whole pages before `end` back; they read as zeros from now on."""
        pages_end = end - end % mmap.PAGESIZE
        if pages_end > self._released:
            self._map.madvise(mmap.MADV_DONTNEED, self._released, pages_end - self._released)
            self._released = pages_end


class Transfer:
    """The chunks of one manifest. Used by one thread until it is complete; then its buffer is the decoder's."""

    def __init__(self, transfer_id: str, manifest: Manifest, credit_bytes: int) -> None:
        self.id = transfer_id
        self.manifest = manifest
        self.buffer = RawBuffer(manifest.raw_bytes)
        self.outcome: Staged | Failed | None = None
        self.touched = time.monotonic()
        self._credit_bytes = credit_bytes
        self._offsets = [0, *itertools.accumulate(chunk.raw_bytes for chunk in manifest.chunks)]
        self._present: set[int] = set()
        self._damaged: Counter[int] = Counter()
        self._peer: bytes | None = None
        self._received_bytes = 0
        self._max_received_bytes = MAX_REPEATS * manifest.wire_bytes + credit_bytes

    @property
    def missing_chunks(self) -> int:
        """Chunks that have not arrived intact yet."""
        return len(self.manifest.chunks) - len(self._present)

    @property
    def is_complete(self) -> bool:
        """Every chunk has arrived intact."""
        return not self.missing_chunks

    def handle(self, frame: Hello | ChunkFrame, payload: memoryview | None, peer: bytes) -> list[Frame]:
        """The replies to a frame of this transfer from the connection `peer`."""
        if isinstance(self.outcome, Failed):
            return [self.outcome]
        if isinstance(frame, Hello):
            return self._hello(peer)
        self.touch()
        return self._chunk(frame.index, payload if payload is not None else memoryview(b""))

    def touch(self) -> None:
        """Note that the transfer got on: a trainer that only says Hello again and again does not keep it alive."""
        self.touched = time.monotonic()

    def fail(self, code: str, message: str) -> Failed:
        """End the transfer; every later frame gets the same answer."""
        self.outcome = Failed(self.id, code, message)
        return self.outcome

    def _hello(self, peer: bytes) -> list[Frame]:
        if self.outcome is not None:
            return [self.outcome]
        if peer == self._peer:
            return [Credit(self.id, 0, -1)]  # a heartbeat: no second window for the same connection
        self._peer = peer
        self.touch()
        return [Credit(self.id, self._credit_bytes, -1), *(Credit(self.id, 0, i) for i in sorted(self._present))]

    def _chunk(self, index: int, payload: memoryview) -> list[Frame]:
        self._received_bytes += len(payload)
        if self._received_bytes > self._max_received_bytes:
            limit = f"{self._max_received_bytes} bytes for {self.manifest.wire_bytes} declared"
            return [self.fail(TooLargeError.code, f"more than {limit} arrived")]
        if not 0 <= index < len(self.manifest.chunks):
            return [self.fail(BadUpdateError.code, f"chunk {index} of {len(self.manifest.chunks)}")]
        if index not in self._present and (refusal := self._accept(index, payload)):
            return [refusal]
        return [Credit(self.id, self.manifest.chunks[index].wire_bytes, index)]

    def _accept(self, index: int, payload: memoryview) -> Frame | None:
        """Verify and keep a chunk, or say why not."""
        chunk = self.manifest.chunks[index]
        try:
            block = codec.decompress(chunk, payload)
        except BadUpdateError as error:
            if codec.chunk_hash(payload) == chunk.hash:  # what arrived is what was sent: another copy will not help
                return self.fail(error.code, f"chunk {index}: {error}")
            self._damaged[index] += 1
            if self._damaged[index] > MAX_RESENDS:
                return self.fail(error.code, f"chunk {index} arrived damaged {self._damaged[index]} times: {error}")
            return Resend(self.id, index, error.message)
        self.buffer.write(self._offsets[index], block)
        self._present.add(index)
        return None
