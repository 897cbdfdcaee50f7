"""A client of a rollout service, written from docs/wire.md alone: it shares no code with FlashRL.

Knows what the document says; where that is not enough, the document is wrong.
"""

import json
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any

import msgpack
import numpy as np
import xxhash
import zmq
import zstandard
from numpy.typing import NDArray

U64 = np.uint64
PATTERN = {"int8": np.uint8, "fp8": np.uint8, "bf16": np.uint16, "fp32": np.uint32}
STORED = {"int8_rows": "int8", "fp8_rows": "fp8", "bf16": "bf16"}
BLOCK_BYTES = 1000
TIMEOUT_MS = 20_000

Bits = NDArray[Any]
State = dict[str, Bits]
"""Part name -> the elements' bit patterns, flat."""


@dataclass(frozen=True)
class Part:
    """An array as it is stored."""

    name: str
    dtype: str
    shape: tuple[int, ...]


def parts_of(layout: list[dict[str, Any]]) -> list[Part]:
    """`GET /weights/layout` -> parts in name order."""
    parts = []
    for tensor in layout:
        shape, dtype = tuple(tensor["shape"]), STORED[tensor["storage"]]
        parts.append(Part(tensor["name"], dtype, shape))
        if dtype != "bf16":
            parts.append(Part(tensor["name"] + "_scale", "fp32", (shape[0], 1)))
    return sorted(parts, key=lambda part: part.name)


def layout_hash(layout: list[dict[str, Any]]) -> str:
    """Of the canonical JSON."""
    rows = sorted([tensor["name"], tensor["shape"], tensor["storage"]] for tensor in layout)
    return xxhash.xxh3_128_hexdigest(json.dumps(rows, separators=(",", ":")).encode())


def part_digest(patterns: Bits) -> str:
    """The two sums over all elements."""
    with np.errstate(over="ignore"):
        index = np.arange(patterns.size, dtype=U64)
        z = index * U64(0x9E3779B97F4A7C15) + patterns.astype(U64) * U64(0x165667B19E3779F9)
        z = (z ^ (z >> U64(30))) * U64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> U64(27))) * U64(0x94D049BB133111EB)
        z = z ^ (z >> U64(31))
        low = z.sum(dtype=U64)
        high = ((z ^ (z >> U64(29))) * U64(0x9FB21C651E98DF25)).sum(dtype=U64)
    return f"{int(high):016x}{int(low):016x}"


def digest(parts: list[Part], state: State) -> str:
    """Of everything."""
    whole = xxhash.xxh3_128()
    for part in parts:
        shape = "x".join(map(str, part.shape))
        whole.update(f"{part.name}\0{part.dtype}\0{shape}\0{part_digest(state[part.name])}\n".encode())
    return whole.hexdigest()


def planes(values: Bits) -> bytes:
    """All first bytes, then all second bytes, ..."""
    little = np.ascontiguousarray(values).astype(values.dtype.newbyteorder("<"))
    return little.view(np.uint8).reshape(values.size, -1).T.tobytes()


def sparse(part: Part, old: Bits, new: Bits) -> tuple[dict[str, Any], bytes]:
    """A segment and its bytes."""
    where = np.flatnonzero(old != new)
    gaps = np.diff(where, prepend=-1) - 1
    wide = gaps[gaps >= 65535]
    narrow = np.where(gaps >= 65535, 65535, gaps).astype(np.uint16)
    segment = {"part": part.name, "dtype": part.dtype, "encoding": "sparse", "count": where.size, "wide": wide.size}
    return segment, planes(narrow) + wide.astype("<i8").tobytes() + planes(new[where])


def delta(parts: list[Part], old: State, new: State) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[bytes]]:
    """Segments, chunks and the chunks' bytes."""
    found = [sparse(p, old[p.name], new[p.name]) for p in parts if not np.array_equal(old[p.name], new[p.name])]
    raw = b"".join(content for _, content in found)
    payloads, chunks = [], []
    for start in range(0, len(raw), BLOCK_BYTES):
        block = raw[start : start + BLOCK_BYTES]
        payload = zstandard.compress(block)
        payloads.append(payload)
        hashed = xxhash.xxh3_64_hexdigest(payload)
        chunks.append({"raw_bytes": len(block), "wire_bytes": len(payload), "hash": hashed})
    return [segment for segment, _ in found], chunks, payloads


class Client:
    """One service."""

    def __init__(self, url: str) -> None:
        self._url = url

    def ask(self, method: str, path: str, body: object = None) -> tuple[int, Any]:
        """Status and JSON."""
        content = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self._url + path, content, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_MS / 1000) as reply:
                return reply.status, json.load(reply)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def publish(self, parts: list[Part], old: State, new: State, run_id: str) -> dict[str, Any]:
        """The reply to the commit of a delta."""
        _, weights = self.ask("GET", "/weights")
        _, layout = self.ask("GET", "/weights/layout")
        segments, chunks, payloads = delta(parts, old, new)
        manifest = {
            "kind": "delta",
            "protocol": 1,
            "codec": 1,
            "run_id": run_id,
            "base_version": weights["version"],
            "base_digest": weights["digest"],
            "version": weights["version"] + 1,
            "digest": digest(parts, new),
            "layout_hash": layout_hash(layout),
            "changed_elements": sum(segment["count"] for segment in segments),
            "segments": segments,
            "chunks": chunks,
        }
        status, accepted = self.ask("POST", "/load_weights", manifest)
        assert status == 202, accepted
        self._send(accepted["weights_port"], accepted["transfer_id"], payloads)
        status, committed = self.ask("POST", f"/load_weights/{accepted['transfer_id']}/commit")
        assert status == 200, committed
        return dict(committed)

    def _send(self, port: int, transfer_id: str, payloads: list[bytes]) -> None:
        """Return once it is staged."""
        with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
            dealer.linger = 0
            dealer.connect(f"tcp://127.0.0.1:{port}")
            dealer.send(msgpack.packb({"type": "hello", "transfer_id": transfer_id}))
            waiting, credit = list(range(len(payloads))), 0
            while True:
                assert dealer.poll(TIMEOUT_MS), "silence"
                said = msgpack.unpackb(dealer.recv())
                if said["type"] == "staged":
                    return
                assert said["type"] in ("credit", "resend"), said
                if said["type"] == "resend":
                    waiting.insert(0, said["index"])
                credit += said["num_bytes"] if said["type"] == "credit" else len(payloads[said["index"]])
                while waiting and len(payloads[waiting[0]]) <= credit:
                    index = waiting.pop(0)
                    credit -= len(payloads[index])
                    header = {"type": "chunk", "transfer_id": transfer_id, "index": index}
                    dealer.send_multipart([msgpack.packb(header), payloads[index]])
