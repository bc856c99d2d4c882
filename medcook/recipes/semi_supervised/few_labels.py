"""The comparison nobody publishes: the methods of the chapter and their baselines on the same few labels.

Same network, same steps, same augmentation, same labelled batch; three draws of which patients are labelled, of which
draw 0 is the published order. The last checkpoint counts, the val-selected one is a second column. What all share
(the network's width, the steps, labels alone for half of them, what normalisation remembers) was chosen on validation
patients with the baselines; no method was tuned on its own.
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
from medcook.recipes.semi_supervised.anatomy_aware_uncertainty import AnatomyAware
from medcook.recipes.semi_supervised.bcp import BCP
from medcook.recipes.semi_supervised.c3s3 import C3S3
from medcook.recipes.semi_supervised.dsaif import DSAIF
from medcook.recipes.semi_supervised.noisy_pseudo_diffusion import LabelDiffusion
from medcook.recipes.semi_supervised.sasnet import SASNet
from medcook.recipes.semi_supervised.vessa import Vessa

COUNTS = (3, 7, 14)
BASELINES: dict[str, Method] = {
    "supervised": SUPERVISED,
    "mean teacher": MeanTeacher(),
    "cross pseudo": CrossPseudoSupervision(),
    "weak to strong": FixMatch(),
}
PAPERS: dict[str, Method] = {
    "uncertainty-aware": UncertaintyAwareMeanTeacher(),
    "bcp": BCP(),
    "dsaif": DSAIF(),
    "anatomy-aware": AnatomyAware(),
    "vessa": Vessa(),
    "diffusion": LabelDiffusion(),
    "sasnet": SASNet(),
    "c3s3": C3S3(),
}
ALL_LABELS = "all labels"

GRID = [(name, method, count) for count in COUNTS for name, method in (BASELINES | PAPERS).items()]


recipe = Recipe(
    paper="few-labels",
    title="Every semi-supervised method on the same few labels",
    claim="With three labelled patients, mean teacher beats training on the labels alone.",
    arms={ALL_LABELS: Arm(SUPERVISED, {"labelled": 70})}
    | {f"{name}, {count}": Arm(method, {"labelled": count}) for name, method, count in GRID},
    compare=("mean teacher, 3", "supervised, 3"),
    replicate="draw",
    scales={
        "quick": replace(QUICK, arms=("supervised, 3", "mean teacher, 3", "bcp, 3")),
        "full": FULL,
    },
)
