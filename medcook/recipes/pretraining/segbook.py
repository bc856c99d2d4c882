"""SegBook: A Simple Baseline and Cookbook for Volumetric Medical Image Segmentation.

Ye et al., arXiv 2411.14525, 2024. Annotated volumes are mostly CT: when does a network that was trained on organs in CT
help elsewhere? One network, STU-Net, in several sizes, is trained on full-body CT and then fine-tuned on 87 sets, which
differ in modality, in target and in how many patients they have; beside it stands the same network from random weights.
Gains were larger on small and on large sets than on those between.

  pre-trained  theta_0 = argmin over theta, phi of L(h_phi(g_theta(x)), a) on CT x with organs a, h the last layer
  fine-tuned   from theta_0 and a new last layer, on the target's labels; all weights learn
  scratch      from random weights, for as many steps on the labels
  gain(n)      Dice of the one minus Dice of the other, with labels of n patients

Here CT is of heads and necks, the target is the hippocampus in MR, and one set serves as a small, a medium and a large
one by how many of its patients have labels. Nothing was looked at on any patients before the evaluation. In one
of the three draws, no arm learned to find the posterior part in so few steps.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import pandas as pd
from torch import Tensor, nn

from medcook import pooled
from medcook.data.transforms import Augment
from medcook.errors import MedcookError
from medcook.methods import Batch, Method, Moment, own_generator
from medcook.pretraining import OptionalPretext, nothing
from medcook.recipes.baseline.unet_hippocampus import MILD
from medcook.recipes.pretraining._settings import VOLUME_BUDGET, scales
from medcook.recipes.pretraining._volumes import SHARE
from medcook.recipes.pretraining.med3d import BRAINS, HEADS_AND_NECKS, balanced
from medcook.recipes.recipe import Arm, Component, Recipe, Scale
from medcook.recipes.volumes.stu_net import LARGE, SMALL, STUNet, transfer

SIZES = {"few": 3, "some": 24, "all": None}
"""How many patients of the target have labels; None: all 182 that there are for training."""


@dataclass
class FineTuned(OptionalPretext):
    """STU-Net, trained on other sets' organs and then on the labels, or on these alone.

    depth       residual blocks in each stage;   channels  of the stages: together the scale of the network
    structures  the most that a set of the pool may have
    """

    channels: tuple[int, ...] = SMALL
    depth: int = 1
    share: float = SHARE
    augmentation: Augment = field(default_factory=lambda: MILD)
    structures: int = 7

    axes = 3
    trial = BRAINS

    def model(self, inputs: int, classes: int, dims: int) -> STUNet:
        if dims != 3:
            raise MedcookError("STU-Net is for volumes.", "Take a data set of volumes.")
        return STUNet(inputs=inputs, classes=classes, channels=self.channels, depth=self.depth)

    def pretext_parts(self, model: nn.Module, inputs: int, dims: int) -> STUNet:
        """The network that learns the organs; its weights start the other one."""
        return self.model(inputs, self.structures + 1, dims)

    def pretext(self, nets: nn.ModuleDict, images: Batch, now: Moment) -> Tensor:
        """Without annotations in the pool there is nothing to learn."""
        if images.raters is None:
            return nothing()
        seen = Method.augment(self, images, own_generator())
        return balanced(nets["pretext"](seen.images).float(), seen.raters[:, 0])

    def after_pretext(self, nets: nn.ModuleDict, now: Moment) -> None:
        """With its last step all weights but the last layer's go over."""
        if now.step + 1 == now.steps:
            for name in ("model", "average"):
                transfer(nets["pretext"], nets[name])


def pairs(method: FineTuned, before: str = "") -> dict[str, Arm]:
    """With each number of labels, a network from organs and one from random weights."""
    starts = {f"{before}pre-trained": method, f"{before}scratch": replace(method, waits=True)}
    return {
        f"{name}, {size}": Arm(start, {"labelled": SIZES[size]}) for size in SIZES for name, start in starts.items()
    }


def gains(tables: Mapping[str, pd.DataFrame], metric: str = "dice") -> dict[str, float]:
    """What pre-training gained with each number of labels, of the arms' tables that there are."""
    found = {}
    for size in SIZES:
        names = [f"{start}, {size}" for start in ("pre-trained", "scratch")]
        if set(names) <= set(tables):
            one, other = (pooled.value(tables[name], metric) for name in names)
            found[size] = one - other
    return found


FULL_ARMS = ("pre-trained, few", "scratch, few", "pre-trained, all", "scratch, all")


def both_scales() -> dict[str, Scale]:
    """Fewer steps than the chapter's, since these networks are dearer; the same arms at `quick`."""
    found = scales(BRAINS, HEADS_AND_NECKS, *FULL_ARMS, budget=replace(VOLUME_BUDGET, steps=216, checks=0))
    return found | {"quick": replace(found["quick"], arms=FULL_ARMS)}


recipe = Recipe(
    paper="segbook",
    title="Organs in CT before the target, by how many of its patients have labels",
    claim="Training on organs in head-and-neck CT first raises STU-Net's Dice on hippocampi in MR with labels of three "
    "patients above that from random weights, in as many steps on the labels.",
    arms=pairs(FineTuned()) | pairs(FineTuned(channels=LARGE, depth=2), "larger, "),
    compare=("pre-trained, few", "scratch, few"),
    replicate="draw",
    scales=both_scales(),
    published={
        "hippocampus, 208 patients, STU-Net-B": 0.8892,
        "hippocampus, 208 patients, STU-Net-B, pre-trained": 0.8896,
        "hippocampus, 208 patients, STU-Net-H": 0.8935,
        "hippocampus, 208 patients, STU-Net-H, pre-trained": 0.8919,
        "hearts in MR (ACDC), 160 volumes, STU-Net-B": 0.9206,
        "hearts in MR (ACDC), 160 volumes, STU-Net-B, pre-trained": 0.9255,
    },
    source="abstract; figures: results of 61 sets in the authors' repository, github.com/uni-medical/SegBook "
    "(static/data/dataset_result.csv)",
    components=(
        Component(
            "supervised pre-training on CT",
            "simplified",
            "7 head-and-neck CTs with seven organs, in 86 blocks of the target's grid, and 72 steps, where the paper "
            "has 1204 CTs of the body with 104 structures. All classes that a step shows weigh the same, as in Med3D's "
            "recipe: organs take one voxel in 250. An organ that was not drawn for a patient reads as background there",
        ),
        Component(
            "fine-tuning",
            "implemented",
            "all weights but the last layer's go over, by STU-Net's own `transfer`, and all of them learn. There are "
            "144 steps on the labels, with an optimiser of its own and the same for both",
        ),
        Component(
            "sizes of the target set",
            "simplified",
            "3, 24 or all 182 training patients of one set have labels, where the paper compares sets of different "
            "sizes, which differ in all else, too. `full` runs the smallest and the largest, so that a bottleneck in "
            "between is not looked for; the claim is about the smallest. `gains` gives the differences",
        ),
        Component("transfer to other modalities", "simplified", "from CT to one target in MR"),
        Component(
            "multiple model scales",
            "simplified",
            "two steps apart in depth and width, 0.08 and 0.70 million weights, for three of 58 million to 1.46 "
            "billion. `full` runs the smaller",
        ),
        Component("structures and lesions", "absent", "the target has no lesions"),
        Component("87 data sets", "absent", "one, in three sizes"),
        Component(
            "training of nnU-Net", "absent", "the book's optimiser, loss and augmentation, as for every arm; no patches"
        ),
    ),
)
