"""Every request of the benchmark's list of bad ones is refused with the status it should be, and changes nothing."""

import time
from pathlib import Path

import pytest
from benchmarks.bad_requests import BadRequest, bad_requests
from tests.helpers.rig import running

pytestmark = pytest.mark.anyio
SLOWEST_S = 10.0


async def test_bad_requests_are_named_and_change_nothing(tmp_path: Path) -> None:
    async with running(tmp_path, max_body_mib=64) as rig:
        before, sample = await rig.weights(), await rig.sample()
        wrong: list[str] = []
        for request in bad_requests():
            start = time.monotonic()
            reply = await rig.http.request(
                request.method, request.path, content=request.body, headers={"content-type": request.content_type}
            )
            wrong += complaints(request, reply.status_code, reply.content, time.monotonic() - start)
        assert wrong == []
        assert (await rig.weights(), await rig.sample()) == (before, sample)
        assert (rig.parts.gate.active_requests, rig.parts.gate.active_sequences) == (0, 0)


def complaints(request: BadRequest, status: int, body: bytes, seconds: float) -> list[str]:
    """What is wrong with a refusal."""
    found = [] if status in request.statuses else [f"{request.name}: {status} {body[:200]!r}"]
    if b"Traceback" in body or b'File "' in body or len(body) > 20_000:
        found.append(f"{request.name}: says too much: {body[:500]!r}")
    return [*found, *([f"{request.name}: took {seconds:.1f} s"] if seconds > SLOWEST_S else [])]
