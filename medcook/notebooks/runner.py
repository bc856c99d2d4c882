"""`cook`: run a chapter in a fresh kernel of this interpreter, measure it, and not again until an input changes."""

import base64
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import nbformat
from filelock import FileLock
from nbformat import NotebookNode

from medcook import paths
from medcook.notebooks import parameters as notebook_parameters
from medcook.notebooks.chapters import Chapter, write_notebook
from medcook.notebooks.measure import PeakMemory

INJECTED = "injected-parameters"


@dataclass(frozen=True)
class Cooked:
    """What became of one chapter. `error` is a sentence, or None when every cell ran."""

    chapter: str
    notebook: Path
    figures: list[str]
    minutes: float
    peak_mb: float
    key: str
    cached: bool = False
    error: str | None = None


def cooked_dir(profile: str) -> Path:
    """Where executed notebooks of a profile are."""
    return paths.cache_dir() / "cooked" / profile


def cook(
    chapter: Chapter, profile: str, parameters: dict[str, Any] | None = None, *, force: bool = False, progress=True
) -> Cooked:
    """Execute a chapter, unless nothing that it depends on has changed since it was last executed.

    The executed notebook lands in `cooked_dir(profile)`, its figures as PNG in a folder beside it. A notebook that
    fails leaves its executed part as NAME.failed.ipynb, and what an earlier run made stays as it was.
    """
    parameters = dict(parameters or {})
    source = chapter.read()
    notebook_parameters.accept(source, chapter.source.name, parameters)
    if "PROFILE" in notebook_parameters.declared(source, chapter.source.name):
        parameters.setdefault("PROFILE", profile)
    target = cooked_dir(profile) / f"{chapter.name}{_variant(parameters)}.ipynb"
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_suffix(".lock")):
        key = content_key(chapter, profile, parameters)
        earlier = _read_record(target)
        if earlier and earlier.key == key and not force:
            return replace(earlier, cached=True)
        return _execute(chapter, source, profile, parameters, target, key, progress)


def _execute(chapter, source, profile, parameters, target: Path, key: str, progress: bool) -> Cooked:
    partial = target.with_suffix(".partial.ipynb")
    started = time.monotonic()
    with PeakMemory() as memory:
        error = run_notebook(source, partial, profile, parameters, chapter.name, progress=progress)
    cooked = Cooked(chapter.name, target, [], (time.monotonic() - started) / 60, memory.peak_mb, key, error=error)
    if error:
        failed = target.with_suffix(".failed.ipynb")
        os.replace(partial, failed)
        return replace(cooked, notebook=failed, error=f"{error} The executed copy is {failed}.")
    figures = save_figures(nbformat.read(partial, as_version=4), target.with_suffix(""))
    os.replace(partial, target)
    target.with_suffix(".failed.ipynb").unlink(missing_ok=True)
    cooked = replace(cooked, figures=figures)
    _write_record(cooked)
    return cooked


def run_notebook(source: NotebookNode, target: Path, profile: str, parameters: dict, name: str, *, progress=True):
    """Execute `source` into `target` with papermill; None, or a sentence naming the cell and the error."""
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError
    from papermill.execute import execute_notebook

    write_notebook(source, target)
    with tempfile.TemporaryDirectory(prefix="medcook-") as scratch:
        try:
            execute_notebook(
                target,
                target,
                parameters=parameters,
                cwd=scratch,
                progress_bar={"desc": name, "unit": "cell", "leave": False} if progress else False,
                kernel_manager_class=_kernel_manager(profile, scratch),
            )
        except PapermillExecutionError as error:
            number = _source_number(nbformat.read(target, as_version=4), error.source)
            return f"{name}: cell {number} failed with {error.ename}: {_first_line(error.evalue)}."
        except DeadKernelError:
            return f"{name}: the kernel died in cell {_last_started(target)}; it may have run out of memory."
    return None


