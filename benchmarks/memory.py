"""`python -m benchmarks.memory [01 03]`: what JupyterLab and the kernels of some chapters take together.

Binder gives a reader 2 GB. Here JupyterLab is started, then one chapter after the other is run at `quick` and its
kernel left alive, as a reader's browser tabs leave it. Pages that processes share are counted once. Writes
benchmarks/memory.json and its table in README.md; run it in an environment with the versions of constraints.txt.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from nbclient import NotebookClient

from benchmarks.marks import put, table
from medcook.notebooks.chapters import Chapter, find_chapters
from medcook.notebooks.measure import PeakMemory
from medcook.provenance import environment
from medcook.runs import write_atomically

HERE = Path(__file__).parent
BEGIN, END = "<!-- memory: made by python -m benchmarks.memory -->", "<!-- end of memory -->"
PORT = 8917
ROOM_MB = 2048
"""What Binder gives."""


@contextlib.contextmanager
def jupyterlab(folder: Path) -> Iterator[None]:
    """A JupyterLab server that answers, for as long as the block runs."""
    settings = {"port": PORT, "port_retries": 0, "token": "quiet", "root_dir": folder, "open_browser": False}
    options = ["--allow-root", *(f"--ServerApp.{name}={value}" for name, value in settings.items())]
    command = [sys.executable, "-m", "jupyterlab", *options]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(240):
            with contextlib.suppress(urllib.error.URLError):
                urllib.request.urlopen(f"http://127.0.0.1:{PORT}/api/status?token=quiet")
                break
            if server.poll() is not None:
                sys.exit(f"JupyterLab ended with status {server.returncode}; is port {PORT} taken?")
            time.sleep(0.25)
        yield
    finally:
        server.terminate()
        server.wait()


def measure(chapters: list[Chapter]) -> list[dict]:
    """One row a step: peak MB so far of JupyterLab and of all kernels that were started."""
    rows = []
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as kernels, PeakMemory() as memory:
        os.environ |= {"PROFILE": "quick", "MEDCOOK_CACHE": f"{name}/cache"}  # nothing is trained already
        kernels.enter_context(jupyterlab(Path(name)))
        time.sleep(2)
        rows.append({"running": "JupyterLab", "peak_mb": round(memory.peak_mb)})
        for chapter in chapters:
            notebook = chapter.read()
            client = NotebookClient(notebook, timeout=None, resources={"metadata": {"path": name}})
            kernels.enter_context(client.setup_kernel())
            for number, cell in enumerate(notebook.cells):
                client.execute_cell(cell, number)
            rows.append({"running": f"and {chapter.name}", "peak_mb": round(memory.peak_mb)})
            print(rows[-1], flush=True)
    return rows


def report(found: dict) -> str:
    """The results as Markdown."""
    at, rows = found["machine"], found["rows"]
    return f"""Peak MB of all processes together, chapters at `quick`, each kernel left alive; {at["cores"]} cores,
{at["cpu"]}, PyTorch {at["torch"]}. Binder gives {ROOM_MB}.

{table("running | peak MB so far", [[row["running"], row["peak_mb"]] for row in rows])}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("chapters", nargs="*", default=["01", "03"])
    chapters = find_chapters(parser.parse_args().chapters)
    found = {"machine": {"cores": os.cpu_count(), **environment()}, "rows": measure(chapters)}
    write_atomically(HERE / "memory.json", json.dumps(found, indent=1) + "\n")
    print(report(found))
    put(report(found), BEGIN, END)


if __name__ == "__main__":
    main()
