"""A book of one tiny chapter, in a folder of its own, with a cache of its own."""

from collections.abc import Callable
from pathlib import Path

import pytest

from medcook import paths
from medcook.notebooks.chapters import Chapter

HEADER = """# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A tiny chapter

# %% tags=["parameters"]
PROFILE = None
SEED = 0
"""


@pytest.fixture
def header() -> str:
    """The beginning of every chapter: kernelspec, title, parameters."""
    return HEADER


@pytest.fixture
def write_chapter(tmp_path, monkeypatch) -> Callable[..., Chapter]:
    """write_chapter(cell, (cell, tag, tag), ...) -> Chapter 01_tiny of the book, with parameters PROFILE and SEED."""
    monkeypatch.setenv("MEDCOOK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(paths, "NOTEBOOKS", tmp_path / "notebooks")
    paths.NOTEBOOKS.mkdir()

    def write(*cells: str | tuple, header: str = HEADER) -> Chapter:
        parts = [header]
        for cell in cells:
            source, *tags = (cell,) if isinstance(cell, str) else cell
            quoted = ", ".join(f'"{tag}"' for tag in tags)
            parts.append(f"\n# %%{f' tags=[{quoted}]' if tags else ''}\n{source}\n")
        path: Path = paths.NOTEBOOKS / "01_tiny.py"
        path.write_text("".join(parts), encoding="utf-8")
        return Chapter(path)

    return write
