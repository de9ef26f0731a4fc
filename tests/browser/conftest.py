"""A headless Chromium for the tests, installed here if it is missing and may be; without one they are skipped."""

import os
import shutil
import subprocess
from collections.abc import Iterator

import pytest

FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-dev-shm-usage",
         "--no-first-run", "--window-size=1280,900"]  # fmt: skip


def programs() -> tuple[str, str] | None:
    """Return the paths of Chromium and of its driver, if both are there."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    return (browser, driver) if browser and driver else None


def install() -> str:
    """Install both as Debian packages and return ""; or return why that cannot be."""
    if shutil.which("apt-get") is None or os.geteuid() != 0:
        return "Chromium and its driver are missing; they are installed only by root with apt-get"
    for command in (["update"], ["install", "-y", "--no-install-recommends", "chromium", "chromium-driver"]):
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        try:
            done = subprocess.run(
                ["apt-get", "-qq", *command], env=environment, capture_output=True, text=True, timeout=600, check=False
            )
        except subprocess.TimeoutExpired:
            return f"apt-get {command[0]} took longer than ten minutes"
        if done.returncode:
            return f"apt-get {' '.join(command)} failed: {done.stderr.strip().splitlines()[-1:]}"
    return "" if programs() else "Chromium was installed and is still not found"


@pytest.fixture(scope="session")
def chromium(tmp_path_factory) -> Iterator:
    """A selenium driver of a Chromium with a profile of its own; its console and its network are recorded."""
    webdriver = pytest.importorskip("selenium.webdriver")
    if programs() is None and (reason := install()):
        pytest.skip(reason)
    browser, driver = programs()
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    started = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield started
    started.quit()
