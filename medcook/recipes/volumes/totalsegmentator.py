"""TotalSegmentator: robust segmentation of 104 anatomical structures in CT images (Wasserthal et al., 2023).

Radiology: Artificial Intelligence 5(5), doi 10.1148/ryai.230024; arXiv 2208.05868. A model that segments whatever a
scan shows turns an archive into a study: it was run over 4004 patients, and volume and mean attenuation of their organs
were set against their age. The data half is data_manifests/totalsegmentator.yaml.

In miniature: the lungs on chest X-rays, their area in place of the volume, measured by a network on patients that it
was not trained on. With F_x(v) the share of training patients whose x is below v (ties half), each patient adds

    r = 12 (F_age - 1/2) (F_area - 1/2)

to the association, whose mean over patients is Spearman's rank correlation with the ranks of the training patients. It
is 0 where everyone is measured the same, so that a network that does not see the image stands for no association.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from medcook import evaluation
from medcook.data import Case
from medcook.methods import Batch, Moment, Supervised
from medcook.recipes.architectures._settings import BASELINE, CHANNELS
from medcook.recipes.recipe import Arm, Component, Recipe, Scale
from medcook.tasks import Budget, Task

ADULT = 18
"""Years from which a patient takes part; children grow, and with them their lungs."""


def share(label: np.ndarray, value: int) -> float:
    """The part of an image or volume that a structure takes up; times its size in mm, where known, area or volume."""
    return float((label == value).mean())


def attenuation(image: np.ndarray, label: np.ndarray, value: int) -> float:
    """Mean of the image (C, *size), first channel, inside a structure of the label (*size); NaN where it is missed."""
    inside = label == value
    return float(image[0][inside].mean()) if inside.any() else math.nan


def standing(value: float, known: np.ndarray) -> float:
    """Where a value stands among known ones (N,): the share below it, ties half, scaled to mean 0 and variance 1."""
    if math.isnan(value):
        return math.nan
    return math.sqrt(12) * (float((known < value).mean() + (known == value).mean() / 2) - 0.5)


def age_of(case: Case) -> float | None:
    """A patient's age; None where it is not known, and of children."""
    age = case.attributes.get("age")
    return float(age) if age is not None and age >= ADULT else None


def measures(case: Case, label: np.ndarray, structures: dict[int, str]) -> dict[str, float]:
    """{"area NAME": share, "attenuation NAME": mean intensity} of a case by the given label map."""
    found = {f"area {name}": share(label, value) for value, name in structures.items()}
    return found | {f"attenuation {name}": attenuation(case.image, label, v) for v, name in structures.items()}


def training_measures(fitted) -> dict[str, np.ndarray]:
    """The training patients' ages and measures, by the network and (`drawn ...`) by the experts; kept on `fitted`."""
    kept = vars(fitted)
    if "training_measures" not in kept:
        cases = (case for case in fitted.task.cases("labelled") if age_of(case) is not None)
        rows = [everything(fitted, case) for case in cases]
        columns = {name: np.array([row[name] for row in rows]) for name in rows[0]} if rows else {}
        kept["training_measures"] = {name: values[~np.isnan(values)] for name, values in columns.items()}
    return kept["training_measures"]


def everything(fitted, case: Case) -> dict[str, float]:
    """Age and all measures of a case, as the method finds the structures and as they were drawn."""
    structures = fitted.task.structures
    drawn = measures(case, case.label, structures)
    found = measures(case, fitted.predict(case), structures)
    return {"age": age_of(case)} | found | {f"drawn {name}": value for name, value in drawn.items()}


def study(fitted, case: Case) -> list[dict]:
    """A row for every structure of an adult whose age is known; none of others.

    association                       the patient's part r in the correlation of the area with age
    drawn_association                 the same of the area that experts drew
    attenuation_association           of the mean intensity inside the structure, as found
    dice, area, drawn_area, age       how well it was found, and what was measured
    """
    if age_of(case) is None:
        return []
    mine, known = everything(fitted, case), training_measures(fitted)
    place = {name: standing(value, known[name]) for name, value in mine.items()}
    rows = []
    for scored in evaluation.score_case(fitted.predict(case), case, fitted.task.structures):
        name = scored["structure"]
        values = {
            "association": place["age"] * place[f"area {name}"],
            "drawn_association": place["age"] * place[f"drawn area {name}"],
            "attenuation_association": place["age"] * place[f"attenuation {name}"],
            "area": mine[f"area {name}"],
            "drawn_area": mine[f"drawn area {name}"],
            "age": mine["age"],
        }
        kept = {column: scored[column] for column in ("dice", "missed", "false_alarm")}
        rows.append(evaluation.row(case, name, **kept, **values))
    return rows


