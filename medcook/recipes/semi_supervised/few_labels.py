"""The comparison nobody publishes: every method of the chapter and its baselines at 3, 7 and 14 labelled patients.

Same network, same steps, same augmentation, same labelled batch, no tuning of any; three draws of which patients are
labelled, of which draw 0 is the published order. The last checkpoint counts, the val-selected one is a second column.
"""

from dataclasses import replace

from medcook.methods import (
    CrossPseudoSupervision,
    FixMatch,
    MeanTeacher,
    Method,
    UncertaintyAwareMeanTeacher,
)
from medcook.recipes.recipe import Arm, Recipe
from medcook.recipes.semi_supervised._settings import FULL, QUICK, SUPERVISED
from medcook.recipes.semi_supervised.bcp import BCP

COUNTS = (3, 7, 14)
METHODS: dict[str, Method] = {
    "supervised": SUPERVISED,
    "mean teacher": MeanTeacher(),
    "uncertainty-aware": UncertaintyAwareMeanTeacher(),
    "cross pseudo": CrossPseudoSupervision(),
    "weak to strong": FixMatch(),
    "bcp": BCP(),
}
ALL_LABELS = "all labels"


def arm_name(method: str, count: int) -> str:
    """`bcp, 7`: a method at a number of labelled patients."""
    return f"{method}, {count}"


recipe = Recipe(
    paper="few-labels",
    title="Every semi-supervised method on the same few labels",
    claim="With three labelled patients, mean teacher beats training on the labels alone.",
    arms={ALL_LABELS: Arm(SUPERVISED, {"labelled": 70})}
    | {arm_name(name, count): Arm(method, {"labelled": count}) for count in COUNTS for name, method in METHODS.items()},
    compare=("mean teacher, 3", "supervised, 3"),
    replicate="draw",
    scales={
        "quick": replace(QUICK, arms=("supervised, 3", "mean teacher, 3", "bcp, 3")),
        "full": FULL,
    },
)
