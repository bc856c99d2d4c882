"""The executed notebooks as pages of the book."""

import re
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from medcook.notebooks.chapters import Chapter, write_notebook

STYLE = re.compile(r"<style[^>]*>.*?</style>\s*", re.DOTALL)
"""Every output brings its own colours along, which a dark page makes unreadable; the book has colours for all."""


def write_chapter(chapter: Chapter, folder: Path) -> None:
    """Copy a committed notebook, or (without outputs) the source of one that waits for it, and how to run it."""
    notebook = chapter.read_pair() or chapter.read()
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            plain(output)
    notebook.cells.insert(1, _how_to_run(chapter))
    write_notebook(notebook, folder / chapter.pair.name)


def plain(output: NotebookNode) -> None:
    """Take the styles out of an output's HTML, and what it brings for LaTeX."""
    data = output.get("data", {})
    if "text/html" in data:
        page = STYLE.sub("", data["text/html"]).replace(' style="text-align: right;"', "")
        data["text/html"] = page.replace('border="1" ', "").replace('class="output_html"', 'class="highlight"')
        data.pop("text/latex", None)


def title(chapter: Chapter) -> str:
    """The heading of a chapter."""
    return re.search(r"^# # (.+)$", chapter.source.read_text(encoding="utf-8"), re.MULTILINE)[1]


def _how_to_run(chapter: Chapter) -> NotebookNode:
    ledger = f"../ledger.html?chapter={chapter.name.replace('_', '+')}"
    text = (
        f"*Run it yourself: `medcook work {chapter.number}` makes a copy of your own. "
        f'The papers of this chapter: <a href="{ledger}">in the ledger</a>.*'
    )
    return nbformat.v4.new_markdown_cell(text, id="how-to-run")
