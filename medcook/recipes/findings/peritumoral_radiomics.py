"""Peritumoral Expansion Radiomics for Improved Lung Cancer Classification (Tushar, arXiv 2411.16008, 2024).

What tells a malignant nodule may lie around it. A nodule is outlined inside of its box by a simple rule; the outline
grows by some millimetres; radiomic features of all that it holds go to a classifier from before the time of networks.
With M the outline, S the square of 3 x 3 and f the features,

    M_0 = opened(closed(bright part of the box)),    M_n = M_(n-1) dilated by S,    score = forest(f(image, M_n))

The paper found the best AUC at 8 mm. How large a pixel of these X-rays is nobody knows, so that millimetres become
pixels: 4, about the radius of a nodule here (3 to 5.5), which was fixed beforehand. On training patients, Otsu's rule
found the drawn nodules with a Dice of 0.84, as did the two kinds of means; the mixture 0.82. The ablation keeps the
grown outline and fills what it gained with the surroundings of another patient's nodule. No network: the loop takes two
steps of a linear unit that no score looks at, so that a change of the features changes a loss. On validation patients,
one run each (seed 7), AUCs were 0.75 (grown), 0.80 (alone) and 0.71 (another's); nothing was changed after it.
"""

from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal
from zlib import crc32

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from medcook import metrics
from medcook.data import Case
from medcook.data.transforms import NONE, Augment
from medcook.methods import Batch, Method, Moment
from medcook.recipes.findings._lesions import all_over
from medcook.recipes.findings._nodules import bodies, has_nodule, malignant, nodule_rows
from medcook.recipes.findings._outlined import COUNT, SEGMENTERS, described, expanded, outlined
from medcook.recipes.findings._settings import NODULES, NODULES_QUICK
from medcook.recipes.recipe import Arm, Component, Recipe, Scale
from medcook.sampling import once, trained
from medcook.tasks import Budget

GROWN, MARGIN = 4, 2
"""Pixels of a 96 x 96 image: by how much the outline grows, and how far around its box a nodule is looked for."""
Way = tuple[str, int]
"""How a nodule is outlined, and by how many pixels the outline grows."""
SEGMENTATIONS: tuple[Way, ...] = tuple((how, 0) for how in SEGMENTERS if how != "otsu")
EXPANSIONS: tuple[Way, ...] = tuple(("otsu", steps) for steps in (1, 2, 6, 8))
CLASSIFIERS = {"forest": "score", "logistic": "score_logistic", "neighbours": "score_neighbours"}


def scaled(pixels: int, image: np.ndarray) -> int:
    """Pixels of a 96 x 96 image in one of another size (H, W)."""
    return round(pixels * image.shape[0] / 96)


def centre(mask: np.ndarray) -> tuple[int, int]:
    """The middle (row, column) of a mask's pixels."""
    row, column = np.argwhere(mask).mean(0).round().astype(int)
    return int(row), int(column)


def with_surroundings(image: np.ndarray, gained: np.ndarray, at: tuple[int, int], other: np.ndarray, there):
    """An image (H, W) whose pixels `gained` (H, W) bool are those of another (H, W), its `there` laid on `at`.

    Beyond the other's border its border goes on.
    """
    rows, columns = np.nonzero(gained)
    taken = image.copy()
    of = [
        np.clip(index - here + its, 0, size - 1)
        for index, here, its, size in zip((rows, columns), at, there, other.shape, strict=True)
    ]
    taken[rows, columns] = other[of[0], of[1]]
    return taken


def classifiers(trees: int, seed: int) -> dict:
    """A random forest, a logistic regression and nearest neighbours, as yet not fitted."""
    return {
        "forest": RandomForestClassifier(trees, min_samples_leaf=2, random_state=seed, n_jobs=1),
        "logistic": make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000)),
        "neighbours": make_pipeline(StandardScaler(), KNeighborsClassifier(15)),
    }


class Unit(nn.Linear):
    """A linear unit from features to a logit, and the number that a run's random forests begin with."""

    def __init__(self):
        super().__init__(COUNT, 1)
        self.register_buffer("seed", torch.randint(2**31, ()))


