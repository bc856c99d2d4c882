"""From an executed notebook of `full` to the committed .ipynb: clean, small, free of the machine it ran on."""

import base64
import io
import os
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import nbformat
from nbformat import NotebookNode
from PIL import Image

from medcook import paths
from medcook.errors import MedcookError
from medcook.notebooks import lint
from medcook.notebooks.chapters import Chapter, generate, read_notebook, write_notebook
from medcook.notebooks.runner import INJECTED, cooked_dir

LIMIT_BYTES = 1_500_000
COLOURS = 256
TEXT_TYPES = ("text/plain", "text/html", "text/markdown")
WIDGET = "application/vnd.jupyter.widget-view+json"


def publish(chapter: Chapter, *, profile: str = "full", limit: int = LIMIT_BYTES) -> Path:
    """Write the chapter's .ipynb with the outputs of its executed notebook; the old file stays whole until the end."""
    executed_path = cooked_dir(profile) / f"{chapter.name}.ipynb"
    again = f"Run it first: medcook cook {chapter.number} --profile {profile}."
    if not executed_path.exists():
        raise MedcookError(f"{chapter.name} has not been executed at {profile!r}.", again)
    executed = [c for c in read_notebook(executed_path).cells if INJECTED not in c.metadata.get("tags", [])]
    notebook = generate(chapter)
    if [cell.source for cell in executed] != [cell.source for cell in notebook.cells]:
        raise MedcookError(f"{executed_path} was made from another version of {chapter.source.name}.", again)
    _take_outputs(notebook, executed)
    _shrink(notebook, chapter.pair.name, limit)
    if found := lint.output_problems(notebook, chapter.pair.name):
        raise MedcookError(f"{found[0]}.", "Nothing was published.")
    write_notebook(notebook, chapter.pair)
    write_cover(notebook, chapter)
    return chapter.pair


def write_cover(notebook: NotebookNode, chapter: Chapter) -> None:
    """Put the picture of the cell tagged `cover` beside the notebook, as NN_name.png, for the README."""
    for cell in notebook.cells:
        images = [o.data["image/png"] for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
        if "cover" in cell.metadata.get("tags", []) and images:
            target = chapter.source.with_suffix(".png")
            partial = target.with_suffix(".partial")
            partial.write_bytes(base64.b64decode(images[0]))
            os.replace(partial, target)


def _take_outputs(notebook: NotebookNode, executed: list[NotebookNode]) -> None:
    scrub = scrubber()
    count = 0
    for cell, ran in zip(notebook.cells, executed, strict=True):
        if cell.cell_type != "code":
            continue
        count += 1
        cell.execution_count = count
        cell.outputs = clean_outputs(ran.outputs, scrub)
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = count
        cell.metadata = NotebookNode({key: cell.metadata[key] for key in ("tags", "jupyter") if key in cell.metadata})
    keep = ("kernelspec", "language_info")
    notebook.metadata = NotebookNode({key: notebook.metadata[key] for key in keep if key in notebook.metadata})


def clean_outputs(outputs: list[NotebookNode], scrub: Callable[[str], str]) -> list[NotebookNode]:
    """Outputs without stderr, widgets, timing, progress bars and machine paths; neighbouring streams joined."""
    kept: list[NotebookNode] = []
    for output in outputs:
        if output.output_type == "stream":
            text = scrub(_last_states(output.text)) if output.name == "stdout" else ""
            if kept and kept[-1].output_type == "stream" and text:
                kept[-1].text += text
            elif text.strip():
                kept.append(nbformat.v4.new_output("stream", name="stdout", text=text))
        elif output.output_type == "error":
            kept.append(output)
        elif WIDGET not in output.data:
            data = {key: scrub(value) if key in TEXT_TYPES else value for key, value in output.data.items()}
            kept.append(nbformat.v4.new_output(output.output_type, data=data))
    return kept


def _last_states(text: str) -> str:
    """What a terminal would show: of a line that was rewritten with carriage returns, its last state."""
    return "\n".join(line.rstrip("\r").rsplit("\r", 1)[-1] for line in text.split("\n"))


def scrubber() -> Callable[[str], str]:
    """A function that replaces this machine's paths in a text by what they are."""
    places = {
        str(paths.cache_dir()): "<cache>",
        str(paths.mirror_dir() or ""): "<mirror>",
        str(paths.ROOT): "<medcook>",
        sys.prefix: "<python>",
        tempfile.gettempdir(): "<temporary>",
        str(Path.home()): "~",
    }
    known = sorted((place for place in places if len(place) > 1), key=len, reverse=True)
    pattern = re.compile("|".join(re.escape(place) + r"(?=[/\\\s\"'&<>:,)]|$)" for place in known))
    return lambda text: pattern.sub(lambda match: places[match.group()], text)


def _shrink(notebook: NotebookNode, name: str, limit: int) -> None:
    """Reduce the largest images to a palette until the file fits; MedcookError naming what is large if it cannot."""
    images = [
        (cell_number, output.data)
        for cell_number, cell in enumerate(notebook.cells, 1)
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    for _, data in sorted(images, key=lambda image: len(image[1]["image/png"]), reverse=True):
        if _size(notebook) <= limit:
            return
        data["image/png"] = to_palette(data["image/png"])
    if (size := _size(notebook)) > limit:
        sizes = sorted(((len(nbformat.writes(_alone(c))), n) for n, c in enumerate(notebook.cells, 1)), reverse=True)
        largest = ", ".join(f"cell {number} ({size / 1000:.0f} kB)" for size, number in sizes[:3])
        raise MedcookError(f"{name} would be {size / 1e6:.2f} MB; largest: {largest}.", "Make those outputs smaller.")


def to_palette(png: str) -> str:
    """A base64 PNG with at most 256 colours, or the same one if that is no smaller."""
    image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    target = io.BytesIO()
    image.quantize(COLOURS, dither=Image.Dither.NONE).save(target, "PNG", optimize=True)
    smaller = base64.b64encode(target.getvalue()).decode()
    return smaller if len(smaller) < len(png) else png


def _alone(cell: NotebookNode) -> NotebookNode:
    return nbformat.v4.new_notebook(cells=[cell])


def _size(notebook: NotebookNode) -> int:
    return len(nbformat.writes(notebook).encode()) + len(os.linesep)
