"""AeroPath: airways of ill lungs, found at two scales (Støverud, Bouget, Pedersen, Leira, Amundsen, Langø and Hofstad,
PLOS ONE 2024, 10.1371/journal.pone.0311416; arXiv 2311.01138).

A volume at full resolution does not fit into a network, a small one shows no thin bronchi, and a patch does not tell
whether a dark tube is an airway. So two scales are fused: one network sees all of the image x, made smaller by `SHRINK`
(S), and a second one, patch by patch at full resolution, sees a patch P and what the first one takes it for:

    overview = upsampled softmax(f_coarse(S x)),      airway(P) = f_fine(x[P], overview[P]).

The abstract names the fusion and not its layers, which are ours. What is found is judged as in ATM'22, by the part that
hangs together (`medcook.measures.trees`). The 27 CTs have a reader (`medcook.data.sets.aeropath`), and are not at hand:
airways, of which some are narrowed, widened or tortuous, are drawn into real lungs (`_airways`).
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from monai.inferers import sliding_window_inference
from scipy import ndimage
from torch import Tensor, nn

from medcook import evaluation, metrics
from medcook.data import Case
from medcook.losses import find_loss
from medcook.measures.trees import branches_detected, largest_part, tree_length_detected
from medcook.methods import Batch, Moment
from medcook.networks import UNet
from medcook.recipes.anatomy import _trees
from medcook.recipes.anatomy._airways import AirwayTask, PlantedAirways
from medcook.recipes.anatomy._planted import Planted, PlantedTrees
from medcook.recipes.anatomy._settings import BASELINE
from medcook.recipes.architectures._settings import Architecture
from medcook.recipes.recipe import Arm, Component, Recipe, Scale
from medcook.tasks import Budget

SHRINK = 2
PATCH = 48
"""Pixels of a side of what the second network sees at once; a smaller image is one patch."""


class PlantedTubes(PlantedAirways):
    """Airways whose names are left out: 1 within."""

    def plant(self, image: np.ndarray, organ: np.ndarray, rng: np.random.Generator) -> Planted:
        planted = super().plant(image, organ, rng)
        return planted._replace(label=(planted.label > 0).astype(np.uint8))


@dataclass(frozen=True)
class FindAirways(AirwayTask):
    """Airways to be found, whatever they are called."""

    painter: ClassVar[type[PlantedTrees]] = PlantedTubes
    names: ClassVar[dict[int, str]] = {1: "airways"}


class TwoScales(nn.Module):
    """Images (B, inputs, H, W) to logits (B, classes, H, W). coarse, fine: which of both networks there are."""

    def __init__(self, inputs: int, classes: int, channels: tuple[int, ...], coarse: bool, fine: bool):
        super().__init__()
        told = classes if coarse else 0
        self.coarse = UNet(inputs=inputs, classes=classes, channels=channels) if coarse else None
        self.fine = UNet(inputs=inputs + told, classes=classes, channels=channels) if fine else None

    def overview(self, images: Tensor) -> Tensor:
        """Logits (B, classes, H, W) of the network that sees everything, and small."""
        seen = self.coarse(F.avg_pool2d(images, SHRINK))
        return F.interpolate(seen.float(), images.shape[2:], mode="bilinear", align_corners=False)

    def told(self, images: Tensor) -> Tensor:
        """What patches are cut from: the images, and the overview's probabilities if there are any."""
        if self.coarse is None:
            return images
        return torch.cat([images, self.overview(images).detach().softmax(1)], dim=1)

    def forward(self, images: Tensor) -> Tensor:
        """The fused answer, patch by patch; patches overlap by half, and their logits are averaged."""
        if self.fine is None:
            return self.overview(images)
        size = tuple(min(PATCH, side) for side in images.shape[2:])
        return sliding_window_inference(self.told(images), size, len(images), self.fine, overlap=0.5).float()


def same_patches(*maps: Tensor) -> list[Tensor]:
    """A square of `PATCH` pixels of every image, at random, from the same place of maps (B, C, H, W)."""
    size = maps[0].shape[2:]
    sides = [min(PATCH, side) for side in size]
    corners = [torch.randint(whole - part + 1, (len(maps[0]),)) for whole, part in zip(size, sides, strict=True)]
    boxes = [(slice(top, top + sides[0]), slice(left, left + sides[1])) for top, left in zip(*corners, strict=True)]
    return [torch.stack([one[:, *box] for one, box in zip(each, boxes, strict=True)]) for each in maps]


