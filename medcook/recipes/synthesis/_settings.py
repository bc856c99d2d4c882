"""What every recipe of the chapter shares, so that nobody gets more than another."""

from medcook.methods.semi_supervised import NARROW
from medcook.projections import ProjectionTask
from medcook.recipes.recipe import Scale
from medcook.synthesis import RealOnly, SmallPoolTask
from medcook.tasks import Budget, Task

CHANNELS = NARROW
"""Of segmenters: half the widths of chapter 02, as in chapters 04, 08 and 13."""

LABELLED = 3
"""Patients with labels: the literature's 5% of acdc."""

BASELINE = RealOnly()
"""The segmenter with as many steps as others, all on real pairs."""

LONGER = RealOnly(share=0.0)
"""The same, with the generator's steps on the real pairs, too."""

BUDGET = Budget(steps=900, batch=8, checks=3)
"""Of everything together: 524 steps of a generator, 16 of making, 360 of the segmenter."""

XRAY_BUDGET = Budget(steps=600, batch=8, checks=3)

HEARTS = SmallPoolTask("acdc", labelled=LABELLED, evaluation="test", pool=("acdc",))
BRAINS = SmallPoolTask("embedded", labelled=LABELLED, pool=("embedded",))
NECKS = ProjectionTask("openkbp", fold=0, folds=3)
"""X-rays from CT: six patients train, three are held out, in each of three folds."""
HEADS = ProjectionTask("embedded", fold=0)


def scales(quick: Task, full: Task, *arms: str, budget: Budget = BUDGET) -> dict[str, Scale]:
    """{profile: Scale}; `full` has three replicates, and runs these arms alone if any are named."""
    small = Budget(steps=40, batch=min(6, budget.batch), precision="float32", checks=2)
    return {"quick": Scale(quick, small, replicates=1), "full": Scale(full, budget, arms=arms or None)}


__all__ = ["BASELINE", "BRAINS", "BUDGET", "CHANNELS", "HEADS", "HEARTS", "LABELLED", "LONGER", "NECKS", "XRAY_BUDGET"]
__all__ += ["scales"]
