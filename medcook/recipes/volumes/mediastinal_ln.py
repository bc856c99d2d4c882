"""Fusing slabs and whole volumes, with anatomical priors (Bouget, Pedersen, Vanel, Leira and Langø, 2022).

Computer Methods in Biomechanics and Biomedical Engineering: Imaging & Visualization, doi 10.1080/21681163.2022.2043778;
arXiv 2102.06515. A CT volume is too large for a network. One network may see slabs of it in full detail, another all of
it at lower resolution; what one misses the other may find, so that their predictions are fused. And where a structure
looks like its neighbours, a mask of these, as a further input channel, says what it is not.

The paper segments lymph nodes; here it is organs that hardly differ from their surroundings: brainstem and parotids.
The budget was chosen with the patients of fold 1 in view, whom evidence scores as well.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor, nn

from medcook.data import Case
from medcook.data.transforms import warp
from medcook.evaluation import score_case
from medcook.losses import find_loss
from medcook.methods import Batch, Moment
from medcook.networks.unet import UNet
from medcook.recipes.recipe import Arm, Component, Recipe, Scale
from medcook.recipes.volumes._head_and_neck import BUDGET, EMBEDDED, FocusTask
from medcook.recipes.volumes._settings import QUICK, VolumeNetwork

SMALLEST = 8
"""No side is halved below this, which the network needs."""

View = Literal["slabs", "whole"]


def halved(volume: Tensor) -> Tensor:
    """(B, C, *size) with every side averaged to its half, where half of it is enough for the network."""
    steps = [2 if side >= 2 * SMALLEST else 1 for side in volume.shape[2:]]
    return F.avg_pool3d(volume, steps, steps, ceil_mode=True)


def from_whole(network: nn.Module, images: Tensor) -> Tensor:
    """Logits (B, classes, *size) of a network that sees all of the volume (B, C, *size), at half its resolution."""
    return F.interpolate(network(halved(images)), size=images.shape[2:], mode="trilinear", align_corners=False)


def random_slabs(images: Tensor, labels: Tensor, thickness: int) -> tuple[Tensor, Tensor]:
    """`thickness` neighbouring slices (last axis) of each volume (B, C, *size) and of its labels (B, *size)."""
    depth = images.shape[-1]
    thickness = min(thickness, depth)
    starts = torch.randint(0, depth - thickness + 1, (len(images),)).tolist()
    cut = [slice(start, start + thickness) for start in starts]
    return (
        torch.stack([image[..., part] for image, part in zip(images, cut, strict=True)]),
        torch.stack([label[..., part] for label, part in zip(labels, cut, strict=True)]),
    )


def from_slabs(network: nn.Module, images: Tensor, thickness: int, stride: int) -> Tensor:
    """Logits (B, classes, *size) of a network that sees slabs: the middle `stride` slices of each, one after the other.

    With a stride of 1 every slice is predicted by the slab around it; with `thickness`, slabs do not overlap. Beyond
    its ends the volume repeats its last slice.
    """
    depth, margin = images.shape[-1], (thickness - stride) // 2
    starts = range(0, depth, stride)
    padded = F.pad(images, (margin, starts[-1] + thickness - margin - depth, 0, 0, 0, 0), mode="replicate")
    middle = slice(margin, margin + stride)
    parts = [network(padded[..., start : start + thickness])[..., middle] for start in starts]
    return torch.cat(parts, dim=-1)[..., :depth]


def fused(probabilities: Tensor, fusion: str) -> Tensor:
    """Predictions (networks, B, classes, *size) as one, (B, classes, *size): their mean, or of each structure the most.

    The maximum finds what any network finds; the background gets what structures leave, and the sum is 1 again.
    """
    if fusion == "mean":
        return probabilities.mean(0)
    structures = probabilities[:, :, 1:].amax(0)
    both = torch.cat([(1 - structures.sum(1, keepdim=True)).clamp_min(0), structures], dim=1)
    return both / both.sum(1, keepdim=True)


def detection(prediction: np.ndarray, truth: np.ndarray) -> tuple[float, int]:
    """(recall, false positives) over connected parts, corners count: true ones touched, predicted ones touching none.

    The recall is NaN where there is nothing to find.
    """
    corners = np.ones([3] * truth.ndim)
    (true, there), (found, _) = (ndimage.label(mask, corners) for mask in (truth, prediction))
    touched = np.unique(true[prediction & truth])
    wrong = np.setdiff1d(found, [0, *np.unique(found[truth])])
    return len(touched) / there if there else np.nan, len(wrong)


@dataclass
class Views(VolumeNetwork):
    """One network for each view of the volume, each trained on its own; their predictions are fused.

    views              what the networks see: `slabs` of it in full detail, or the `whole` of it at half the resolution
    priors             a mask of other organs, the images' second channel, is seen too; a missing one is empty
    thickness, stride  slices of a slab, and those of them that it predicts
    fusion             `mean` or `maximum` of the probabilities
    """

    views: tuple[View, ...] = ("slabs", "whole")
    priors: bool = False
    thickness: int = 16
    stride: int = 4
    fusion: Literal["mean", "maximum"] = "mean"

    def model(self, inputs: int, classes: int) -> nn.ModuleList:
        """The U-Nets of the views, in order; their input is an image, and the mask with `priors`."""
        return nn.ModuleList(
            UNet(inputs=1 + self.priors, classes=classes, channels=self.channels, dims=3) for _ in self.views
        )

    def augment(self, batch: Batch, rng: torch.Generator) -> Batch:
        """The mask moves with the image; its values stay."""
        images, labels = warp(batch.images, batch.labels, self.augmentation.grid(batch.images, rng))
        seen = self.augmentation.intensity(images[:, :1], rng)
        return batch._replace(images=torch.cat([seen, images[:, 1:]], dim=1), labels=labels)

    def inputs(self, images: Tensor) -> Tensor:
        """What the networks see of images (B, 1 or 2, *size)."""
        if not self.priors:
            return images[:, :1]
        return images if images.shape[1] == 2 else torch.cat([images, torch.zeros_like(images)], dim=1)

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        """The sum of the networks' losses: each has its own."""
        images, loss = self.inputs(labelled.images), find_loss(self.loss)
        losses = []
        for view, network in zip(self.views, nets["model"], strict=True):
            if view == "slabs":
                seen, labels = random_slabs(images, labelled.labels, self.thickness)
                losses.append(loss(network(seen).float(), labels))
            else:
                losses.append(loss(from_whole(network, images).float(), labelled.labels))
        return sum(losses)

    def predict(self, nets: nn.ModuleDict, images: Tensor) -> Tensor:
        images = self.inputs(images)
        logits = [
            from_slabs(network, images, self.thickness, self.stride) if view == "slabs" else from_whole(network, images)
            for view, network in zip(self.views, nets["average"], strict=True)
        ]
        return fused(torch.stack(logits).float().softmax(2), self.fusion)


