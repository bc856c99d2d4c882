"""A chapter: notebooks/NN_name.py is the source, NN_name.ipynb is generated from it, never the other way round."""

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

import jupytext
import nbformat
from jupytext.combine import combine_inputs_with_outputs
from nbformat import NotebookNode

from medcook import paths
from medcook.errors import MedcookError

CHAPTER_FILE = re.compile(r"\d\d_\w+\.py")


@dataclass(frozen=True)
class Chapter:
    """One chapter, by the path of its source."""

    source: Path

    @property
    def name(self) -> str:
        """For example `02_unet_baseline`."""
        return self.source.stem

    @property
    def number(self) -> str:
        """The two digits in front."""
        return self.name[:2]

    @property
    def pair(self) -> Path:
        """The generated notebook beside the source."""
        return self.source.with_suffix(".ipynb")

    def read(self) -> NotebookNode:
        """The source as a notebook without outputs; MedcookError when it is not in percent format."""
        text = self.source.read_text(encoding="utf-8")
        notebook = jupytext.reads(text, fmt="py:percent")
        if "kernelspec" not in notebook.metadata:
            raise MedcookError(f"{self.source.name} has no kernelspec in its header.", "Copy the header of chapter 01.")
        notebook.metadata.pop("jupytext", None)
        return set_ids(notebook, self.name)

    def read_pair(self) -> NotebookNode | None:
        """The committed notebook, or None when there is none yet."""
        return read_notebook(self.pair) if self.pair.exists() else None


def read_notebook(path: Path) -> NotebookNode:
    """A notebook file in format 4; MedcookError when it is damaged."""
    try:
        return nbformat.read(path, as_version=4)
    except (ValueError, nbformat.ValidationError) as error:
        raise MedcookError(f"{path.name} is not a readable notebook.", "Generate it again: medcook publish.") from error


def all_chapters(folder: Path | None = None) -> list[Chapter]:
    """All chapters in order."""
    folder = folder or paths.NOTEBOOKS
    return [Chapter(path) for path in sorted(folder.glob("*.py")) if CHAPTER_FILE.fullmatch(path.name)]


def find_chapters(wanted: list[str], folder: Path | None = None) -> list[Chapter]:
    """The chapters named by number (`2`, `02`) or name; all of them when nothing is named."""
    known = all_chapters(folder)
    if not known:
        raise MedcookError(f"No chapters in {folder or paths.NOTEBOOKS}.", "Run from a checkout of the repository.")
    if not wanted:
        return known
    by_name = {key: chapter for chapter in known for key in (chapter.name, chapter.number)}
    found = [by_name.get(Path(name).stem.zfill(2)) for name in wanted]
    if None in found:
        names = ", ".join(chapter.name for chapter in known)
        raise MedcookError(f"There is no chapter {wanted[found.index(None)]!r}.", f"Chapters: {names}.")
    return found


def tags(cell: NotebookNode) -> list[str]:
    """Tags of a cell."""
    return list(cell.metadata.get("tags", []))


def differences(chapter: Chapter) -> list[str]:
    """What differs between the source and the committed notebook; empty when they agree."""
    committed = chapter.read_pair()
    if committed is None:
        return [f"{chapter.pair.name} does not exist"]
    source = chapter.read()
    found = []
    for number, (wanted, present) in enumerate(zip(source.cells, committed.cells, strict=False), 1):
        if _essence(wanted) != _essence(present):
            found.append(f"{chapter.pair.name}: cell {number} differs from {chapter.source.name}")
    if len(source.cells) != len(committed.cells):
        found.append(f"{chapter.pair.name} has {len(committed.cells)} cells, the source {len(source.cells)}")
    if source.metadata.kernelspec != committed.metadata.get("kernelspec"):
        found.append(f"{chapter.pair.name}: the kernelspec differs")
    return found


def _essence(cell: NotebookNode) -> tuple:
    return cell.cell_type, cell.source.strip(), tags(cell)


def generate(chapter: Chapter) -> NotebookNode:
    """The notebook for the source as it is now: ids and outputs of unchanged cells kept, no output of a changed one."""
    source, committed = chapter.read(), chapter.read_pair()
    if committed is None:
        return source
    before = {cell.get("id"): cell for cell in committed.cells}
    notebook = combine_inputs_with_outputs(source, committed, fmt="ipynb")
    for cell in notebook.cells:
        old = before.get(cell.id)
        if cell.cell_type == "code" and (old is None or old.source.strip() != cell.source.strip()):
            cell.outputs, cell.execution_count = [], None
    return set_ids(notebook, chapter.name, keep=set(before))


def set_ids(notebook: NotebookNode, name: str, keep: set[str] | frozenset = frozenset()) -> NotebookNode:
    """Give every cell whose id is not in `keep` an id that follows from the chapter and the cell's text."""
    notebook.nbformat_minor = max(notebook.nbformat_minor, 5)
    used = {cell.get("id") for cell in notebook.cells if cell.get("id") in keep}
    for cell in notebook.cells:
        if cell.get("id") not in keep:
            cell["id"] = _new_id(f"{name}\n{cell.cell_type}\n{cell.source}", used)
            used.add(cell["id"])
    return notebook


def _new_id(text: str, used: set[str]) -> str:
    for attempt in range(1000):
        candidate = hashlib.sha256(f"{text}\n{attempt}".encode()).hexdigest()[:8]
        if candidate not in used:
            return candidate
    raise RuntimeError("no free cell id")


def write_notebook(notebook: NotebookNode, path: Path) -> None:
    """Write so that a reader, or a kill half-way, finds either the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "w", encoding="utf-8") as file:
            nbformat.write(notebook, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def work_copy(chapter: Chapter, into: Path, name: str | None = None) -> list[Path]:
    """Copy a chapter, without outputs, for a student to work in; an existing file is never touched."""
    stem = name or chapter.name
    notebook = chapter.read()
    texts = {".ipynb": nbformat.writes(notebook) + "\n", ".py": chapter.source.read_text(encoding="utf-8")}
    targets = [into / f"{stem}{suffix}" for suffix in texts]
    for target in targets:
        if target.exists():
            raise MedcookError(
                f"{target} exists and was left as it is.",
                f"Open it, or start a second copy: medcook work {chapter.number} --fresh NAME.",
            )
    into.mkdir(parents=True, exist_ok=True)
    for target, text in zip(targets, texts.values(), strict=True):
        with open(target, "x", encoding="utf-8") as file:
            file.write(text)
    return targets
