"""Saliency-guided segmentation, SDL-Seg (Kazemimoghadam, Chi, Rahimi, Kim, Alluri, Nwachukwu, Lu and Gu, Physics in
Medicine and Biology 2021; arXiv 2105.02771).

A surgeon leaves a few markers where a tumour was; they show on the planning CT where contrast shows little, and people
who delineate the tumour bed go by them. The network does too: the markers' places become a map of saliency, a Gaussian
of the distance to the nearest marker, and this map is a further channel of a U-Net's input. It is high where the target
must be near, so that what lies far from all markers is left out.

No set with surgical markers is at hand. Here a structure whose border shows no contrast either, the anterior part of
the hippocampus (it ends by convention where the posterior part begins), gets simulated markers near its border.
"""

import zlib
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from medcook import metrics
from medcook.data import IGNORE, Case
from medcook.data.transforms import Augment
from medcook.evaluation import row
from medcook.interactive import MEANT, Guided, gaussians, no_marks, random_pixels
from medcook.methods import Batch, Moment
from medcook.precision import autocast
from medcook.recipes.interactive._settings import DEEP_CHANNELS, HIPPOCAMPI, VOLUME_AUGMENTATION, scales
from medcook.recipes.recipe import Arm, Component, Recipe
from medcook.sampling import trained
from medcook.tasks import Budget

BUDGET = Budget(steps=150, batch=4, checks=0)
"""As many steps as in chapter 09, of one answer each: about a minute on one core."""


def on_border(masks: Tensor) -> Tensor:
    """(B, *size) bool: the voxels of masks (B, *size) with a face neighbour outside, see `medcook.metrics.surface`."""
    return torch.from_numpy(np.stack([metrics.surface(mask) for mask in masks.cpu().numpy()])).to(masks.device)


def misplaced(marks: Tensor, jitter: float) -> Tensor:
    """Marks (B, *size), each moved along every axis by a Gaussian of `jitter` voxels, but not out of the image."""
    places = marks.nonzero()
    last = torch.tensor(marks.shape[1:], device=marks.device) - 1
    shift = (torch.randn(len(places), len(last)) * jitter).round().long().to(marks.device)
    places[:, 1:] = (places[:, 1:] + shift).clamp_min(0).minimum(last)
    moved = torch.zeros_like(marks)
    moved[tuple(places.T)] = True
    return moved


@dataclass
class Saliency(Guided):
    """A U-Net of one structure that sees a map of the markers beside the image, and answers once.

    structure   the label value that is delineated; all others are background
    markers     how many there are, at random on the border of the structure; `jitter`: by how many voxels they are off
    map         what the network sees of them: `saliency`, the Gaussian of their distance; `dots`, the marked voxels
                alone; `none`, nothing, which is a plain U-Net
    """

    channels: tuple[int, ...] = DEEP_CHANNELS
    augmentation: Augment = field(default_factory=lambda: VOLUME_AUGMENTATION)
    structure: int = 1
    markers: int = 5
    jitter: float = 1.0
    map: Literal["saliency", "dots", "none"] = "saliency"

    @property
    def guides(self) -> int:
        """Channels of `guidance`."""
        return int(self.map != "none")

    def guidance(self, marks: Tensor, before: Tensor | None) -> Tensor:
        """(B, guides, *size) float32 of the markers."""
        markers = marks[:, [MEANT]]
        if self.map == "saliency":
            return gaussians(markers, self.sigma)
        return markers[:, : self.guides].float()

    def first(self, truth: Tensor) -> Tensor:
        """Marks (B, 2, *size): the markers of masks (B, *size)."""
        marks = no_marks(truth)
        marks[:, MEANT] = misplaced(random_pixels(on_border(truth), self.markers), self.jitter)
        return marks

    def target(self, labels: Tensor) -> Tensor:
        """(B, *size) uint8 of labels: 1 for the structure, 0 for all else, `IGNORE` where nothing is known."""
        return torch.where(labels == IGNORE, labels, (labels == self.structure).to(labels.dtype))

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        """The loss of one answer, to markers that are drawn anew."""
        target = self.target(labelled.labels)
        logits = self.respond(nets["model"], labelled.images, self.first(target == 1), None)
        return self.answer_loss(logits, target)

    def delineate(self, nets: nn.ModuleDict, images: Tensor, marks: Tensor) -> Tensor:
        """Probabilities (B, 2, *size) of all else and of the structure, given marks (B, 2, *size)."""
        return self.respond(nets["average"], images, marks, None).float().softmax(1)

    def predict(self, nets: nn.ModuleDict, images: Tensor) -> Tensor:
        """Class probabilities (B, classes, *size) without markers; other structures than the own have none."""
        probability = self.delineate(nets, images, no_marks(images[:, 0]))
        found = torch.zeros(len(images), nets["average"].classes, *images.shape[2:], device=images.device)
        found[:, 0], found[:, self.structure] = probability[:, 0], probability[:, 1]
        return found