@dataclass
class Peritumoral(Method):
    """Radiomics of an outline found by `how` and grown by `steps` pixels; of its surroundings or of `another`'s.

    also   more ways whose random forests are scored beside
    trees  of a forest
    """

    how: Literal["otsu", "k-means", "fuzzy c-means", "mixture"] = "otsu"
    steps: int = GROWN
    another: bool = False
    also: tuple[Way, ...] = ()
    trees: int = 300
    augmentation: Augment = NONE

    axes = 2
    trial = NODULES_QUICK

    def build(self, inputs: int, classes: int, dims: int) -> nn.ModuleDict:
        model = Unit()
        return nn.ModuleDict({"model": model, "average": deepcopy(model).requires_grad_(False)})

    def augment(self, batch: Batch, rng: torch.Generator) -> Batch:
        """Images are described as they are."""
        return batch

    def features(self, images: np.ndarray, truths: np.ndarray, others, way: Way | None = None) -> np.ndarray:
        """(N, 64) of images (N, H, W) with nodules `truths` (N, H, W) bool, of which just the boxes are looked at.

        others  (image (H, W), middle of its nodule) for each, which another's surroundings come from
        """
        how, steps = way or (self.how, self.steps)
        found = []
        for image, truth, (other, there) in zip(images, truths, others, strict=True):
            mask = outlined(image, truth, how, scaled(MARGIN, image))
            region = expanded(mask, scaled(steps, image))
            if self.another:
                image = with_surroundings(image, region & ~mask, centre(truth), other, there)
            found.append(described(image, region))
        return np.stack(found)

    def logits(self, unit: Unit, images: Tensor, labels: Tensor) -> Tensor:
        """(B,) of images (B, C, H, W) with label maps (B, H, W); the next one of the batch is the other."""
        grey, truths = grey_and_truths(images, labels)
        others = [(image, centre(truth)) for image, truth in zip(grey, truths, strict=True)]
        found = self.features(grey, truths, others[1:] + others[:1])
        return unit(torch.from_numpy(found).to(unit.weight).arcsinh())[:, 0].float()

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        """The linear unit's loss; no score looks at it."""
        wanted = malignant(labelled.labels).float()
        return F.binary_cross_entropy_with_logits(self.logits(nets["model"], labelled.images, labelled.labels), wanted)

    def predict(self, nets: nn.ModuleDict, images: Tensor) -> Tensor:
        """By the linear unit, of the middle of the image."""
        labels = torch.zeros_like(images[:, 0])
        return all_over(self.logits(nets["average"], images, labels).sigmoid(), images)


