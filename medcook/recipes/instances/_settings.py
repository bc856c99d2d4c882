"""What every recipe of the chapter shares, so that nobody gets more than another."""

from dataclasses import replace

from medcook.data.transforms import Augment
from medcook.recipes.instances._glass import CROWDED, Manner
from medcook.recipes.instances._slides import CrowdTask, SlideTask
from medcook.recipes.recipe import Scale
from medcook.tasks import Budget, Task

SLIDES = SlideTask("acdc", evaluation="test")
SLIDES_QUICK = SlideTask("embedded", side=48, piece=24, versions=2, manner=Manner(most=3, marks=2))

CROWDS = CrowdTask("acdc", evaluation="test", piece=56)
CROWDS_QUICK = CrowdTask("embedded", side=48, piece=24, versions=2, manner=replace(CROWDED, least=2, most=3))

AUGMENT = Augment(rotate=180, scale=0.1, shift=0.1, gamma=0.2, contrast=0.2, brightness=0.2, noise=0.1, flip=True)
"""On a slide there is no up."""
CHANNELS = (12, 24, 48, 96, 96)
LITTLE = Budget(steps=30, batch=6, precision="float32", checks=0)


def scales(quick: Task, full: Task, budget: Budget, *arms: str) -> dict[str, Scale]:
    """{profile: Scale}; `full` has three replicates, and runs these arms alone if any are named."""
    return {"quick": Scale(quick, LITTLE, replicates=1), "full": Scale(full, budget, arms=arms or None)}
