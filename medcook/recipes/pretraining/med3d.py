"""Med3D, transfer learning for 3D medical images (Chen, Ma and Zheng, arXiv 1904.00625, 2019).

Idea: nobody has a large annotated set of volumes, but many have small ones, each with other structures drawn. One
encoder E learns from all of them together; each set s has a decoder D_s of its own, so that nobody has to agree on what
is drawn. The decoders are simple, so that the encoder does the work; they are dropped, and the encoder starts the next
task. For volumes x of set s with annotations a:

    p     = D_s(E(x))     logits at a quarter of the volume's resolution
    l_c   = mean over the voxels with a = c of -log softmax(p)_c
    loss  = mean over the classes c that are there of l_c, of each set, weighted by its share of a step's volumes
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.data import IGNORE
from medcook.errors import MedcookError
from medcook.image_pool import VolumePoolTask, origin
from medcook.methods import Batch, Method, Moment, own_generator
from medcook.pretraining import encoded, nothing
from medcook.recipes.pretraining._settings import LABELLED, VOLUME_BUDGET, scales
from medcook.recipes.pretraining._volumes import VOLUME_BASELINE, VOLUME_LONGER, PretrainedOnVolumes
from medcook.recipes.recipe import Arm, Component, Recipe

WIDTH = 32
"""Feature maps of a decoder; as in the official code."""

BRAINS = VolumePoolTask(
    "embedded", labelled=LABELLED, pool=("embedded, negative", "embedded, washed out"), annotated=True
)
HEADS_AND_NECKS = VolumePoolTask("hippocampus", labelled=LABELLED, evaluation="test", pool=("openkbp",), annotated=True)


class Branch(nn.Sequential):
    """The decoder of one set: (B, inputs, *small) to logits (B, classes, *2 small)."""

    def __init__(self, inputs: int, classes: int):
        super().__init__(
            nn.ConvTranspose3d(inputs, WIDTH, 2, stride=2),
            nn.BatchNorm3d(WIDTH),
            nn.ReLU(inplace=True),
            nn.Conv3d(WIDTH, WIDTH, 3, padding=1, bias=False),
            nn.BatchNorm3d(WIDTH),
            nn.ReLU(inplace=True),
            nn.Conv3d(WIDTH, classes, 1),
        )


def coarser(labels: Tensor, size: tuple[int, ...]) -> Tensor:
    """Labels (B, *whole) uint8 on a coarser grid (B, *size): of each cell, the label at its middle."""
    return F.interpolate(labels[:, None].float(), size=size, mode="nearest-exact")[:, 0].to(torch.uint8)


def balanced(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy in which each class that the labels (B, *size) show has the same weight, however rare it is."""
    each = F.cross_entropy(logits, labels.long(), ignore_index=IGNORE, reduction="none")
    shown = [k for k in labels.unique().tolist() if k != IGNORE]
    return torch.stack([each[labels == k].mean() for k in shown]).mean() if shown else each.sum()


def astray(labels: Tensor, sets: Tensor) -> Tensor:
    """Each annotation (B, *size) goes to the next volume of the same set (B,): none stays where there are two."""
    found = labels.clone()
    for number in sets.unique():
        mine = (sets == number).nonzero()[:, 0]
        found[mine] = labels[mine.roll(1)]
    return found


@dataclass
class CoTrained(PretrainedOnVolumes):
    """Segment the structures of other sets, each with its own decoder; without annotations there is nothing to learn.

    sets        decoders: as many as a pool may have sets
    structures  the most that a set may have
    matched     False: the annotations of a set go to other volumes of it
    """

    sets: int = 2
    structures: int = 7
    matched: bool = True

    trial = BRAINS

    def pretext_parts(self, model: nn.Module, inputs: int, dims: int) -> nn.Module:
        return nn.ModuleList(Branch(self.channels[-1], self.structures + 1) for _ in range(self.sets))

    def pretext(self, nets: nn.ModuleDict, images: Batch, now: Moment) -> Tensor:
        """One pass of all volumes through the encoder; each goes on through the decoder of its set."""
        if images.raters is None:
            return nothing()
        rng = own_generator()
        seen = Method.augment(self, images, rng)
        labels, sets = seen.raters[:, 0], origin(images.groups).set
        if sets.max() >= self.sets:
            raise MedcookError(f"The pool has more sets than decoders ({self.sets}).", "Raise `sets`.")
        if not self.matched:
            labels = astray(labels, sets)
        maps, total = encoded(nets["model"], seen.images), nothing()
        for number in sets.unique().tolist():
            mine = sets == number
            logits = nets["pretext"][number](maps[mine]).float()
            share = mine.float().mean()
            total = total + share * balanced(logits, coarser(labels[mine], logits.shape[2:]))
        return total