def grey_and_truths(images: Tensor, labels: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Grey images (N, H, W) and nodules (N, H, W) bool; the middle of the image where there is none."""
    truths = bodies(labels).cpu().numpy()
    height, width = truths.shape[1:]
    middle = np.zeros((height, width), bool)
    middle[height // 2 - 2 : height // 2 + 3, width // 2 - 2 : width // 2 + 3] = True
    return images[:, 0].float().cpu().numpy(), np.where(truths.any((1, 2), keepdims=True), truths, middle)


@dataclass
class Learnt:
    """What a run's score knows of training patients: their nodules, and classifiers fitted on these."""

    images: np.ndarray
    middles: list[tuple[int, int]]
    fitted: dict[str, object]
    also: dict[Way, object]

    def other(self, name: str):
        """The nodule of a training patient, which the name decides: an image (H, W) and the nodule's middle."""
        number = crc32(name.encode()) % len(self.images)
        return self.images[number], self.middles[number]


def learnt(fitted) -> Learnt:
    """Classifiers of a run, fitted on its training nodules; the other of one is half of all nodules further on."""
    method, samples = fitted.method, fitted.task.samples("labelled")
    there = has_nodule(samples.labels)
    images, truths = grey_and_truths(samples.images[there], samples.labels[there])
    outcome, middles = malignant(samples.labels[there]).numpy(), [centre(truth) for truth in truths]
    pairs = list(zip(images, middles, strict=True))
    others = pairs[len(pairs) // 2 :] + pairs[: len(pairs) // 2]
    fresh = partial(classifiers, method.trees, int(trained(fitted)["average"].seed))
    found = method.features(images, truths, others)
    also = {way: fresh()["forest"].fit(method.features(images, truths, others, way), outcome) for way in method.also}
    fits = {name: each.fit(found, outcome) for name, each in fresh().items()}
    return Learnt(images, middles, fits, also)


def radiomic_rows(fitted, case: Case) -> list[dict]:
    """`nodule_rows` of the random forest, and beside it

    score_logistic, score_neighbours  of two other classifiers of the same features
    score HOW N                       of a forest on outlines found by HOW and grown by N pixels (NaN: not tried here)
    dice HOW                          of the outline found by HOW, not grown, with the nodule
    """
    images, labels = fitted.task.preparation.both(case)
    kept = has_nodule(labels)
    if not kept.any():
        return []
    method, known = fitted.method, once(fitted, "learnt", lambda: learnt(fitted))
    grey, truths = grey_and_truths(images[kept], labels[kept])
    others = [known.other(f"{case.case_id} {number}") for number in range(len(grey))]
    found = method.features(grey, truths, others)
    columns = {CLASSIFIERS[name]: each.predict_proba(found)[:, 1] for name, each in known.fitted.items()}
    rows = nodule_rows(torch.from_numpy(columns.pop("score")), case, labels[kept])
    for way in (*SEGMENTATIONS, *EXPANSIONS):
        forest, name = known.also.get(way), f"score {way[0]} {way[1]}"
        columns[name] = np.full(len(grey), np.nan)
        if forest:
            columns[name] = forest.predict_proba(method.features(grey, truths, others, way))[:, 1]
    for how in SEGMENTERS:
        masks = [outlined(image, truth, how, scaled(MARGIN, image)) for image, truth in zip(grey, truths, strict=True)]
        columns[f"dice {how}"] = [metrics.dice(*pair) for pair in zip(masks, truths, strict=True)]
    return [row | {name: float(column[i]) for name, column in columns.items()} for i, row in enumerate(rows)]


ARMS = {
    "grown by 4 pixels": Arm(Peritumoral(also=EXPANSIONS)),
    "nodule alone": Arm(Peritumoral(steps=0, also=SEGMENTATIONS)),
    "another's surroundings": Arm(Peritumoral(another=True)),
}
LITTLE = Budget(steps=2, batch=4, precision="float32", checks=0)

recipe = Recipe(
    paper="peritumoral-radiomics",
    title="Radiomics of nodules and of what lies around them",
    claim="A random forest on radiomic features of a nodule's outline grown by 4 pixels, about one radius, tells "
    "malignant from benign nodules with a higher AUC than on those of the outline itself.",
    arms=ARMS,
    compare=("grown by 4 pixels", "nodule alone"),
    ablation=("grown by 4 pixels", "another's surroundings"),
    scales={
        "quick": Scale(replace(NODULES_QUICK, fold=0), LITTLE, replicates=1),
        "full": Scale(NODULES, LITTLE),
    },
    metric="auc",
    score=radiomic_rows,
    published={"8 mm": 0.78},
    source="abstract, arXiv 2411.16008; the author's code for outlines and their expansion (cvseg_utils.py of PiNS, "
    "Point-driven Nodule Segmentation)",
    components=(
        Component(
            "outlines by Otsu, fuzzy C-means, mixture and KNN",
            "implemented",
            "of grey values within 2 pixels of the box (there 5 voxels), the brighter of two parts, closed and opened, "
            "as in the code. What is called KNN is k-means there, and so here. In X-rays, there in CT "
            "volumes. All arms take Otsu's; columns `score HOW 0` and `dice HOW` tell of the others",
        ),
        Component(
            "peritumoral expansion",
            "implemented",
            "by squares, as in the code, by 4 pixels of 96, for the 8 mm that were best there; columns `score otsu N` "
            "of 1, 2, 6 and 8 pixels. The grown region is described as one, with the nodule in it",
        ),
        Component(
            "radiomic features",
            "simplified",
            "64 as PyRadiomics defines them: first order, shape in two dimensions, co-occurrence, runs and zones, with "
            "the grey levels of `frd`; no dependence, no neighbourhood difference, no filtered images",
        ),
        Component(
            "classifiers",
            "implemented",
            "random forest (the score), logistic regression and nearest neighbours from scikit-learn, settings fixed. "
            "Forests begin with the run's seed, the one thing that differs between replicates",
        ),
        Component(
            "comparison with deep features",
            "absent",
            "the foundation model's weights are not at hand; what networks make of the same nodules is measured in "
            "`lesion-centric` and `vae-lung`",
        ),
    ),
)
