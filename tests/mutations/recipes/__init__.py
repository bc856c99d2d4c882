"""Deliberate errors in recipes, a file for each chapter's folder: {file: [(what stands there, what replaces it)]}."""

from importlib import import_module
from pathlib import Path

CHAPTERS = {
    path.stem: import_module(f".{path.stem}", __name__) for path in sorted(Path(__file__).parent.glob("[a-z]*.py"))
}
RECIPES = {f"{name}/{file}": errors for name, chapter in CHAPTERS.items() for file, errors in chapter.ERRORS.items()}
TESTED_BY = {
    f"{name}/{file}": tests
    for name, chapter in CHAPTERS.items()
    for file, tests in getattr(chapter, "TESTED_BY", {}).items()
}
"""Whose tests notice, where these are not in a file of the same name."""
