"""The model solutions of the exercises, as functions."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy import linalg, ndimage

SOLUTIONS = Path(__file__).parent / "notebooks" / "solutions"


def solver(chapter: str) -> Callable[[str], Callable]:
    """{name of an exercise: its solution} of a chapter (the name of its notebook), as a function."""

    def solution(name: str) -> Callable:
        space = {"np": np, "ndimage": ndimage, "linalg": linalg}
        exec((SOLUTIONS / chapter / f"{name}.py").read_text(encoding="utf-8"), space)
        return space[name]

    return solution
