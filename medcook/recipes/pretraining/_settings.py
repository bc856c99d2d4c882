"""What every recipe of the chapter shares, so that nobody gets more than another."""

from medcook.image_pool import PoolTask, VolumePoolTask
from medcook.methods.semi_supervised import NARROW
from medcook.pretraining import FromScratch
from medcook.recipes.recipe import Scale
from medcook.recipes.volumes._settings import CHANNELS as VOLUME_CHANNELS
from medcook.tasks import Budget, Task

CHANNELS = NARROW
"""Half the widths of chapter 02, as in chapters 04 and 08."""

LABELLED = 3
"""Patients with labels: the literature's 5% of acdc."""

BASELINE = FromScratch()
"""The same network from random weights, with as many steps on the labels as those that a pretext prepared."""

LONGER = FromScratch(share=0.0)
"""The same, with the pretext's steps on the labels, too: as many steps as anybody has."""

BUDGET = Budget(steps=600, batch=8, checks=4)
"""The steps of both phases together, half of them with labels. Of volumes see `VOLUME_BUDGET`."""

VOLUME_BUDGET = Budget(steps=360, batch=4, checks=3)
"""A third of the steps without labels: with 120 on labels, networks of volumes are far from trained, and one lucky to
have found both structures is ahead."""

HEARTS = PoolTask("acdc", labelled=LABELLED, evaluation="test", pool=("acdc",))
HIPPOCAMPI = VolumePoolTask("hippocampus", labelled=LABELLED, evaluation="test", pool=("hippocampus",))
BRAINS = PoolTask("embedded", labelled=LABELLED, pool=("embedded",))
BRAIN_VOLUMES = VolumePoolTask("embedded", labelled=LABELLED, pool=("embedded",))


def scales(quick: Task, full: Task, *arms: str, budget: Budget = BUDGET) -> dict[str, Scale]:
    """{profile: Scale}; `full` has three replicates, and runs these arms alone if any are named."""
    small = Budget(steps=30, batch=min(6, budget.batch), precision="float32", checks=2)
    return {"quick": Scale(quick, small, replicates=1), "full": Scale(full, budget, arms=arms or None)}


__all__ = ["BASELINE", "BRAINS", "BRAIN_VOLUMES", "BUDGET", "CHANNELS", "HEARTS", "HIPPOCAMPI", "LONGER"]
__all__ += ["VOLUME_BUDGET", "VOLUME_CHANNELS", "scales"]