@dataclass
class MultiScale(Architecture):
    """Two networks, trained together: the second learns from patches. coarse, fine: which of them there are."""

    coarse: bool = True
    fine: bool = True

    def model(self, inputs: int, classes: int) -> TwoScales:
        return TwoScales(inputs, classes, self.channels, self.coarse, self.fine)

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        """The sum of both networks' losses; the second does not teach the first."""
        model, loss, images = nets["model"], find_loss(self.loss), labelled.images
        if not self.coarse:
            told, total = images, 0.0
        else:
            seen = model.overview(images)
            told, total = torch.cat([images, seen.detach().softmax(1)], dim=1), loss(seen, labelled.labels)
        if self.fine:
            patches, labels = same_patches(told, labelled.labels[:, None])
            total = total + loss(model.fine(patches).float(), labels[:, 0])
        return total


def airway_rows(fitted, case: Case) -> list[dict]:
    """A row for each image of a case, by the centre lines along which the airways were drawn.

    length, branches   of the true tree that the largest part of the answer holds, as in ATM'22
    precision, dice    of the whole answer;  parts: how many it has, which touch not even by corners;  whole: 1 where
                       there is one
    ill                1 where airways are narrowed, widened or tortuous
    """
    rows, answers = [], fitted.answer(fitted.task.preparation.images(case))
    for number, (planted, answer) in enumerate(zip(fitted.task.preparation.planted(case), answers, strict=True), 1):
        guess, truth = answer.argmax(0).numpy() > 0, planted.label > 0
        if not truth.any():
            continue
        branches, reached = _trees.lines(planted.trees["airways"], truth.shape), largest_part(guess, corners=True)
        parts = ndimage.label(guess, np.ones((3, 3)))[1]
        values = {
            "length": tree_length_detected(branches > 0, reached),
            "branches": branches_detected(branches, reached),
            "precision": float(truth[guess].mean()) if guess.any() else np.nan,
            "dice": metrics.dice(guess, truth),
            "parts": float(parts),
            "whole": float(parts == 1),
            "ill": float(planted.state != "healthy"),
        }
        rows.append(evaluation.row(case, f"airways {number}", **values))
    return rows


recipe = Recipe(
    paper="aeropath",
    title="AeroPath: airways at two scales",
    claim="Patches at full resolution that are told what a smaller image shows find more of the length of the airways, "
    "in one part that hangs together, than a U-Net.",
    arms={
        "unet": Arm(BASELINE),
        "two scales": Arm(MultiScale()),
        "patches alone": Arm(MultiScale(coarse=False)),
        "small images alone": Arm(MultiScale(fine=False)),
    },
    compare=("two scales", "unet"),
    ablation=("two scales", "patches alone"),
    metric="length",
    score=airway_rows,
    scales={
        "quick": Scale(FindAirways("embedded", side=64), Budget(steps=20, batch=4, checks=0), replicates=1),
        "full": Scale(
            FindAirways("chest_xray", evaluation="test"),
            Budget(steps=400, batch=8, checks=0),
            arms=("unet", "two scales", "patches alone"),
        ),
    },
    source="abstract; the layers are not in it, and the authors' repository, github.com/raidionics/AeroPath, runs a "
    "finished model",
    components=(
        Component(
            "multiscale fusion",
            "simplified",
            "our reading: what a network takes of the image at half its size goes, as further channels, into one that "
            "sees patches of 48 x 48 pixels at full size. Two U-Nets of the chapter, in two dimensions",
        ),
        Component("patches at full resolution", "implemented", "overlapping by half, their logits averaged"),
        Component(
            "measures of ATM'22",
            "implemented",
            "tree length and branches detected, precision. Of the centre lines that were drawn, and of the answer's "
            "largest part, as nobody can reach the others",
        ),
        Component(
            "topologically correct",
            "implemented",
            "column `whole`: the answer hangs together; `parts`: how many parts it has",
        ),
        Component(
            "severe pathology",
            "simplified",
            "half of the trees are narrowed, widened or tortuous (column `ill`), in training, too; there models learn "
            "from ATM'22, in which few are ill, and are tested on patients with tumours and emphysema",
        ),
        Component("competing open methods", "absent", "a U-Net that sees whole images stands for them"),
        Component("web application", "absent", "chapters are notebooks"),
    ),
)
