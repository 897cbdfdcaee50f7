"""What the service tells of itself: numbers, phases, the latest updates, and the page that shows them."""

import base64
import hashlib
import logging
import re
from pathlib import Path

import httpx
import pytest
from tests.helpers.rig import LAYOUT, Rig, running

from flashrl_rollout.app import create_app
from flashrl_rollout.meter import Meter
from flashrl_rollout.process_memory import process_memory
from flashrl_rollout.service import Service
from flashrl_rollout.update_log import UpdateLog

pytestmark = pytest.mark.anyio


def test_rate_is_the_mean_of_the_last_three_seconds() -> None:
    meter = Meter()
    assert (meter.tokens_per_s, meter.history()) == (0.0, [])
    for second, tokens in enumerate([0, 0, 100, 300, 360]):
        meter.sample(second, tokens)
    assert meter.history() == [0, 100, 200, 60]
    assert meter.tokens_per_s == 120.0


def test_rate_minds_that_readings_come_late() -> None:
    meter = Meter()
    meter.sample(10.0, 50)
    meter.sample(12.5, 100)
    assert meter.tokens_per_s == 20.0


def test_meter_forgets_what_is_old_and_what_another_engine_did() -> None:
    meter = Meter()
    for second in range(400):
        meter.sample(second, 7 * second)
    assert meter.history() == [7.0] * 300
    meter.sample(400, 5)
    assert meter.history() == []


def test_memory_counts_this_process_and_those_it_started() -> None:
    before = process_memory()
    block = bytearray(b"x") * (64 << 20)
    assert process_memory().service_bytes - before.service_bytes > 50 << 20
    del block


async def status(rig: Rig) -> dict[str, object]:
    """GET /status."""
    return dict((await rig.http.get("/status")).raise_for_status().json())


async def test_status_describes_the_service(rig: Rig) -> None:
    found = await status(rig)
    weights, load = found["weights"], found["load"]
    assert (found["phase"], found["reason"], found["model"], found["quantization"]) == (
        "ready",
        None,
        "scripted",
        "int8",
    )
    elements = 64 * 32 + 16 * 8 + 100
    assert weights == {
        "version": 0,
        "digest": rig.parts.weights.digest,
        "poisoned": False,
        "run_id": None,
        "parameters": elements,
        "quantized_share": (elements - 100) / elements,
        "storage_bytes": {"int8_rows": 64 * 32 + 64 * 4, "fp8_rows": 16 * 8 + 16 * 4, "bf16": 200},
        "bf16_bytes": 2 * elements,
    }
    assert (load["running_sequences"], load["max_sequences"]) == (0, 256 + 16384)  # type: ignore[index]
    assert found["updates"] == []


async def test_updates_are_told_newest_first(rig: Rig) -> None:
    update = rig.delta()
    await rig.trainer.publish(update)
    stale = rig.delta().declaring(base_version=0)
    assert (await rig.trainer.begin(stale)).status_code == 409
    transfer_id = await rig.trainer.accepted(rig.delta())
    await rig.http.delete(f"/load_weights/{transfer_id}")
    await rig.http.post("/load_weights", json={"kind": "checkpoint", "path": "/etc", "version": 5})
    found = await status(rig)
    rows = [(row["kind"], row["version"], row["result"], row["run_id"]) for row in found["updates"]]  # type: ignore[attr-defined]
    assert rows == [
        ("checkpoint", 5, "path_not_allowed", None),
        ("delta", 2, "aborted", "run-a"),
        ("delta", 2, "stale_base", "run-a"),
        ("delta", 1, "committed", "run-a"),
    ]
    committed = found["updates"][3]  # type: ignore[index]
    assert (committed["changed_elements"], committed["wire_bytes"]) == (5, update.manifest.wire_bytes)
    assert committed["pause_ms"] > 0


async def test_every_end_of_an_update_is_one_line(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "flashrl_rollout")
    await rig.trainer.publish(rig.delta())
    transfer_id = await rig.trainer.accepted(rig.delta())
    await rig.http.delete(f"/load_weights/{transfer_id}")
    committed, aborted = caplog.records
    fields = committed.__dict__["fields"]
    assert (committed.levelname, committed.getMessage()) == ("INFO", "committed")
    assert fields["digest"] == rig.parts.weights.digest[:8]
    assert list(fields) == [
        "kind", "version", "digest", "run_id", "changed_elements", "wire_bytes", "pause_ms", "seconds",
    ]  # fmt: skip
    assert (aborted.levelname, aborted.getMessage()) == ("WARNING", "update aborted")
    assert aborted.__dict__["fields"] == {"kind": "delta", "version": 2, "run_id": "run-a", "error": "aborted"}


