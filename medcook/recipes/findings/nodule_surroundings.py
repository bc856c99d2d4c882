"""Relationship between pulmonary nodule malignancy and surrounding pleurae, airways and vessels: a quantitative study
using the public LIDC-IDRI dataset (Qin, Gu, Zhang, Yang, Wang, Wang, Yao and Zhu, arXiv 2106.12991, 2021).

Is a nodule's malignancy seen from what is around it? Structures are segmented by computer, and quantities are taken
near the nodule: its distance to the pleura, to airways and to vessels, how many of these reach it, and their volume.
Each is put against malignancy, by odds ratio and chi-square, and each structure's into a logistic regression. AUCs:

  pleurae 0.5202,  airways 0.6943,  vessels 0.6529                                              (the paper's, on CT)

Here the relation is planted: vessels and airways are drawn into X-rays, and malignant nodules lie near them by the
paper's odds; nothing else tells malignant from benign. So a positive result says nothing about cancer. It says that
this protocol finds such a relation in images with ribs and vessels of their own: structures are found by a filter of
ridges, never taken from the drawing. The ablation measures the same around the nodule's mirror image, in the other
lung.

On a fold that is not scored, one run of each arm with a seed that is not scored: AUC of vessels 0.63, of the pleura
0.54, of vessels around the mirrored place 0.59, of airways 0.61. Before, losses of training patients had shown that the
distance to the pleura told malignancy, too, as vessels and airways keep to the middle of the lung; since then it is
drawn alike for both kinds. How strong a ridge must be was set on ten training patients, without their outcomes.
"""

from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from scipy import ndimage, stats
from torch import Tensor, nn

from medcook.data import Case
from medcook.data.transforms import NONE, Augment
from medcook.methods import Batch, Classifier, Moment
from medcook.recipes.fairness.mask_of_truth import grown
from medcook.recipes.findings._lesions import AllOver
from medcook.recipes.findings._nodules import bodies, has_nodule, malignant, nodule_rows
from medcook.recipes.findings._ridges import ridges, without
from medcook.recipes.findings._settings import scales
from medcook.recipes.findings._surroundings import SurroundingsTask
from medcook.recipes.recipe import Arm, Component, Recipe
from medcook.sampling import trained
from medcook.tasks import Budget

MEASURES = {
    "pleura": ("pleura distance",),
    "vessels": ("vessels distance", "vessels count", "vessels volume"),
    "airways": ("airways distance", "airways count", "airways volume"),
}
NAMES = tuple(name for names in MEASURES.values() for name in names)
CUT = 0.15
"""How strong a ridge must be, in standard deviations of the image."""
MARGIN, RING = 2, 5
"""Pixels around a nodule that are taken for a part of it; pixels from there on that count as near."""
FAR = 30.0
"""Pixels; what is farther away, or not there, counts as so far."""


@torch.no_grad()
def measured(images: Tensor, lungs: Tensor, nodules: Tensor, places: Tensor | None = None) -> Tensor:
    """(B, measures) float32 in the order of `NAMES`, of images (B, H, W), lungs and nodules (B, H, W) bool.

    distance  pixels of 96 from the edge of the place to the structure, at most `FAR`
    count     ridges that reach the place's margin, as connected parts of the ring around it
    volume    the share of this ring, within the lungs, that the structure fills
    places    what is measured around (None: the nodules themselves)
    """
    places, scale = nodules if places is None else places, images.shape[1] / 96
    margin, reach = max(1, round(MARGIN * scale)), round(RING * scale)
    covered, core = (grown(masks[:, None], margin)[:, 0] for masks in (nodules, places))
    clean = without(images, covered)
    ring = grown(core[:, None], reach)[:, 0] & ~core & ~covered & lungs
    found = {name: (ridges(clean, name == "vessels") > CUT) & lungs & ~covered for name in ("vessels", "airways")}
    lines = []
    for number, place in enumerate(places.numpy()):
        values = {"pleura distance": away(~lungs[number].numpy(), place, scale)}
        for name, masks in found.items():
            near = masks[number] & ring[number]
            values[f"{name} distance"] = away(masks[number].numpy(), place, scale)
            values[f"{name} count"] = float(reaching(near.numpy(), core[number].numpy()))
            values[f"{name} volume"] = float(near.sum() / ring[number].sum().clamp_min(1))
        lines.append([values[name] for name in NAMES])
    return torch.tensor(lines)