def organ_rows(fitted, case: Case) -> list[dict]:
    """The usual rows of a case, each with the recall and the false positives of its structure."""
    prediction, structures = fitted.predict(case), fitted.task.structures
    values = {name: value for value, name in structures.items()}
    rows = score_case(prediction, case, structures)
    for row in rows:
        value = values[row["structure"]]
        recall, wrong = detection(prediction == value, case.label == value)
        row |= {"recall": recall, "false_positives": float(wrong)}
    return rows


recipe = Recipe(
    paper="mediastinal-ln",
    title="Slabs and whole volumes, fused",
    claim="Fusing a network for slabs and one for the shrunken volume raises Dice over either of them alone.",
    arms={
        "whole volume": Arm(Views(views=("whole",))),
        "slabs": Arm(Views(views=("slabs",))),
        "ensemble": Arm(Views()),
        "ensemble with priors": Arm(Views(priors=True)),
        "ensemble by maximum": Arm(Views(fusion="maximum")),
        "two of whole volumes": Arm(Views(views=("whole", "whole"))),
    },
    compare=("ensemble", "whole volume"),
    ablation=("ensemble", "slabs"),
    replicate="fold",
    scales={
        "quick": Scale(EMBEDDED, QUICK.budget, replicates=1),
        "full": Scale(FocusTask("openkbp"), BUDGET, arms=("whole volume", "slabs", "ensemble", "ensemble with priors")),
    },
    score=organ_rows,
    published={
        "nodes of at least 10 mm, patient-wise recall": 0.92,
        "nodes of at least 10 mm, false positives per patient": 5,
        "nodes of at least 10 mm, Dice": 0.805,
    },
    source="the abstract; 120 CTs, five-fold",
    components=(
        Component(
            "slabs",
            "implemented",
            "16 of 72 slices (the paper's: 32), which overlap: each predicts the 4 in its middle (in the authors' code "
            "1, or all of them)",
        ),
        Component(
            "whole volume",
            "implemented",
            "at half the resolution, by the baseline's U-Net with the baseline's widths; the authors' network has "
            "attention gates",
        ),
        Component(
            "ensemble",
            "implemented",
            "the mean of both; the authors' code takes the maximum at each voxel, which is an arm that only quick runs",
        ),
        Component(
            "anatomical priors",
            "implemented",
            "one mask of four other organs: spinal cord, esophagus, larynx and mandible as experts drew them, in "
            "training and in prediction (the authors' mask, also given: esophagus, azygos vein, subclavian arteries "
            "and brachiocephalic veins); both networks see it (of the authors' models, that of whole volumes)",
        ),
        Component(
            "detection",
            "implemented",
            "recall and false positives over connected parts; here every organ is one part, so that false positives "
            "tell more than recall",
        ),
        Component("lymph nodes", "absent", "organs of head and neck; CTs of lung cancer are not at hand"),
        Component("short axis and stations", "absent", "organs have neither"),
    ),
)
