"""One folder a chapter, one file a paper: the file of paper `a-b` is `<chapter>/a_b.py` and holds `recipe`.

Between digits an underscore stands for a point: `study_2_5d.py` is `study-2.5d`.
"""

import importlib
import re
from functools import cache
from pathlib import Path

from medcook.recipes.recipe import Arm, Component, Recipe, Scale

__all__ = ["Arm", "Component", "Recipe", "Scale", "all_recipes", "find_recipe"]


def recipe_modules() -> dict[str, str]:
    """{paper id: module name}, from the file names alone: nothing is imported."""
    here = Path(__file__).parent
    files = sorted(path for path in here.glob("*/*.py") if not path.name.startswith("_"))
    return {_paper(path.stem): f"{__name__}.{path.parent.name}.{path.stem}" for path in files}


def _paper(stem: str) -> str:
    """The id of the paper whose file has this name."""
    return re.sub(r"(?<=\d)_(?=\d)", ".", stem).replace("_", "-")


@cache
def find_recipe(paper: str) -> Recipe | None:
    """The recipe of a paper (or of one of the book's own claims), or None."""
    module = recipe_modules().get(paper)
    return importlib.import_module(module).recipe if module else None


def all_recipes() -> dict[str, Recipe]:
    """{paper id: recipe} of every recipe there is."""
    return {paper: find_recipe(paper) for paper in recipe_modules()}
