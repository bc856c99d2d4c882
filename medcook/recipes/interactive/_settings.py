"""What every recipe of the chapter shares, so that nobody gets more than another."""

from medcook.data.transforms import Augment
from medcook.interactive import Guided, InteractiveTask
from medcook.recipes.baseline.unet_hippocampus import MILD
from medcook.recipes.recipe import Scale
from medcook.tasks import Budget

CHANNELS = (8, 16, 32, 64, 64)
"""Half the widths of chapter 02, as in chapters 04 and 08."""
DEEP_CHANNELS = (8, 16, 32, 64)
"""Of volumes, as in chapter 09."""

BASELINE = Guided(channels=CHANNELS)
"""A U-Net with clicks and its last answer as further channels."""

BUDGET = Budget(steps=250, batch=6, checks=0)
"""A minute for two answers a step on one core. Validation Dice without clicks would say nothing: there is none."""
DEEP_BUDGET = Budget(steps=120, batch=4, checks=0)

HEARTS = InteractiveTask("acdc", folds=10)
HIPPOCAMPI = InteractiveTask("hippocampus", folds=10, volumes=True)
VOLUME_AUGMENTATION: Augment = MILD


def scales(full: InteractiveTask, *arms: str, budget: Budget = BUDGET, volumes: bool = False) -> dict[str, Scale]:
    """{profile: Scale}; `full` has three of ten folds, and runs these arms alone if any are named."""
    hidden = full.hidden and (max(full.hidden),)
    quick = InteractiveTask("embedded", volumes=volumes, hidden=hidden, asked=full.asked)
    few = Budget(steps=30, batch=4, precision="float32" if volumes else "auto", checks=0)
    return {
        "quick": Scale(quick, few, replicates=1),
        "full": Scale(full, budget, arms=arms or None),
    }
