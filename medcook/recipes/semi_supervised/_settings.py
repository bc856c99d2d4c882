"""What every recipe of the chapter shares, so that nobody gets more than another."""

from dataclasses import replace

from medcook.methods import Supervised
from medcook.methods.semi_supervised import NARROW
from medcook.recipes.recipe import Scale
from medcook.tasks import Budget, Task

LABELLED = 3
"""Labelled patients in the recipes: the literature's 5% of acdc."""

QUICK = Scale(Task("embedded", labelled=LABELLED), Budget(steps=40, batch=8, checks=2), replicates=1)
FULL = Scale(Task("acdc", labelled=LABELLED, evaluation="test"), Budget(steps=400, batch=8, checks=4), replicates=3)

SUPERVISED = Supervised(channels=NARROW)
"""The baseline: the same network on the labels alone, for the same steps."""

SCALES = {"quick": QUICK, "full": FULL}


def scales(*arms: str) -> dict[str, Scale]:
    """`SCALES`, where `full` runs these arms alone; the others are there to be tried."""
    return {"quick": QUICK, "full": replace(FULL, arms=arms)}
