"""What every recipe of the chapter shares, so that nobody gets more than another."""

from medcook.methods import Supervised
from medcook.recipes.recipe import Scale
from medcook.tasks import Budget, Task

CHANNELS = (8, 16, 32, 64, 64)
"""Half the widths of chapter 02, as in chapters 04 and 08."""

BASELINE = Supervised(channels=CHANNELS)

BUDGET = Budget(steps=400, batch=8, checks=4)
"""A minute for the U-Net on one core."""


def scales(quick: Task, full: Task, *arms: str, steps: int = BUDGET.steps) -> dict[str, Scale]:
    """{profile: Scale}; `full` has three replicates of `steps` steps, and runs these arms alone if any are named."""
    budget = Budget(steps=steps, batch=BUDGET.batch, checks=BUDGET.checks)
    return {
        "quick": Scale(quick, Budget(steps=30, batch=6, checks=2), replicates=1),
        "full": Scale(full, budget, arms=arms or None),
    }