@torch.no_grad()
def marker_rows(fitted, case: Case) -> list[dict]:
    """Dice and the surfaces' distances (in mm where the spacing is known) of the structure, on the case's own grid.

    The markers are drawn from the case's name, so that all arms have the same; a case without the structure has no row.
    """
    trained(fitted)
    method, preparation = fitted.method, fitted.task.preparation
    images, truth = preparation.images(case), preparation.labels(case) == method.structure
    if not truth.any():
        return []
    with torch.random.fork_rng():
        torch.manual_seed(zlib.crc32(case.case_id.encode()))
        marks = method.first(truth)
    with autocast(fitted.cost):
        probability = method.delineate(fitted.nets, images, marks)
    answer = preparation.restore(probability, case).argmax(0).numpy()
    found = metrics.score(answer == 1, case.label == method.structure, case.spacing)
    values = {name: getattr(found, name) for name in ("dice", "hd95", "assd", "missed")}
    return [row(case, fitted.task.structures[method.structure], **values)]


recipe = Recipe(
    paper="sdl-seg",
    title="Markers as a map of saliency",
    claim="With a Gaussian of the distance to five markers as a second channel, a U-Net reaches a higher Dice on "
    "anterior hippocampi than one that sees the image alone.",
    arms={
        "unet": Arm(Saliency(map="none")),
        "sdl-seg": Arm(Saliency()),
        "without distances": Arm(Saliency(map="dots")),
        "markers far off": Arm(Saliency(jitter=6.0)),
    },
    compare=("sdl-seg", "unet"),
    ablation=("sdl-seg", "without distances"),
    replicate="fold",
    score=marker_rows,
    scales=scales(HIPPOCAMPI, "unet", "sdl-seg", "without distances", budget=BUDGET, volumes=True),
    published={
        "5 test patients, Dice": 0.764,
        "5 test patients, HD95 in mm": 6.76,
        "5 test patients, ASD in mm": 1.9,
    },
    source="the paper's abstract",
    components=(
        Component(
            "markers",
            "simplified",
            "simulated: five random voxels of the target's border, each moved along every axis by a Gaussian of 1 mm; "
            "drawn anew in every training step, and once for each case that is scored. The paper finds the real ones "
            "on CT. Simulated markers know the truth but for the jitter; real ones lie where the surgeon left them",
        ),
        Component(
            "distance transform and Gaussian",
            "implemented",
            "our reading: exp(-d^2 / (2 sigma^2)) of the distance d to the nearest marker, sigma 4 mm (the text of the "
            "paper was not at hand). The ablation shows the network the marked voxels as they are",
        ),
        Component("image and saliency as channels", "implemented", "two channels; the plain U-Net has the image alone"),
        Component(
            "Dice, HD95 and ASD",
            "implemented",
            "all three in the table, on the case's own grid; the verdict is about Dice",
        ),
        Component("U-Net", "simplified", "the narrow 3D U-Net of chapter 09"),
        Component("tumour beds after surgery", "absent", "the 145 CTs of 29 patients are the authors' own"),
        Component("computation time", "absent", "seconds are recorded with every run"),
    ),
)
