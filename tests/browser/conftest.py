"""A headless Chromium for the session; where there is none, its tests are skipped."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service as Driver

_QUIET = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1200,1000",
)  # fmt: skip


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    """One browser with a profile of its own."""
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("needs chromium and chromedriver (Debian: apt-get install chromium chromium-driver)")
    options = ChromeOptions()
    options.binary_location = browser
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in (*_QUIET, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    chrome = Chrome(options=options, service=Driver(executable_path=driver))
    yield chrome
    chrome.quit()


@pytest.fixture
def page(chromium: Chrome) -> Iterator[Chrome]:
    """A tab without a past: no token kept, nothing left in its log."""
    chromium.switch_to.new_window("tab")
    chromium.get_log("browser")  # type: ignore[no-untyped-call]
    yield chromium
    chromium.close()
    chromium.switch_to.window(chromium.window_handles[0])


@pytest.fixture
def stage_root(tmp_path: Path) -> Path:
    """Where updates are staged."""
    return tmp_path
