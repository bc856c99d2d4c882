"""JupyterLab in headless Chromium. Skipped where Playwright or Chromium is missing; pictures are kept in SHOTS."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from medcook.notebooks.chapters import find_chapters, work_copy

SHOTS = Path(os.environ.get("MEDCOOK_SHOTS", Path(__file__).parents[2] / "build" / "screenshots"))
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]


def pytest_collection_modifyitems(items):
    """Minutes of a browser are not part of `make test`: these run with `make browser`."""
    if os.environ.get("MEDCOOK_BROWSER"):
        return
    for item in items:
        if Path(__file__).parent in Path(item.fspath).parents:
            item.add_marker(pytest.mark.skip(reason="takes minutes: make browser"))


@pytest.fixture(scope="session")
def browser():
    """Headless Chromium; kept for the whole run."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install playwright")
    if CHROMIUM is None:
        pytest.skip("needs Chromium")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    """(address of a running JupyterLab, the folder it shows, which holds a copy of every chapter)."""
    folder = tmp_path_factory.mktemp("lab")
    for chapter in find_chapters([]):
        work_copy(chapter, folder, None)
    settings = tmp_path_factory.mktemp("config")
    (settings / "labconfig").mkdir()
    no_news = {"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}}
    (settings / "labconfig" / "page_config.json").write_text(json.dumps(no_news))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = [
        f"--port={port}",
        "--no-browser",
        "--allow-root",
        "--IdentityProvider.token=",
        "--ServerApp.disable_check_xsrf=True",
    ]
    server = subprocess.Popen(
        [sys.executable, "-m", "jupyterlab", *options, f"--ServerApp.root_dir={folder}"],
        env=os.environ | {"PROFILE": "quick", "JUPYTER_CONFIG_DIR": str(settings)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    address = f"http://127.0.0.1:{port}"
    until(lambda: answers(f"{address}/api"), seconds=120, what="JupyterLab to start")
    yield address, folder
    server.terminate()
    server.wait(30)


def answers(address: str) -> bool:
    try:
        return urllib.request.urlopen(address, timeout=5).status == 200
    except OSError:
        return False


def until(done, seconds: float, what: str, every: float = 1.0):
    """What `done()` gives as soon as it is true; fails after so many seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := done():
            return found
        time.sleep(every)
    pytest.fail(f"waited {seconds:g} s for {what}")


class Notebook:
    """A chapter open in JupyterLab."""

    def __init__(self, browser, lab, name: str):
        self.name, self.path = name, lab[1] / f"{name}.ipynb"
        self.page = browser.new_page(viewport={"width": 1300, "height": 1000})
        self.page.goto(f"{lab[0]}/lab/workspaces/{name}/tree/{name}.ipynb?reset", timeout=120_000)
        self.page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=120_000)
        until(lambda: self.status() == "idle", 120, "a kernel")

    def status(self) -> str | None:
        return self.page.locator(".jp-Notebook-ExecutionIndicator").first.get_attribute("data-status")

    def run_all(self, seconds: float = 600) -> None:
        """Run > Run All Cells, until the kernel rests."""
        self.page.locator(".lm-MenuBar-itemLabel", has_text=re.compile("^Run$")).click()
        self.page.locator(".lm-Menu-itemLabel", has_text=re.compile("^Run All Cells$")).click()
        until(lambda: self.status() != "idle", 60, "the kernel to begin", every=0.1)
        calm = []  # between two cells the kernel is idle for a moment

        def rests() -> bool:
            calm.append(self.status() == "idle")
            return len(calm) > 4 and all(calm[-4:])

        until(rests, seconds, f"{self.name} to run")

    def run_cell(self, text: str, instead: str | None = None) -> None:
        """Put `instead` into the cell that holds a text, if anything, and run it."""
        editor = self.reach(f".jp-CodeCell:has-text({text!r}) .cm-content")
        editor.click()
        if instead is not None:
            self.page.keyboard.press("Control+a")
            self.page.keyboard.insert_text(instead)
        self.page.keyboard.press("Shift+Enter")
        until(lambda: self.status() == "idle", 60, f"{text!r} to run", every=0.5)
        time.sleep(1)

    def reach(self, selector: str):
        """The first element of a kind; JupyterLab draws only cells near the window, so this scrolls down to it."""
        found = self.page.locator(selector)
        pane = "document.querySelector('.jp-WindowedPanel-outer')"
        self.page.evaluate(f"{pane}.scrollTo(0, 0)")
        for _ in range(150):
            if found.count():
                break
            self.page.evaluate(f"{pane}.scrollBy(0, 700)")
            time.sleep(0.2)
        found.first.scroll_into_view_if_needed(timeout=20_000)
        time.sleep(1)
        return found.first

    def errors(self) -> list[str]:
        """Names of the exceptions that cells ended with, from the saved file: the page holds only what is in view."""
        self.page.keyboard.press("Control+s")
        time.sleep(3)
        cells = json.loads(self.path.read_text())["cells"]
        outputs = [output for cell in cells for output in cell.get("outputs", [])]
        return [f"{o['ename']}: {o['evalue']}" for o in outputs if o["output_type"] == "error"]

    def shot(self, what: str) -> bytes:
        """A picture of the window, kept for people; its bytes."""
        SHOTS.mkdir(parents=True, exist_ok=True)
        return self.page.screenshot(path=SHOTS / f"{self.name}-{what}.png")


@pytest.fixture
def opened(browser, lab):
    """opened(name) -> Notebook; closed again after the test, its kernel stopped."""
    pages = []

    def make(name: str) -> Notebook:
        pages.append(Notebook(browser, lab, name))
        return pages[-1]

    yield make
    for notebook in pages:
        notebook.page.close()
    for kernel in json.load(urllib.request.urlopen(f"{lab[0]}/api/kernels")):
        stop = urllib.request.Request(f"{lab[0]}/api/kernels/{kernel['id']}", method="DELETE")
        urllib.request.urlopen(stop, timeout=30).close()
