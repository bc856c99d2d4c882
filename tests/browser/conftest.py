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

NOTEBOOK = "[...jupyterapp.shell.widgets('main')].find((one) => one.content?.model?.cells)"
"""JupyterLab's own object of the open notebook; the page's elements hold only the cells that are in view."""

READY = f"{NOTEBOOK}?.context.isReady && {NOTEBOOK}.sessionContext.session?.kernel?.status === 'idle'"

PANE = "document.querySelector('.jp-WindowedPanel-outer')"

CODE_CELLS = f"""{NOTEBOOK}.content.model.sharedModel.cells.filter((one) => one.cell_type === 'code').map((one) => ({{
    id: one.id,
    source: one.source,
    count: one.execution_count,
    running: one.executionState === 'running',
    errors: one.outputs.filter((output) => output.output_type === 'error')
        .map((output) => `${{output.ename}}: ${{output.evalue}}`),
}}))"""


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
        "--expose-app-in-browser",
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
        until(lambda: self.page.evaluate(READY), 300, f"{name} to be read and its kernel to start")

    def code_cells(self) -> list[dict]:
        """Every code cell: its id, source, count (None until it has run), whether it runs or waits to, errors."""
        return self.page.evaluate(CODE_CELLS)

    def count_of(self, cell_id: str) -> int | None:
        return next(cell["count"] for cell in self.code_cells() if cell["id"] == cell_id)

    def run_all(self, seconds: float = 1800) -> None:
        """Run > Run All Cells, until every cell has its count, or the first error keeps the rest from running.

        Not until the kernel is idle: between two cells, and while a widget is drawn, it is idle, too.
        """
        before = self.code_cells()
        self.page.locator(".lm-MenuBar-itemLabel", has_text=re.compile("^Run$")).click()
        self.page.locator(".lm-Menu-itemLabel", has_text=re.compile("^Run All Cells$")).click()
        until(lambda: self.code_cells() != before, 60, f"{self.name} to begin", every=0.1)
        until(self.ran_through, seconds, f"{self.name} to run")

    def ran_through(self) -> bool:
        cells = [cell for cell in self.code_cells() if cell["source"].strip()]
        rests = not any(cell["running"] for cell in cells)
        return rests and (all(cell["count"] for cell in cells) or any(cell["errors"] for cell in cells))

    def run_cell(self, text: str, instead: str | None = None, seconds: float = 300) -> None:
        """Put `instead` into the cell that holds a text, if anything, and run it until it has a new count."""
        self.reach(f".jp-CodeCell:has-text({text!r}) .cm-content").click()
        if instead is not None:
            self.page.keyboard.press("Control+a")
            self.page.keyboard.insert_text(instead)
        chosen = self.page.evaluate(f"{NOTEBOOK}.content.activeCell.model.id")
        before = self.count_of(chosen)
        self.page.keyboard.press("Shift+Enter")
        until(lambda: self.count_of(chosen) not in (None, before), seconds, f"{text!r} to run", every=0.5)
        time.sleep(1)

    def reach(self, selector: str):
        """The first element of a kind; JupyterLab draws only cells near the window, so this scrolls down to it."""
        found = self.page.locator(selector)
        self.page.evaluate(f"{PANE}.scrollTo(0, 0)")
        for _ in range(150):
            if found.count():
                break
            self.page.evaluate(f"{PANE}.scrollBy(0, 700)")
            time.sleep(0.2)
        found.first.scroll_into_view_if_needed(timeout=20_000)
        time.sleep(1)
        return found.first

    def errors(self) -> list[str]:
        """The exceptions that cells ended with."""
        return [error for cell in self.code_cells() for error in cell["errors"]]

    def turn(self, label: str) -> tuple[bytes, bytes]:
        """Move the slider, or choose the second of the list, with this label: its widget's picture before and after."""
        labelled = f":has(> .widget-label:text-is({label!r}))"
        control = self.reach(f".widget-inline-hbox{labelled} :is(.noUi-handle, select)")
        picture = self.page.locator(".widget-vbox", has=self.page.locator(labelled)).locator("img").first
        before, source = picture.screenshot(), picture.get_attribute("src")
        self.shot(label)
        if control.evaluate("(one) => one.localName") == "select":
            control.select_option(index=1)
        else:
            last = control.get_attribute("aria-valuenow") == control.get_attribute("aria-valuemax")
            control.press("ArrowLeft" if last else "ArrowRight")
        until(lambda: picture.get_attribute("src") != source, 120, f"{label!r} to draw another picture", every=0.2)
        time.sleep(1)
        self.shot(f"{label}-moved")
        return before, picture.screenshot()

    def leaf_through(self) -> None:
        """A picture of every screenful, from above to below, kept for people."""
        at = None
        self.page.evaluate(f"{PANE}.scrollTo(0, 0)")
        for number in range(100):
            time.sleep(1)
            if at == (at := self.page.evaluate(f"{PANE}.scrollTop")):
                break
            self.shot(f"page-{number:02d}")
            self.page.evaluate(f"{PANE}.scrollBy(0, 800)")

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
