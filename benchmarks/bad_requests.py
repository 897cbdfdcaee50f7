"""Requests that a service has to refuse, each with the statuses that are an answer to it.

Knows bodies and paths; knows nothing of how they are sent. They fit any model up to the tiny one.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

INT64 = 1 << 63
JSON = "application/json"


@dataclass(frozen=True)
class BadRequest:
    """`statuses` are the ones that name the mistake; `body` is what goes over the wire."""

    name: str
    method: str
    path: str
    body: bytes
    statuses: tuple[int, ...]
    content_type: str = JSON


def bad_requests() -> Iterator[BadRequest]:
    """All of them."""
    yield from _malformed()
    yield from _generate()
    yield from _loads()
    yield from _paths()


def _post(name: str, path: str, body: bytes, *statuses: int, content_type: str = JSON) -> BadRequest:
    return BadRequest(name, "POST", path, body, statuses, content_type)


def _malformed() -> Iterator[BadRequest]:
    good = b'{"prompts": ["hi"], "sampling": {"max_tokens": 1}}'
    bodies = {
        "truncated": good[:-1],
        "trailing": good + b"}",
        "two values": good + good,
        "deep arrays": b"[" * 200_000,
        "deep objects": b'{"a":' * 100_000,
        "deep prompt": b'{"prompts": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
        "no utf-8": b'{"prompts": ["\xff\xfe\x80"]}',
        "half a character": b'{"prompts": ["\xf0\x9f\x98"]}',
        "control characters": b'{"prompts": ["a\x00b\x01"]}',
        "a number of 5000 digits": b'{"prompts": ["hi"], "n": ' + b"9" * 5000 + b"}",
        "python": b"{'prompts': ['hi']}",
        "comment": b'{"prompts": ["hi"] /* one */}',
    }
    for name, body in bodies.items():
        for path in ("/generate", "/load_weights"):
            yield _post(name, path, body, 400)
    for kind in (
        "text/plain",
        "multipart/form-data",
        "application/x-www-form-urlencoded",
        "application/xml",
        "no type",
    ):
        yield _post(f"type {kind!r}", "/generate", good, 400, content_type=kind)
    for text in (b"[]", b'"hi"', b"7", b"null", b"true", b"{}", b""):
        yield _post(f"no object {text!r}", "/generate", text, 422)
        yield _post(f"no object {text!r}", "/load_weights", text, 422)


def _generate() -> Iterator[BadRequest]:
    for name, field, values in (
        ("n", "n", [0, -1, 1025, 1 << 31, INT64, 10**30, 1.5, "many", None, [1]]),
        ("top_logprobs", "top_logprobs", [-1, 21, INT64, "x", None]),
        ("min_weight_version", "min_weight_version", [-1, INT64, 10**30, "v1", 0.5]),
        ("extra", "request_id", ["twice"]),
        ("prompts", "prompts", _bad_prompts()),
    ):
        for value in values:
            yield _case(name, **{field: value})
    for field, values in _SAMPLING.items():
        for value in values:
            yield _case(f"sampling.{field}", sampling={"max_tokens": 4, field: value})
    yield _case("a greedy group", n=2, sampling={"temperature": 0, "max_tokens": 4})
    yield _case("max_tokens beyond the context", sampling={"max_tokens": 100_000})
    yield BadRequest("a version to come", "POST", "/generate", _body(min_weight_version=INT64 - 1), (409,))
    yield BadRequest("more than the queue holds", "POST", "/generate", _body(prompts=["hi"] * 4096, n=1024), (413,))
    for text in ("NaN", "Infinity", "-Infinity", "1e999"):
        for field in ("temperature", "top_p", "max_tokens", "seed", "top_k"):
            body = f'{{"prompts": ["hi"], "sampling": {{"{field}": {text}}}}}'
            yield _post(f"{field} {text}", "/generate", body.encode(), 422)


_SAMPLING: dict[str, list[Any]] = {
    "temperature": [-1, -1e-9, 1e-9, 1e-300, 0.009, 2.5, 1e308, "hot", None, []],
    "top_p": [0, -0.1, 1.1, 1e308, "x", None],
    "top_k": [-2, 1 << 31, INT64, 10**30, 0.5, "x"],
    "max_tokens": [0, -1, 1 << 31, INT64, 10**30, 0.5, "x", None],
    "seed": [-1, INT64, 10**30, 0.5, "x"],
    "stop": [[""], ["x" * 257], ["a"] * 17, ["a"] * 5000, "a", [1], [None], [["a"]], {"a": "b"}, None, ["\ud800"]],
    "min_p": [0.1],
    "logit_bias": [{"1": 100}],
}


def _bad_prompts() -> list[Any]:
    long_list: list[Any] = [1] * 400_000
    return [
        [], "hi", {"a": "b"}, 7, None, [None], [7], [True], [[]], [[[1]]], [[-1]], [[1 << 31]], [[INT64]], [[10**30]],
        [[1, "a"]], [[1, None]], [[1.5]], [""], ["ok", ""], [{}], [[{}]], [[{"role": "user"}]], [[{"role": 1}]],
        [[{"role": "user", "content": None}]], [[{"role": "user", "content": [{"type": "text", "text": "x"}]}]],
        ["\ud800"], ["a\udfffb"], [[{"role": "\ud800", "content": "x"}]], ["hi"] * 4097, ["x" * 3_000_000],
        [[1] * 300_000], [[*long_list, -1]], [["a", *long_list]], [long_list[:1]] * 4097, [[{"a": "b"}] * 20_000 + [1]],
    ]  # fmt: skip


def _case(name: str, **changes: Any) -> BadRequest:
    return _post(f"{name} {str(changes)[:60]}", "/generate", _body(**changes), 422)


def _body(**changes: Any) -> bytes:
    return json.dumps({"prompts": ["hi"], "sampling": {"max_tokens": 4}} | changes).encode()


def _loads() -> Iterator[BadRequest]:
    def load(name: str, *statuses: int, **body: Any) -> BadRequest:
        return _post(f"load {name}", "/load_weights", json.dumps(body).encode(), *statuses)

    checkpoint: dict[str, Any] = {"kind": "checkpoint", "path": "/nowhere", "version": 7}
    yield load("of no kind", 422, kind="tarball")
    yield load("outside of the roots", 403, **checkpoint)
    for path in ("/", "..", "/etc", "/proc/self/environ", "~", "a" * 4096):
        yield load(f"path {path[:20]}", 403, 422, **checkpoint | {"path": path})
    for value in ("", "a" * 4097, "a\0b", "\ud800", None, 7, ["x"]):
        yield load(f"path {str(value)[:20]!r}", 422, **checkpoint | {"path": value})
    for version in (-1, INT64, 10**30, "x", None, 0.5):
        yield load(f"version {version}", 422, **checkpoint | {"version": version})
    manifest = _manifest()
    yield load("stale", 409, 422, **manifest)
    for field, values in _MANIFEST.items():
        for value in values:
            yield load(f"{field} {str(value)[:40]}", 422, **manifest | {field: value})
    for segment in _SEGMENTS:
        yield load(f"segment {segment}", 422, **manifest | {"segments": [manifest["segments"][0] | segment]})
    yield load("segments that are none", 422, **manifest | {"segments": [{}] * 1_000_000})
    yield load("chunks that are none", 422, **manifest | {"chunks": [{"hash": 1}] * 1_000_000})


def _manifest() -> dict[str, Any]:
    return {
        "kind": "delta", "run_id": "fuzz", "base_version": 1 << 40, "base_digest": "0" * 32, "version": (1 << 40) + 1,
        "digest": "1" * 32, "layout_hash": "2" * 32, "changed_elements": 1,
        "segments": [{"part": "norm.weight", "dtype": "bf16", "encoding": "sparse", "count": 1}],
        "chunks": [{"raw_bytes": 4, "wire_bytes": 9, "hash": "0" * 16}],
    }  # fmt: skip


_MANIFEST: dict[str, list[Any]] = {
    "kind": ["snap", None, 1],
    "run_id": ["", "a/b", "x" * 65, "\n", None, 1],
    "base_version": [-1, INT64, 10**30, "x"],
    "version": [0, -1, INT64, 10**30, 1.5],
    "base_digest": ["", "0" * 31, "g" * 32, None],
    "digest": ["0" * 33, "A" * 32, 7],
    "layout_hash": ["", None],
    "changed_elements": [-1, INT64, 10**30],
    "segments": [None, {}, [1], [None], [[]]],
    "chunks": [None, 7, [{}], [{"raw_bytes": 0, "wire_bytes": 1, "hash": "0" * 16}]],
    "protocol": ["x", 10**30, 2, -1],
    "codec": [None, 0],
    "more": [1],
}
_SEGMENTS: list[dict[str, Any]] = [
    {"part": "x" * 513}, {"part": None}, {"dtype": "fp64"}, {"encoding": "zip"}, {"count": 0}, {"count": -1},
    {"count": INT64}, {"start": -1}, {"start": 10**30}, {"wide": -1}, {"wide": INT64}, {"more": 1},
]  # fmt: skip


def _paths() -> Iterator[BadRequest]:
    def none(method: str, path: str, *statuses: int) -> BadRequest:
        return BadRequest(f"{method} {path[:40]}", method, path, b"", statuses)

    for name in ("none", "%00", "%0a%0d", "%ff%fe", "..%2f..", "x" * 8000, "%F0%9F%98%80", "'\"<script>"):
        yield none("POST", f"/load_weights/{name}/commit", 404)
        yield none("DELETE", f"/load_weights/{name}", 404)
    for path in ("/nowhere", "/generate/", "/../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/weights/layout/x"):
        yield none("GET", path, 404)
    for method, path in (("GET", "/generate"), ("PUT", "/weights"), ("POST", "/ready"), ("PATCH", "/pause")):
        yield none(method, path, 405)
    for mode in ("abort", "", "KEEP", "wait", "keep%00", "1", "keep&mode=x"):
        yield none("POST", f"/pause?mode={mode}", 422)
