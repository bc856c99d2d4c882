"""What the recipes about promptable models share: a zero-shot arm, scales, and scores of answers to prompts."""

from collections.abc import Callable, Iterable

import numpy as np

from medcook.data import Case
from medcook.evaluation import row
from medcook.recipes.recipe import Scale
from medcook.sam.adapting import PromptedSam, predictor_of, targets_of
from medcook.sam.prompts import Prompt, box_of, first_click, next_click
from medcook.sam.zero_shot import Target, dice
from medcook.tasks import Budget, Task

ZERO_SHOT = PromptedSam(tuned=("decoder",), rate=1e-12, prompts="box", objects=1, rounds=1)
"""The small SAM as it ships: at this rate no weight moves further than its last digit, and no arm gets fewer steps."""

LABELLED = 5
"""Labelled patients of acdc, unless a recipe says otherwise."""


def scales(
    *arms: str,
    labelled: int = LABELLED,
    quick: Task | None = None,
    full: Task | None = None,
    steps: int = 150,
    batch: int = 4,
) -> dict[str, Scale]:
    """`quick` on the embedded cohort, `full` on acdc (or the given tasks); `full` runs these arms alone."""
    quick = quick or Task("embedded", labelled=3)
    full = full or Task("acdc", labelled=labelled, evaluation="test")
    return {
        "quick": Scale(quick, Budget(steps=20, batch=4, checks=0), replicates=1),
        "full": Scale(full, Budget(steps=steps, batch=batch, checks=0), replicates=3, arms=arms or None),
    }


def mean_rows(case: Case, targets: Iterable[Target], ask: Callable[[Target], dict[str, float]]) -> list[dict]:
    """A row a structure: the mean of what `ask(target)` measures over its slices."""
    found: dict[str, list[dict]] = {}
    for target in targets:
        found.setdefault(target.structure, []).append(ask(target))
    return [
        row(case, name, **{key: float(np.mean([one[key] for one in many])) for key in many[0]})
        for name, many in found.items()
    ]


def every_prompt(answer: Callable[[np.ndarray, Prompt], np.ndarray], target: Target, clicks=(1, 3)) -> dict:
    """Dice from the tight box, from clicks (each after the first on what is still wrong), and their mean `dice`."""
    found = {"box": dice(answer(target.image, Prompt(box=box_of(target.mask))), target.mask)}
    prompt = first_click(target.mask)
    for count in range(1, max(clicks) + 1):
        mask = answer(target.image, prompt)
        if count in clicks:
            found[f"click_{count}"] = dice(mask, target.mask)
        prompt = next_click(prompt, mask, target.mask)
    return {"dice": float(np.mean(list(found.values())))} | found


def every_prompt_rows(fitted, case: Case) -> list[dict]:
    """Mean `dice` over box, one click and three, and each alone, for every structure of a case."""
    predictor = predictor_of(fitted)
    answer = lambda image, prompt: predictor(image, prompt).mask  # noqa: E731
    return mean_rows(case, targets_of(fitted.task, case), lambda target: every_prompt(answer, target))
