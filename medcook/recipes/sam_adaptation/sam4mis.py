"""SAM for medical image segmentation, a survey (Zhang, Shen and Jiao, 2024): uneven from scratch, better adapted.

The survey collects what zero-shot SAM scores on many modalities and targets, and what adapting it changes. Its protocol
as code: the same prompt for every target t of every set s, the table of Dice(s, t), zero-shot and adapted,
    unevenness = best set's mean - worst set's mean.
`python -m medcook.sam.card` makes the full zero-shot table, with clicks and against classical methods.
"""

from collections.abc import Iterator

import pandas as pd

from medcook.data import Case
from medcook.recipes.recipe import Arm, Component, Recipe
from medcook.recipes.sam_adaptation._modalities import EMBEDDED, ModalitiesTask, targets_here
from medcook.recipes.sam_adaptation._prompting import ZERO_SHOT, every_prompt, mean_rows, scales
from medcook.sam.adapting import PromptedSam, predictor_of
from medcook.sam.zero_shot import Target

CLICKS = (1,)


def first_of_each(targets: Iterator[Target]) -> Iterator[Target]:
    """One slice a structure: the first that a case has."""
    seen = set()
    for target in targets:
        if target.structure not in seen:
            seen.add(target.structure)
            yield target


def target_rows(fitted, case: Case) -> list[dict]:
    """For each target of a case, `box` and `click_1`, and `dice`, their mean; the column `group` is its set."""
    predictor = predictor_of(fitted)
    answer = lambda image, prompt: predictor(image, prompt).mask  # noqa: E731
    targets = first_of_each(targets_here(fitted.task, case))
    rows = mean_rows(case, targets, lambda target: every_prompt(answer, target, CLICKS))
    return [{**found, "group": case.attributes["set"]} for found in rows]


def table(rows: pd.DataFrame, column: str = "dice") -> pd.DataFrame:
    """Mean over patients of a column, a line a set and target: the survey's zero-shot table."""
    patients = rows.groupby(["group", "structure", "patient_id"])[column].mean()
    return patients.groupby(level=[0, 1]).mean().to_frame(column)


def unevenness(rows: pd.DataFrame, column: str = "dice") -> float:
    """The best set's mean minus the worst set's, each the mean over its targets."""
    sets = table(rows, column)[column].groupby(level=0).mean()
    return float(sets.max() - sets.min())


FULL = ModalitiesTask(
    "acdc",
    evaluation="test",
    counts=(5, 4, 10),
    parts=(("chest_xray", 15, 10, 15), ("bubil", 10, 5, 10), ("openkbp", 3, 2, 3)),
    balanced=True,
)
"""Heart MR, chest X-ray, microscopy and head-and-neck CT: twelve targets."""

recipe = Recipe(
    paper="sam4mis",
    title="SAM in medical imaging: zero-shot and adapted, over modalities and targets",
    claim="Over twelve targets of heart MR, chest X-ray, microscopy and CT, the adapted small SAM answers a box and a "
    "click better than the same model zero-shot.",
    arms={
        "zero-shot": Arm(ZERO_SHOT),
        "decoder": Arm(PromptedSam()),
        "everything": Arm(PromptedSam(tuned=("encoder", "prompts", "decoder"))),
    },
    compare=("everything", "zero-shot"),
    scales=scales(quick=EMBEDDED, full=FULL, steps=150),
    score=target_rows,
    components=(
        Component(
            "benchmark over modalities and targets",
            "implemented",
            "four sets, twelve targets, the same box and click for each; one slice a target and patient",
        ),
        Component("adaptation", "implemented", "the decoder, or the whole model, on all four sets at once"),
        Component(
            "unevenness",
            "implemented",
            "`table` by set and target, and the gap between the best and the worst set",
        ),
        Component("overview of the literature", "absent", "a list of papers is not code"),
    ),
)
