"""A headless Chromium for the tests, installed here if it is missing and may be; without one they are skipped."""

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from lab_server import serving

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
SETTINGS = {  # of JupyterLab's user: every cell is on the page, and nothing asks or fetches
    "notebook-extension/tracker": {"windowingMode": "none"},
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}
PATIENCE = 300  # seconds on a busy machine
BROWSERS = ["chromium", "chromium-browser", "google-chrome"]
FLAGS = ["--headless", "--no-sandbox", "--disable-background-networking", "--disable-dev-shm-usage", "--no-first-run",
         "--window-size=1280,900", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]  # fmt: skip


def programs() -> list[str]:
    """Return the paths of Chromium and of its driver, [] if either is missing."""
    found = [next(filter(None, map(shutil.which, names)), None) for names in (BROWSERS, ["chromedriver"])]
    return found if all(found) else []


def install() -> str:
    """Install both as Debian packages and return ""; or return why that cannot be."""
    if shutil.which("apt-get") is None or os.geteuid() != 0:
        return "Chromium and its driver are missing; they are installed only by root with apt-get"
    for command in (["update"], ["install", "-y", "--no-install-recommends", "chromium", "chromium-driver"]):
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        done = subprocess.run(
            ["apt-get", "-qq", *command], env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            return f"apt-get {' '.join(command)} failed: {done.stderr.strip().splitlines()[-1:]}"
    return "" if programs() else "Chromium was installed and is still not found"


@pytest.fixture(scope="session")
def chromium(tmp_path_factory) -> Iterator:
    """A selenium driver of a Chromium with a profile of its own; its console and its network are recorded."""
    webdriver = pytest.importorskip("selenium.webdriver")
    if not programs() and (reason := install()):
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


class Lab:
    """A notebook open in a real JupyterLab, in a real browser, with a real kernel."""

    def __init__(self, browser, told: dict, folder: Path, notebook: str, parameters: dict):
        self.browser, self.folder, self.name = browser, folder, f"{notebook}.ipynb"
        browser.set_script_timeout(PATIENCE)
        self.root, self.token = f"http://127.0.0.1:{told['port']}", told["token"]
        content = (NOTEBOOKS / self.name).read_text(encoding="utf-8")
        for name, value in parameters.items():
            content, number = re.subn(rf'"{name} = .*?  #', json.dumps(f"{name} = {value!r}  #")[:-1], content)
            assert number == 1, name
        (folder / self.name).write_text(content, encoding="utf-8")
        self.load()

    def load(self) -> None:
        """Open the page, or open it again, and wait for a kernel that does nothing."""
        self.browser.get(f"{self.root}/lab/tree/{self.name}?token={self.token}&reset")
        self.until(lambda: self.script("return !!window.jupyterapp && !!document.querySelector('.jp-Notebook')"))
        self.idle()

    def script(self, code: str, *values):
        return self.browser.execute_script(code, *values)

    def until(self, true: Callable, what: str = ""):
        """Wait until `true()` is, and return it."""
        from selenium.common.exceptions import WebDriverException

        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            try:
                if found := true():
                    return found
            except (WebDriverException, OSError):  # while the page is being built, or a kernel starts
                pass
            time.sleep(0.1)
        self.shoot("failed")
        raise AssertionError(f"waited {PATIENCE} s in vain: {what or true}\n{self.errors()}")

    def errors(self) -> str:
        """Return what cells said on stderr, and the console."""
        said = self.script("return [...document.querySelectorAll('[data-mime-type$=stderr]')].map((e) => e.innerText)")
        console = [entry["message"] for entry in self.browser.get_log("browser") if entry["level"] == "SEVERE"]
        return "\n".join([*said, *console[-5:]])[-4000:]

    def restart(self) -> None:
        """Restart the kernel, as a person does."""
        restart = "window.jupyterapp.commands.execute('notebook:restart-kernel')"
        self.script(f"window.restarted = false; setTimeout(() => {restart}.then(() => {{ window.restarted = true }}))")
        self.click(".jp-Dialog .jp-mod-accept")
        self.until(lambda: self.script("return window.restarted"), "a kernel that is restarted")
        self.idle()

    def idle(self) -> None:
        """Wait until the page says that the kernel does nothing."""
        said = "return [...document.querySelectorAll('.jp-StatusBar-TextItem')].map((e) => e.innerText).join()"
        self.until(lambda: "| Idle" in self.script(said), "an idle kernel")

    def run(self, until: str) -> None:
        """Run all cells to the end, and wait for an element of the selector `until`."""
        run = "window.jupyterapp.commands.execute('notebook:run-all-cells')"
        self.script(f"window.ended = false; setTimeout(() => {run}.then(() => {{ window.ended = true }}))")
        self.until(lambda: self.script("return window.ended"), "every cell to end")
        self.until(lambda: self.find(until), until)

    def find(self, selector: str) -> list:
        return [e for e in self.browser.find_elements("css selector", selector) if e.is_displayed()]

    def click(self, selector: str) -> None:
        """Click the one element of that selector."""
        [element] = self.until(lambda: self.find(selector), selector)
        self.script("arguments[0].scrollIntoView({block: 'center'})", element)
        element.click()

    def text(self, selector: str) -> str:
        [element] = self.until(lambda: self.find(selector), selector)
        return element.text

    def shoot(self, name: str) -> None:
        """Keep a picture of the window, in PTGLAB_SCREENSHOTS if that is set."""
        self.browser.save_screenshot(str(Path(os.environ.get("PTGLAB_SCREENSHOTS", self.folder)) / f"{name}.png"))


@pytest.fixture
def lab(chromium, tmp_path_factory) -> Iterator[Callable[..., Lab]]:
    """Return a function that opens one of our notebooks in a JupyterLab of its own."""
    folder, settings = tmp_path_factory.mktemp("lab"), tmp_path_factory.mktemp("settings")
    for name, values in SETTINGS.items():
        path = settings / "CONFIG_DIR" / "lab" / "user-settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(values))
    with serving(folder, settings, "--LabApp.expose_app_in_browser=True", app="jupyterlab") as told:
        yield lambda notebook, **parameters: Lab(chromium, told, folder, notebook, parameters)
        chromium.get("about:blank")