def away(structure: np.ndarray, place: np.ndarray, scale: float) -> float:
    """Pixels of 96 from a place (H, W) bool to a structure (H, W) bool, at their nearest."""
    if not structure.any() or not place.any():
        return FAR
    return min(FAR, float(ndimage.distance_transform_edt(~structure)[place].min()) / scale)


def reaching(near: np.ndarray, core: np.ndarray) -> int:
    """How many connected parts of `near` (H, W) bool touch `core` (H, W) bool, also by a corner."""
    parts = ndimage.label(near, np.ones((3, 3)))[0]
    touched = parts[ndimage.binary_dilation(core, np.ones((3, 3)))]
    return len(np.unique(touched[touched > 0]))


class Association(NamedTuple):
    """Of two facts about each of many: odds ratio, chi-square (one degree of freedom, no correction) and its p."""

    odds: float
    chi2: float
    p: float


def association(fact: np.ndarray, outcome: np.ndarray) -> Association:
    """How two (N,) bool go together; where a cell of their table is empty, half is added to each for the odds."""
    table = np.array([[np.sum((fact == f) & (outcome == o)) for o in (True, False)] for f in (True, False)], float)
    cells = table + 0.5 * (table == 0).any()
    expected = table.sum(1, keepdims=True) * table.sum(0) / table.sum()
    chi2 = float(((table - expected) ** 2 / np.maximum(expected, 1e-12)).sum())
    odds = cells[0, 0] * cells[1, 1] / (cells[0, 1] * cells[1, 0])
    return Association(float(odds), chi2, float(stats.chi2.sf(chi2, 1)))


def associations(frame: pd.DataFrame) -> pd.DataFrame:
    """Of each measure: its mean in benign and malignant nodules, and how being above (a distance: not above) the median
    of all goes together with malignancy. frame: rows of `surroundings_rows`."""
    ill, lines = frame["outcome"].to_numpy() == 1, {}
    for name in NAMES:
        values = frame[name.replace(" ", "_")].to_numpy()
        fact = values <= np.median(values) if name.endswith("distance") else values > np.median(values)
        lines[name] = {"benign": values[~ill].mean(), "malignant": values[ill].mean()} | association(
            fact, ill
        )._asdict()
    return pd.DataFrame(lines).T


@dataclass
class Surroundings(AllOver, Classifier):
    """A logistic regression of what is measured around the nodule, each measure standardised.

    structures  whose measures it gets: keys of `MEASURES`
    mirrored    they are taken around the nodule's mirror image
    """

    rate: float = 0.05
    decay: float = 0.0
    augmentation: Augment = field(default_factory=lambda: NONE)
    structures: tuple[str, ...] = ("vessels",)
    mirrored: bool = False

    axes = 2
    trial = SurroundingsTask("embedded", side=48, versions=1)

    @property
    def chosen(self) -> list[int]:
        """Which of all measures."""
        return [NAMES.index(name) for structure in self.structures for name in MEASURES[structure]]

    def build(self, inputs: int, classes: int, dims: int) -> nn.ModuleDict:
        count = len(self.chosen)
        model = nn.Sequential(nn.BatchNorm1d(count, affine=False), nn.Linear(count, 1))
        return nn.ModuleDict({"model": model, "average": deepcopy(model).requires_grad_(False)})

    def augment(self, batch: Batch, rng: torch.Generator) -> Batch:
        """None: what is measured stays what it is."""
        return batch

    def around(self, images: Tensor, labels: Tensor) -> Tensor:
        """(B, measures chosen) of images with their lungs (B, 2, H, W)."""
        nodules = bodies(labels)
        lungs = images[:, 1] > 0.5 if images.shape[1] > 1 else torch.ones_like(nodules)
        found = measured(images[:, 0].cpu().float(), lungs.cpu(), nodules.cpu(), self.places(nodules).cpu())
        return found[:, self.chosen].to(images.device)

    def places(self, nodules: Tensor) -> Tensor:
        """What is measured around."""
        return nodules.flip(2) if self.mirrored else nodules

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        truth = malignant(labelled.labels).float()
        with torch.autocast(labelled.images.device.type, enabled=False):
            odds = nets["model"](self.around(labelled.images, labelled.labels))[:, 0]
            return F.binary_cross_entropy_with_logits(odds, truth)

    def scores(self, nets: nn.ModuleDict, images: Tensor, labels: Tensor) -> Tensor:
        """(N,) probabilities that the nodule of each image is malignant."""
        return nets["average"](self.around(images, labels))[:, 0].sigmoid()