def ramp(images: Tensor) -> Tensor:
    """The same image for everyone in place of images (B, C, *size): brighter and brighter from corner to corner."""
    rising = torch.zeros(images.shape[2:])
    for axis, side in enumerate(images.shape[2:]):
        rising = rising + torch.linspace(-1, 1, side).view(-1, *[1] * (images.ndim - 3 - axis))
    return rising.to(images).expand_as(images).contiguous()


@dataclass
class Blind(Supervised):
    """The same network and training, but for the image: it sees a ramp, and learns where structures mostly are."""

    channels: tuple[int, ...] = CHANNELS

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        return super().training_step(nets, labelled._replace(images=ramp(labelled.images)), unlabelled, now)

    def predict(self, nets: nn.ModuleDict, images: Tensor) -> Tensor:
        return super().predict(nets, ramp(images))


@dataclass
class Thresholded(Supervised):
    """What one measures without a model: structure 1 is what is darker than Otsu's threshold, off the image's border.

    A network is trained as in the other arms, and not asked.
    """

    channels: tuple[int, ...] = CHANNELS

    def predict(self, nets: nn.ModuleDict, images: Tensor) -> Tensor:
        classes = super().predict(nets, images).shape[1]
        dark = torch.stack([dark_inside(image[0].float().cpu().numpy()) for image in images]).to(images.device)
        return nn.functional.one_hot(dark.long(), classes).movedim(-1, 1).float()


def dark_inside(image: np.ndarray) -> Tensor:
    """(*size) bool: the dark regions of an image that do not touch its border."""
    from skimage.filters import threshold_otsu
    from skimage.segmentation import clear_border

    if np.ptp(image) == 0:
        return torch.zeros(image.shape, dtype=torch.bool)
    return torch.from_numpy(clear_border(image < threshold_otsu(image)))


recipe = Recipe(
    paper="totalsegmentator",
    title="Organs measured by a model, set against age",
    claim="The area of the lungs that a network finds on chest X-rays is associated with the age of adults whom it was "
    "not trained on.",
    arms={
        "segmented": Arm(BASELINE),
        "without the image": Arm(Blind()),
        "thresholded": Arm(Thresholded()),
    },
    compare=("segmented", "without the image"),
    ablation=("segmented", "thresholded"),
    replicate="fold",
    scales={
        "quick": Scale(Task("embedded"), Budget(steps=30, batch=6, checks=2), replicates=1),
        "full": Scale(Task("chest_xray"), Budget(steps=200, batch=8, checks=2)),
    },
    metric="association",
    expect="association",
    score=study,
    published={"test set, Dice": 0.943, "a public set, Dice": 0.932, "the same by another public model, Dice": 0.871},
    source="abstract, arXiv 2208.05868",
    components=(
        Component(
            "dataset of 104 structures",
            "implemented",
            "manifest and reader of version 1 in the published layout, tested on a fixture; the CTs are not at hand, "
            "and X-rays stand for them",
        ),
        Component(
            "organ volumetry",
            "implemented",
            "the share of the X-ray that the lungs take up, since its pixels have no known size; it depends on how "
            "deeply a patient has breathed, on the frame and on the disease, too",
        ),
        Component(
            "mean attenuation",
            "implemented",
            "the mean grey value inside the lungs, in the column attenuation_association; X-rays are not calibrated as "
            "Hounsfield units are, so that no claim rests on it",
        ),
        Component(
            "correlation with age",
            "implemented",
            "by ranks among the training patients, the interval over patients; a network that does not see the image "
            "is the zero. Nothing else that changes with age is adjusted for. That experts' areas fall with age in "
            "these folds was seen before the claim was written",
        ),
        Component(
            "robust segmentation model",
            "simplified",
            "the book's U-Net for one structure; there an nnU-Net, of which five parts share the 104 structures",
        ),
        Component("another public model", "absent", "no CT on which both could be run; a threshold stands beside it"),
        Component("clinical variety", "absent", "two hospitals' X-rays, half of them with tuberculosis"),
        Component("toolkit", "absent", "their program is used as it is, `pip install TotalSegmentator`"),
    ),
)