def _kernel_manager(profile: str, scratch: str) -> type:
    """A kernel manager that starts this interpreter, whatever kernels and start-up files the user has installed."""
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpec

    search = os.pathsep.join(filter(None, [str(paths.ROOT), os.environ.get("PYTHONPATH")]))
    environment = {
        "PROFILE": profile,
        "PYTHONPATH": search,
        "IPYTHONDIR": str(Path(scratch) / "ipython"),
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    }

    class ThisInterpreter(AsyncKernelManager):
        @property
        def kernel_spec(self) -> KernelSpec:
            argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}", "--log-level=40"]
            return KernelSpec(argv=argv, display_name="Python 3", language="python", env=environment)

    return ThisInterpreter


def _source_number(executed: NotebookNode, source: str) -> int:
    """Number of a cell counted as in the source: markers and injected cells do not count."""
    cells = [c for c in executed.cells if not {INJECTED, "papermill-error-cell-tag"} & set(c.metadata.get("tags", []))]
    return next((number for number, cell in enumerate(cells, 1) if cell.source == source), 0)


def _last_started(path: Path) -> int:
    executed = nbformat.read(path, as_version=4)
    started = [cell.source for cell in executed.cells if cell.metadata.get("papermill", {}).get("start_time")]
    return _source_number(executed, started[-1]) if started else 1


def _first_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[0].rstrip(".")


def save_figures(notebook: NotebookNode, folder: Path) -> list[str]:
    """Write every PNG output to `folder` as cellNN_K.png and remove those of earlier runs; returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("cell*.png"):
        old.unlink()
    cells = [cell for cell in notebook.cells if INJECTED not in cell.metadata.get("tags", [])]
    written = []
    for number, cell in enumerate(cells, 1):
        images = [o["data"]["image/png"] for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
        for k, image in enumerate(images, 1):
            path = folder / f"cell{number:02d}_{k}.png"
            path.write_bytes(base64.b64decode(image))
            written.append(str(path))
    return written


def content_key(chapter: Chapter, profile: str, parameters: dict[str, Any]) -> str:
    """Hash of everything that an executed chapter depends on."""
    digest = hashlib.sha256(json.dumps([profile, parameters, sys.version], sort_keys=True, default=str).encode())
    digest.update("\n".join(sorted(f"{d.name}=={d.version}" for d in distributions())).encode())
    for path in [chapter.source, *_inputs()]:
        digest.update(f"\n{path.name}\n".encode() + path.read_bytes())
    for value in parameters.values():
        if isinstance(value, str) and Path(value).is_dir():
            digest.update("\n".join(_folder_state(Path(value))).encode())
    return digest.hexdigest()[:20]


def _inputs() -> Iterable[Path]:
    """Files of the repository that any chapter may read: the package, manifests and registries, ledger and evidence."""
    folders = {paths.ROOT / "medcook": "*.py", paths.MANIFESTS: "*", paths.PAPERS: "*"}
    for folder, pattern in folders.items():
        yield from (p for p in sorted(folder.rglob(pattern)) if p.is_file() and p.suffix != ".png")


def _folder_state(folder: Path) -> list[str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [f"{f.relative_to(folder)} {f.stat().st_size} {f.stat().st_mtime_ns}" for f in files]


def _variant(parameters: dict[str, Any]) -> str:
    """Suffix that keeps runs with own parameters apart from the plain one."""
    own = {key: value for key, value in parameters.items() if key != "PROFILE"}
    text = json.dumps(own, sort_keys=True, default=str)
    return f"-{hashlib.sha256(text.encode()).hexdigest()[:8]}" if own else ""


def _record_path(target: Path) -> Path:
    return target.with_suffix(".json")


def _write_record(cooked: Cooked) -> None:
    record = asdict(cooked) | {"notebook": str(cooked.notebook)}
    path = _record_path(cooked.notebook)
    partial = path.with_suffix(".json.partial")
    partial.write_text(json.dumps(record, indent=1), encoding="utf-8")
    os.replace(partial, path)


def _read_record(target: Path) -> Cooked | None:
    """The record of an earlier run, if that run's notebook and figures are still there."""
    try:
        record = json.loads(_record_path(target).read_text(encoding="utf-8"))
        cooked = Cooked(**(record | {"notebook": Path(record["notebook"])}))
    except (OSError, ValueError, TypeError, KeyError):
        return None
    files = [cooked.notebook, *map(Path, cooked.figures)]
    return cooked if all(path.exists() for path in files) else None
