"""A headless Chromium for the tests, installed here if it is missing and may be; without one they are skipped."""

import json
import os
import re
import shutil
import subprocess
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
FLAGS = ["--headless", "--no-sandbox", "--disable-background-networking", "--disable-dev-shm-usage", "--no-first-run",
         "--window-size=1280,900", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]  # fmt: skip


def programs() -> list[str]:
    """Return the paths of Chromium and of its driver, [] if either is missing."""
    names = [["chromium", "chromium-browser", "google-chrome"], ["chromedriver"]]
    found = [next(filter(None, map(shutil.which, each)), None) for each in names]
    return found if all(found) else []


@pytest.fixture(scope="session")
def chromium(tmp_path_factory) -> Iterator:
    """A selenium driver of a Chromium with a profile of its own; its console and its network are recorded."""
    webdriver = pytest.importorskip("selenium.webdriver")
    if not programs() and shutil.which("apt-get"):
        for command in (["update"], ["install", "-y", "--no-install-recommends", "chromium", "chromium-driver"]):
            subprocess.run(["apt-get", "-qq", *command], env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"})
    if not programs():
        pytest.skip("Chromium and its driver are missing, and apt-get could not install them")
    browser, driver = programs()
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    started = webdriver.Chrome(options, webdriver.ChromeService(driver))
    started.set_script_timeout(PATIENCE)
    yield started
    started.quit()


class Lab:
    """A notebook open in a real JupyterLab, in a real browser, with a real kernel."""

    def __init__(self, browser, server: dict, folder: Path, notebook: str, parameters: dict):
        self.browser, self.folder = browser, folder
        self.url = f"http://127.0.0.1:{server['port']}/lab/tree/{notebook}.ipynb?token={server['token']}&reset"
        content = (NOTEBOOKS / f"{notebook}.ipynb").read_text(encoding="utf-8")
        for name, value in parameters.items():
            content, number = re.subn(rf'"{name} = .*?  #', json.dumps(f"{name} = {value!r}  #")[:-1], content)
            assert number == 1, name
        (folder / f"{notebook}.ipynb").write_text(content, encoding="utf-8")
        self.load()

    def load(self) -> None:
        """Open the page, or open it again, and wait for a kernel that does nothing."""
        self.browser.get(self.url)
        self.until(lambda: self.script("return !!window.jupyterapp && !!document.querySelector('.jp-Notebook')"))
        self.idle()

    def script(self, code: str, *values):
        return self.browser.execute_script(code, *values)

    def until(self, true: Callable, what: str = ""):
        """Wait until `true()` is, and return it; what selenium cannot find yet is waited for."""
        from selenium.common.exceptions import TimeoutException, WebDriverException
        from selenium.webdriver.support.ui import WebDriverWait

        wait = WebDriverWait(self.browser, PATIENCE, 0.1, [WebDriverException, OSError])
        try:
            return wait.until(lambda _: true())
        except TimeoutException:
            self.shoot("failed")
            cells = "return [...document.querySelectorAll('[data-mime-type$=stderr]')].map((e) => e.innerText)"
            console = [entry["message"] for entry in self.browser.get_log("browser") if entry["level"] == "SEVERE"]
            said = "\n".join([*self.script(cells), *console[-5:]])[-4000:]
            raise AssertionError(f"waited {PATIENCE} s in vain: {what or true}\n{said}") from None

    def command(self, name: str, then: Callable = lambda: None) -> None:
        """Start one of JupyterLab's commands, do `then`, and wait for its end."""
        started = f"window.jupyterapp.commands.execute('notebook:{name}').then(() => {{ window.ended = true }})"
        self.script(f"window.ended = false; setTimeout(() => {started})")
        then()
        self.until(lambda: self.script("return window.ended"), f"the end of {name}")

    def restart(self) -> None:
        """Restart the kernel, as a person does."""
        self.command("restart-kernel", lambda: self.click(".jp-Dialog .jp-mod-accept"))
        self.idle()

    def idle(self) -> None:
        """Wait until the page says that the kernel does nothing."""
        said = "return [...document.querySelectorAll('.jp-StatusBar-TextItem')].map((e) => e.innerText).join()"
        self.until(lambda: "| Idle" in self.script(said), "an idle kernel")

    def run(self, until: str) -> None:
        """Run all cells to the end, and wait for an element of the selector `until`."""
        self.command("run-all-cells")
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


@pytest.fixture(scope="session")
def jupyterlab(tmp_path_factory) -> Iterator[tuple[dict, Path]]:
    """(What a JupyterLab says of itself, the folder that it serves), for all tests of a session."""
    folder, settings = tmp_path_factory.mktemp("lab"), tmp_path_factory.mktemp("settings")
    for name, values in SETTINGS.items():
        path = settings / "CONFIG_DIR" / "lab" / "user-settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(values))
    with serving(folder, settings, "--LabApp.expose_app_in_browser=True", app="jupyterlab") as server:
        yield server, folder


@pytest.fixture
def lab(chromium, jupyterlab) -> Iterator[Callable[..., Lab]]:
    """Return a function that opens one of our notebooks, in the one JupyterLab of the session."""
    yield lambda notebook, **parameters: Lab(chromium, *jupyterlab, notebook, parameters)
    chromium.get("about:blank")
