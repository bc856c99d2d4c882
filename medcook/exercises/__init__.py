"""Exercises that grade themselves.

In a notebook an exercise is two neighbouring code cells. The first is tagged `exercise` and `exercise-NAME` and holds
a stub that runs through; the second asks for the verdict. Both may use what the notebook imports and nothing else
that earlier cells made, so that an exercise can be solved, and tested, on its own:

    # %% tags=["exercise", "exercise-dice"]
    def dice(prediction, reference):
        \"\"\"Dice of two boolean masks; two empty masks agree perfectly.\"\"\"
        raise NotImplementedError            # your code here; for a value instead of a function: answer = None

    # %%
    check("01/dice", dice)

The check lives in medcook/exercises/chapter01.py. It gets what the student wrote, tries it on small inputs whose
results the notebook does not show, and raises Wrong(hint) when it is not right. Anything the student's code raises
becomes a hint too, never a traceback:

    from medcook.exercises import Wrong, exercise

    @exercise("01/dice")
    def check_dice(dice):
        a, b = np.array([1, 1, 0], bool), np.array([1, 0, 0], bool)
        expect_close(dice(a, b), 2 / 3, "the overlap counts twice: once for each mask")
        expect_close(dice(a & False, b & False), 1.0, "two empty masks agree: what is 0 / 0 here?")

The model solution is tests/notebooks/solutions/01_data_loading/dice.py and holds the first cell's code, solved. The
tests put it in place of the stub: the stub must be told `not solved yet`, the solution `solved`.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np

from medcook.errors import MedcookError

_CHECKS: dict[str, Callable[[Any], None]] = {}


class Wrong(Exception):
    """The answer is not right; the text is a hint that does not give it away."""


@dataclass(frozen=True)
class Verdict:
    """What `check` found: `.solved`, and a hint where it is not."""

    name: str
    solved: bool
    hint: str = ""

    def __str__(self) -> str:
        return f"{self.name}: solved" if self.solved else f"{self.name}: not solved yet: {self.hint}"

    def _ipython_display_(self) -> None:
        """Show nothing as a cell's last value: `check` has already printed the line."""


def exercise(name: str) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    """Register the check of the exercise `name`, written CHAPTER/NAME."""

    def register(function: Callable[[Any], None]) -> Callable[[Any], None]:
        _CHECKS[name] = function
        return function

    return register


def exercise_names(chapter: str) -> list[str]:
    """Names of a chapter's exercises; `chapter` is its two digits."""
    module = f"{__name__}.chapter{chapter}"
    if find_spec(module):
        import_module(module)
    return [name for name in _CHECKS if name.startswith(f"{chapter}/")]


def check(name: str, answer: Any) -> Verdict:
    """Grade an answer, a function or a value, print one line and return the verdict."""
    if name not in exercise_names(name.partition("/")[0]):
        raise MedcookError(f"There is no exercise {name!r}.", "Look at the name in the chapter's check cell.")
    hint = _hint(_CHECKS[name], answer)
    verdict = Verdict(name, solved=hint is None, hint=hint or "")
    print(_coloured(verdict))
    return verdict


def _hint(function: Callable[[Any], None], answer: Any) -> str | None:
    """None when the check accepts the answer, else what to tell the student."""
    if answer is None or answer is Ellipsis:
        return "write your answer in the cell above."
    try:
        function(answer)
    except NotImplementedError:
        return "write your code in the cell above."
    except Wrong as wrong:
        return str(wrong)
    except Exception as error:  # the student's code may raise anything
        return f"your code stopped with {type(error).__name__}: {str(error).strip() or 'no message'}"
    return None


def _coloured(verdict: Verdict) -> str:
    if "NO_COLOR" in os.environ:
        return str(verdict)
    return f"\033[{32 if verdict.solved else 34}m{verdict}\033[0m"


def expect(condition: bool, hint: str) -> None:
    """Wrong(hint) unless the condition holds."""
    if not condition:
        raise Wrong(hint)


def expect_close(value: Any, wanted: Any, hint: str, tolerance: float = 1e-5) -> None:
    """Wrong(hint) unless `value` (number, array or tensor) has the shape and, within `tolerance`, the values wanted."""
    if value is None or value is Ellipsis:
        raise Wrong("your function returns nothing yet.")
    value, wanted = np.asarray(value, dtype=float), np.asarray(wanted, dtype=float)
    if value.shape != wanted.shape:
        raise Wrong(f"your result has shape {value.shape}, wanted is {wanted.shape}; {hint}")
    if not np.allclose(value, wanted, atol=tolerance, rtol=0):
        raise Wrong(hint)