recipe = Recipe(
    paper="med3d",
    title="Co-training on other sets' annotations, then transfer of the encoder",
    claim="Before training on volumes of three labelled patients, co-training on annotated head-and-neck CT raises "
    "Dice above that of as many steps on the labels from random weights.",
    arms={
        "from scratch": Arm(VOLUME_BASELINE),
        "scratch, all steps": Arm(VOLUME_LONGER),
        "med3d": Arm(CoTrained()),
        "mismatched annotations": Arm(CoTrained(matched=False)),
    },
    compare=("med3d", "from scratch"),
    ablation=("med3d", "mismatched annotations"),
    replicate="draw",
    scales=scales(BRAINS, HEADS_AND_NECKS, "from scratch", "med3d", "mismatched annotations", budget=VOLUME_BUDGET),
    published={
        "lungs in LIDC, 3D-ResNet50, from scratch": 0.7175,
        "lungs in LIDC, 3D-ResNet50, Med3D": 0.9331,
    },
    source="official code, github.com/Tencent/MedicalNet (README.md, model.py, train.py, models/resnet.py); abstract, "
    "arXiv 1904.00625",
    components=(
        Component(
            "co-training of one encoder",
            "implemented",
            "all volumes of a step pass through it together. It is the way down of the book's 3D U-Net, not a ResNet; "
            "the way up stays random until there are labels",
        ),
        Component(
            "a decoder for each set",
            "implemented",
            "that of the official code, at twice the resolution of the encoder's last map. At `full` only one "
            "annotated set of other volumes is at hand, so that one decoder is used; `quick` has two sets, brains as "
            "two simulated scanners show them",
        ),
        Component(
            "segmentation loss",
            "simplified",
            "cross-entropy, as in the official code, but all classes that a step shows weigh the same: organs take one "
            "voxel in 250. With plain cross-entropy, or the book's loss, 120 steps ended at background everywhere, "
            "whether annotations matched or not; now the loss on the pool falls from 2.1 to 0.92 where they match, and "
            "to 1.47 where not. With the book's loss, one run of half the steps on validation patients, of a draw that "
            "is not scored, ended at a Dice of 0.46, and 0.52 where they do not match; from scratch 0.56. With the "
            "present loss no such run was made",
        ),
        Component(
            "3DSeg-8",
            "simplified",
            "86 blocks of 32 x 56 x 40 voxels from 7 head-and-neck CTs with seven organs, in place of eight challenges "
            "in CT and MR. Organs that were not drawn for a patient read as background there, and four blocks of ten "
            "show none. Volumes are normalised as everywhere in the book",
        ),
        Component(
            "transfer",
            "implemented",
            "the encoder alone is kept. The ablation gives the same annotations to other blocks: the same volumes, "
            "loss and decoders, and nothing to learn but how often and where in a block a structure occurs",
        ),
        Component(
            "faster convergence",
            "simplified",
            "as Dice after 240 steps with labels, the same for both; an arm from scratch with 360, which `full` does "
            "not run, would show what the pretext's steps could have bought. The paper's networks train for thousands "
            "of steps",
        ),
        Component("Kinetics", "absent", "no network at hand is pre-trained on videos"),
        Component(
            "lungs, lung nodules and livers",
            "simplified",
            "two parts of the hippocampus in MR, with labels of three patients; no classification",
        ),
        Component("DenseASPP", "absent", "all arms have the book's 3D U-Net"),
    ),
)
