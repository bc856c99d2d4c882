"""nbval, as CI runs it, passes on an unchanged mechanism and fails on one that gives another result."""

import os
import subprocess
import sys

import nbformat
import pytest

from medcook.notebooks.chapters import write_notebook


@pytest.mark.parametrize(("mechanism", "passes"), [("2 * overlap / total", True), ("overlap / total", False)])
def test_a_changed_mechanism_fails(write_chapter, tmp_path, mechanism, passes):
    (tmp_path / "tiny_mechanism.py").write_text(f"def dice(overlap, total):\n    return {mechanism}\n")
    source = "from tiny_mechanism import dice\nprint(f'{dice(2, 6):.3f}')"
    chapter = write_chapter((source, "nbval-check-output", "mechanism"))
    notebook = chapter.read()
    notebook.cells[-1].outputs = [nbformat.v4.new_output("stream", text="0.667\n")]
    notebook.cells[-1].execution_count = 2
    write_notebook(notebook, chapter.pair)
    options = ["--nbval-lax", "--nbval-current-env", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command = [sys.executable, "-m", "pytest", *options, str(chapter.pair)]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert (result.returncode == 0) == passes, result.stdout
    assert passes or "0.333" in result.stdout
