"""Publishing: what is stripped, what stays, how large it may be, and that a half-way stop harms nothing."""

import base64
import io
import signal
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
from PIL import Image

from medcook import paths
from medcook.errors import MedcookError
from medcook.notebooks import chapters, publishing
from medcook.notebooks.runner import cooked_dir

stream = nbformat.v4.new_output


def png(side: int = 64) -> str:
    noise = np.random.default_rng(0).integers(0, 255, (side, side, 3), dtype=np.uint8)
    target = io.BytesIO()
    Image.fromarray(noise).save(target, "PNG")
    return base64.b64encode(target.getvalue()).decode()


@pytest.fixture
def executed(write_chapter):
    """executed(outputs of the last cell) -> Chapter with an executed notebook at `full`, as papermill leaves it."""

    def make(outputs, source=("x = 1", "print(x)")):
        chapter = write_chapter(*source)
        notebook = chapter.read()
        injected = nbformat.v4.new_code_cell("PROFILE = 'full'", metadata={"tags": ["injected-parameters"]})
        notebook.cells[-1].outputs = outputs
        for cell in notebook.cells:
            cell.metadata |= {"papermill": {"duration": 1}, "execution": {"iopub.status.busy": "2026"}}
        notebook.cells.insert(2, injected)
        notebook.metadata |= {"papermill": {"output_path": "x"}, "widgets": {"state": {}}}
        target = cooked_dir("full") / f"{chapter.name}.ipynb"
        target.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, target)
        return chapter

    return make


def published(chapter, **options):
    return nbformat.read(publishing.publish(chapter, **options), as_version=4)


def test_only_sources_tags_and_outputs_are_published(executed):
    chapter = executed([stream("stream", text="1\n")])
    notebook = published(chapter)
    assert chapters.differences(chapter) == []
    assert set(notebook.metadata) == {"kernelspec"}
    assert {key for cell in notebook.cells for key in cell.metadata} == {"tags"}
    assert notebook.cells[-1].outputs[0].text == "1\n"
    assert [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"] == [1, 2, 3]


def test_publishing_twice_gives_the_same_bytes(executed):
    chapter = executed([stream("stream", text="1\n")])
    first = publishing.publish(chapter).read_bytes()
    assert publishing.publish(chapter).read_bytes() == first


def test_ids_stay_when_an_output_changes(executed):
    before = [cell.id for cell in published(executed([stream("stream", text="1\n")])).cells]
    assert [cell.id for cell in published(executed([stream("stream", text="2\n")])).cells] == before


def test_noise_and_machine_paths_are_removed(executed):
    cache, home = paths.cache_dir(), Path.home()
    data = {"text/plain": f"PosixPath('{cache}/runs/a')", "text/html": f"<p>{home}/x</p>"}
    chapter = executed(
        [
            stream("stream", name="stderr", text="100%|####| 3/3"),
            stream("stream", text="step 1\rstep 2\rstep 3\n"),
            stream("stream", text=f"python in {sys.prefix}\n"),
            stream("display_data", {publishing.WIDGET: {"model_id": "1"}, "text/plain": "IntSlider()"}),
            stream("execute_result", data, execution_count=7, metadata={"a": 1}),
        ]
    )
    text, result = published(chapter).cells[-1].outputs
    assert text.text == "step 3\npython in <python>\n"
    assert result.data["text/plain"] == "PosixPath('<cache>/runs/a')"
    assert result.data["text/html"] == "<p>~/x</p>"
    assert result.execution_count == 3


def test_large_images_are_reduced_to_a_palette(executed):
    chapter = executed([stream("display_data", {"image/png": png(256)})])
    notebook = published(chapter, limit=150_000)
    image = Image.open(io.BytesIO(base64.b64decode(notebook.cells[-1].outputs[0].data["image/png"])))
    assert image.mode == "P" and image.size == (256, 256)
    assert chapter.pair.stat().st_size <= 150_000


def test_what_cannot_fit_is_named_and_not_published(executed):
    chapter = executed([stream("stream", text="x" * 5000)])
    with pytest.raises(MedcookError, match=r"01_tiny.ipynb would be 0.01 MB; largest: cell 4 \(5 kB\)"):
        publishing.publish(chapter, limit=3000)
    assert not chapter.pair.exists()


def test_an_outdated_execution_is_not_published(executed, write_chapter):
    executed([stream("stream", text="1\n")])
    with pytest.raises(MedcookError, match="made from another version of 01_tiny.py"):
        publishing.publish(write_chapter("x = 2", "print(x)"))


def test_a_chapter_that_was_not_executed_is_not_published(write_chapter):
    with pytest.raises(MedcookError, match="not been executed at 'full'. Run it first: medcook cook 01 --profile full"):
        publishing.publish(write_chapter("x = 1"))


def test_a_checked_cell_without_output_is_not_published(executed):
    chapter = executed([], source=("x = 1", ("print(x)", "nbval-check-output")))
    with pytest.raises(MedcookError, match="cell 4 is tagged nbval-check-output and has no stored text output"):
        publishing.publish(chapter)


def test_a_kill_while_publishing_leaves_the_old_notebook(executed, monkeypatch):
    chapter = executed([stream("stream", text="1\n")])
    kept = publishing.publish(chapter).read_bytes()
    executed([stream("stream", text="2\n")])

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(chapters.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        publishing.publish(chapter)
    assert chapter.pair.read_bytes() == kept


KILLED = """
import os, signal, sys
from pathlib import Path
from medcook import paths
from medcook.notebooks import chapters, publishing
source, moment = Path(sys.argv[1]), sys.argv[2]
paths.NOTEBOOKS = source.parent
setattr(os, moment, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
publishing.publish(chapters.Chapter(source))
"""


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_killed_while_publishing_the_same_command_ends_like_an_uninterrupted_one(executed, moment):
    chapter = executed([stream("stream", text="1\n")])
    old = publishing.publish(chapter).read_bytes()
    executed([stream("stream", text="2\n")])
    killed = subprocess.run([sys.executable, "-c", KILLED, chapter.source, moment], timeout=120)
    assert killed.returncode == -signal.SIGKILL and chapter.pair.read_bytes() == old
    again = publishing.publish(chapter).read_bytes()
    chapter.pair.unlink()
    assert again == publishing.publish(chapter).read_bytes() != old


def test_the_picture_of_the_cell_tagged_cover_lies_beside_the_notebook(write_chapter):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("draw()", metadata={"tags": ["cover"]})])
    notebook.cells[0].outputs = [stream("display_data", data={"image/png": png()})]
    chapter = write_chapter("x = 1")
    publishing.write_cover(notebook, chapter)
    assert chapter.source.with_suffix(".png").read_bytes() == base64.b64decode(png())