def test_no_more_than_the_latest_are_kept() -> None:
    log = UpdateLog()
    for version in range(30):
        log.audited(version, passed=version % 2 == 0)
    rows = log.rows()
    assert (len(rows), rows[0].version, rows[0].result, rows[-1].version) == (20, 29, "failed", 10)


async def test_audits_are_told(tmp_path: Path) -> None:
    async with running(tmp_path, audit_every=1) as rig:
        await rig.trainer.publish(rig.delta())
        await rig.until(lambda: len(rig.parts.history.log.rows()) == 2)
        audit = rig.parts.history.log.rows()[0]
        assert (audit.kind, audit.version, audit.result) == ("audit", 1, "passed")
        assert 'flashrl_updates_total{result="audit_passed"} 1.0' in (await rig.http.get("/metrics")).text


async def test_phases(rig: Rig) -> None:
    assert rig.service.phase == "ready"
    await rig.http.post("/pause")
    found = await status(rig)
    assert (found["phase"], found["reason"]) == ("paused", "paused: sampling stands still until POST /resume")
    await rig.http.post("/resume")
    rig.engine.faults.corrupt_write = rig.engine.faults.fail_revert = True
    assert (await rig.trainer.publish(rig.delta())).status_code == 503
    found = await status(rig)
    assert (found["phase"], str(found["reason"])[:9]) == ("poisoned", "poisoned:")
    assert "flashrl_ready 0.0" in (await rig.http.get("/metrics")).text
    rig.service.stop("the service is stopping")
    assert (await status(rig))["reason"] == "the service is stopping"
    assert rig.service.phase == "stopping"
    await rig.engine.close()
    assert rig.service.phase == "dead"


async def test_service_that_loads_its_model_has_a_status() -> None:
    app = create_app(Service("org/<model>", "fp8"), token=None, max_body_bytes=1000)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service") as http:
        reply = await http.get("/status")
        found = reply.json()
        assert reply.headers["content-type"] == "application/json"
        assert (found["phase"], found["model"], found["quantization"]) == ("starting", "org/<model>", "fp8")
        assert (found["weights"], found["load"], found["updates"]) == (None, None, [])
        assert "loading the model" in found["reason"]
        text = (await http.get("/metrics")).text
    assert 'flashrl_info{model="org/<model>",quantization="fp8"} 1.0' in text


async def test_gauges_are_those_of_the_status(tmp_path: Path) -> None:
    async with running(tmp_path, max_num_seqs=2, max_waiting=3) as rig:
        rig.service.meter.sample(0, 0)
        rig.service.meter.sample(1, 40)
        text = (await rig.http.get("/metrics")).text
    for line in (
        "flashrl_ready 1.0",
        "flashrl_paused 0.0",
        "flashrl_tokens_per_second 40.0",
        "flashrl_max_sequences 5.0",
        "flashrl_waiting_sequences 0.0",
        f'flashrl_storage_bytes{{storage="int8_rows"}} {64 * 32 + 64 * 4}.0',
        f"flashrl_quantized_share {LAYOUT.quantized_fraction}",
        'flashrl_info{model="scripted",quantization="int8"} 1.0',
    ):
        assert line in text.splitlines()
    assert re.search(r'^flashrl_resident_memory_bytes\{process="service"\} [\d.e+]+$', text, re.MULTILINE)


async def test_page_may_run_its_own_script_only(rig: Rig) -> None:
    reply = await rig.http.get("/")
    policy = reply.headers["content-security-policy"]
    assert reply.headers["content-type"] == "text/html; charset=utf-8"
    for tag in ("script", "style"):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", reply.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    assert not re.search(r"""(src|href)=["']?(https?:)?//|innerHTML|insertAdjacent|document\.write""", reply.text)


async def test_stranger_gets_the_form_and_no_numbers(tmp_path: Path) -> None:
    async with running(tmp_path, token="s3cret") as rig:
        opened = await rig.http.get("/")
        rig.http.headers.pop("Authorization")
        reply = await rig.http.get("/")
        assert (reply.status_code, reply.headers["www-authenticate"]) == (401, "Bearer")
        assert reply.headers["content-security-policy"] == opened.headers["content-security-policy"]
        assert (opened.status_code, reply.text) == (200, opened.text)  # the same page: what it shows is fetched
        for path in ("/status", "//", "/?token=s3cret", "/status?token=s3cret"):
            refused = await rig.http.get(path)
            assert refused.status_code == 401
            assert "scripted" not in refused.text