@torch.no_grad()
def surroundings_rows(fitted, case: Case) -> list[dict]:
    """`nodule_rows` of the regression's scores, and every measure around the nodule, whichever the regression gets."""
    images, labels = fitted.task.preparation.both(case)
    there = has_nodule(labels)
    scores = fitted.method.scores(trained(fitted), images, labels)
    lines = measured(images[there, 0].float(), images[there, 1] > 0.5, bodies(labels[there])).tolist()
    rows = nodule_rows(scores, case, labels)
    names = [name.replace(" ", "_") for name in NAMES]
    return [row | dict(zip(names, line, strict=True)) for row, line in zip(rows, lines, strict=True)]


METHOD = Surroundings()
ARMS = {
    "vessels": METHOD,
    "pleura": replace(METHOD, structures=("pleura",)),
    "vessels, mirrored place": replace(METHOD, mirrored=True),
    "airways": replace(METHOD, structures=("airways",)),
}
BUDGET = Budget(steps=80, batch=32, checks=0)

recipe = Recipe(
    paper="nodule-surroundings",
    title="Malignancy of a nodule, from the pleura, airways and vessels around it",
    claim="Where malignant nodules lie near vessels by the odds that the paper found, measures of the vessels that a "
    "filter finds in the image tell them from benign ones better than the distance to the pleura, by AUC.",
    arms={name: Arm(method) for name, method in ARMS.items()},
    compare=("vessels", "pleura"),
    ablation=("vessels", "vessels, mirrored place"),
    replicate="fold",
    metric="auc",
    score=surroundings_rows,
    scales=scales(
        SurroundingsTask("embedded", side=48, versions=1, fold=0, folds=3),
        SurroundingsTask("chest_xray"),
        budget=BUDGET,
    ),
    published={"LIDC-IDRI, pleurae": 0.5202, "LIDC-IDRI, airways": 0.6943, "LIDC-IDRI, vessels": 0.6529},
    source="abstract",
    components=(
        Component(
            "segmentation of pulmonary structures",
            "simplified",
            "lungs as people drew them; vessels and airways are bright and dark ridges within them (largest curvature "
            f"of the Hessian above {CUT}, after Sato et al.). Ribs, real vessels and gaps between vessels are found "
            "along with them. A nodule and two pixels around it are filled in before. Images are X-rays, not CT",
        ),
        Component(
            "distances, counts and normalised volumes",
            "implemented",
            "from the nodule's edge, in pixels; the pleura is the lung's edge all around. How many ridges reach the "
            "nodule: parts of a ring around it that touch it; whether one only points to it is not asked. Volume is an "
            "area, as a share of the ring",
        ),
        Component(
            "odds ratio and chi-square",
            "implemented",
            "of each measure, cut at its median over all nodules; the abstract does not say where the paper cuts",
        ),
        Component(
            "logistic regression with ROC analysis",
            "implemented",
            "one for each structure, of all its measures, fitted by gradient on training patients and scored on others",
        ),
        Component(
            "nodules and their malignancy",
            "simplified",
            "drawn, as are the trees; ratings of radiologists and diagnoses of LIDC-IDRI are not at hand. Vessels and "
            "airways have the odds ratios that the paper found for counts, 7.06 and 22.96, with both kinds together "
            "near them in half of the cases; the distance to the lung's edge is drawn alike for both. So the order "
            "of the AUCs is planted, too, and only how much of it survives being measured is found out",
        ),
    ),
)
