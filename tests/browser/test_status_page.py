"""The status page as a person has it before them: it follows the service by itself and gives nothing away."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait
from tests.helpers.live_service import LiveService, live
from tests.helpers.wire_trainer import Update, Wire, WireTrainer, delta_update

from flashrl_rollout import stored_state
from flashrl_rollout.engine import EngineInfo
from flashrl_rollout.scripted_engine import ScriptedEngine
from flashrl_rollout.scripted_service import scripted_layout

pytestmark = pytest.mark.browser

LIMIT_S = 20.0
LAYOUT = scripted_layout()
HOSTILE = '<img src="x" onerror="document.title = 1">'


@contextmanager
def serving(stage_root: Path, model: str = "org/model-0.5B", token: str | None = None) -> Iterator[LiveService]:
    """A service with a scripted engine that takes two milliseconds a token."""

    def engine() -> ScriptedEngine:
        info = EngineInfo(model, "int8", 512, 4096, "0" * 32)
        return ScriptedEngine(LAYOUT, stored_state.random_parts(LAYOUT, 0), info, end_token=None, token_s=0.002)

    with live(engine, stage_root, token=token) as service:
        yield service


def update(service: LiveService) -> int:
    """Send a delta to random weights, as a trainer would; the status of its commit."""
    base = service.service.weights_info().version
    old, new = (stored_state.random_parts(LAYOUT, seed) for seed in (base, base + 1))
    return asyncio.run(_publish(service, delta_update(LAYOUT, old, new, base=base)))


async def _publish(service: LiveService, found: Update) -> int:
    wire = Wire(service.ports[1])
    async with httpx.AsyncClient(base_url=service.url, timeout=LIMIT_S) as http:
        try:
            return (await WireTrainer(http, wire).publish(found)).status_code
        finally:
            wire.close()


def texts(page: Chrome, selector: str) -> list[str]:
    """What a person reads in the elements that are shown, in one look: the page may replace them at any time."""
    look = "[...document.querySelectorAll(arguments[0])].filter(e => e.checkVisibility()).map(e => e.innerText.trim())"
    return list(page.execute_script(f"return {look}", selector))


def text(page: Chrome, selector: str) -> str:
    """The same of the first one; empty where there is none."""
    return "".join(texts(page, selector)[:1])


def shows(page: Chrome, selector: str, wanted: str) -> None:
    """Wait until an element reads so."""
    WebDriverWait(page, LIMIT_S, 0.05).until(lambda _: text(page, selector) == wanted, f"{selector} is not {wanted}")


def complaints(page: Chrome) -> list[str]:
    """What the browser found fault with, except for an answer of 401."""
    log: list[dict[str, str]] = page.get_log("browser")  # type: ignore[no-untyped-call]
    return [entry["message"] for entry in log if "status of 401" not in entry["message"]]


def test_page_follows_updates_without_being_loaded_again(page: Chrome, stage_root: Path) -> None:
    with serving(stage_root) as service:
        page.get(service.url)
        shows(page, "#phase", "ready")
        assert (text(page, "#model"), text(page, "#version"), text(page, "#run")) == ("org/model-0.5B", "0", "none")
        assert text(page, "#no-updates").startswith("None yet")
        page.execute_script("window.same = true")
        update(service)
        shows(page, "#updates tr:first-child td:nth-child(3)", "1")
        shows(page, "#phase", "ready")
        assert page.title == "v1 · ready · FlashRL rollout"
        cells = texts(page, "#updates tr:first-child td")
        assert (cells[1:3], cells[7:]) == (["delta", "1"], ["run-a", "committed"])
        assert text(page, "#digest") == service.service.weights_info().digest[:12]
        update(service)
        shows(page, "#updates tr:first-child td:nth-child(3)", "2")
        assert len(page.find_elements(By.CSS_SELECTOR, "#updates tr")) == 2
        assert page.execute_script("return window.same")
        assert complaints(page) == []


def test_throughput_moves_while_somebody_samples(page: Chrome, stage_root: Path) -> None:
    with serving(stage_root) as service:
        page.get(service.url)
        shows(page, "#rate", "0")
        body = {"prompts": ["hi"], "n": 1, "sampling": {"max_tokens": 1500}}
        sampler = threading.Thread(target=lambda: httpx.post(f"{service.url}/generate", json=body, timeout=LIMIT_S))
        sampler.start()
        shows(page, "#running", "1")
        rate = WebDriverWait(page, LIMIT_S, 0.05).until(lambda _: int(text(page, "#rate").replace(",", "")))
        assert 0 < rate <= 500
        WebDriverWait(page, LIMIT_S, 0.05).until(lambda _: page.find_elements(By.CSS_SELECTOR, "#spark polyline"))
        sampler.join(LIMIT_S)
        shows(page, "#rate", "0")


def test_token_is_asked_for_and_kept_in_the_tab(page: Chrome, stage_root: Path) -> None:
    with serving(stage_root, token="s3cret") as service:
        page.get(service.url)
        shows(page, "#phase", "locked")
        field = page.find_element(By.ID, "token")
        assert (field.is_displayed(), text(page, "#state"), text(page, "#notice")) == (True, "", "")
        field.send_keys("wrong\n")
        shows(page, "#notice", "This is not the token of this service.")
        field.send_keys("s3cret\n")
        shows(page, "#version", "0")
        assert not field.is_displayed()
        assert page.current_url == f"{service.url}/"
        assert "s3cret" not in page.page_source
        assert page.execute_script("return [localStorage.length, document.cookie]") == [0, ""]
        page.refresh()
        shows(page, "#phase", "ready")
        page.find_element(By.ID, "forget").click()
        shows(page, "#phase", "locked")
        assert page.execute_script("return sessionStorage.length") == 0
        assert complaints(page) == []


def test_names_are_text_and_never_markup(page: Chrome, stage_root: Path) -> None:
    with serving(stage_root, model=HOSTILE) as service:
        page.get(service.url)
        shows(page, "#model", HOSTILE)
        assert page.find_elements(By.TAG_NAME, "img") == []
        assert complaints(page) == []


def test_poisoned_weights_and_a_service_that_has_gone_are_told(page: Chrome, stage_root: Path) -> None:
    with serving(stage_root) as service:
        page.get(service.url)
        shows(page, "#phase", "ready")
        service.engine.faults.corrupt_write = service.engine.faults.fail_revert = True
        assert update(service) == 503
        shows(page, "#phase", "poisoned")
        assert "only a snapshot helps" in text(page, "#notice")
        assert text(page, "#updates tr:first-child td:last-child").startswith("not_ready: poisoned")
    shows(page, "#phase", "unreachable")
    assert text(page, "#version") == "0"


def test_page_fits_a_phone(page: Chrome, stage_root: Path) -> None:
    with serving(stage_root) as service:
        page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
            "width": 360, "height": 800, "deviceScaleFactor": 1, "mobile": True,
        })  # fmt: skip
        page.get(service.url)
        shows(page, "#phase", "ready")
        update(service)
        shows(page, "#version", "1")
        assert page.execute_script("return document.documentElement.scrollWidth") == 360
