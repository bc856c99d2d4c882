"""Head-and-neck CT as a task of a few organs, the others at hand as a mask.

Nine patients of `openkbp` train and validate, in three folds. The window around head and neck is found from the image
alone: the upper part of the scan, centred on the body.
"""

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from medcook.data import IGNORE, Case, Dataset
from medcook.preparation import Preparation
from medcook.sam.zero_shot import HOUNSFIELD
from medcook.tasks import Budget, VolumeTask, shared_dataset

WINDOW = (48, 48, 72)
"""Voxels from front to back, from right to left and from the top of the scan down, about 20 cm each way.

The first side may be halved four times and is not 2 then: see `QUICK` of _settings.py about bfloat16.
"""

AXIAL = (72, 48, 48)
"""The same window, axial slices first."""

BUDGET = Budget(steps=400, batch=2, checks=2)
"""As many volumes as in the chapter's budget, in twice the steps.

These organs are less than 1% of the window: with 200 steps a comparison is about who finds them at all.
"""

BRAINSTEM, RIGHT_PAROTID, LEFT_PAROTID = 1, 3, 4
"""Organs of `openkbp` that hardly differ from what is around them and are drawn in every patient of train and val."""


class Focused(Dataset):
    """A data set of which `targets` alone are structures, numbered 1, 2, ... in this order.

    axial  the slices of a CT come first, as those of the embedded brains do, not last

    attributes: annotated and missing, the targets that were drawn for this patient and those that were not;
    of a CT also roi_centre, the middle of the window around head and neck
    extras: organs (*spatial) uint8, 1 where another structure of the set is
    """

    def __init__(self, whole: Dataset, targets: tuple[int, ...], axial: bool = False):
        names = {0: "background"} | {k: whole.manifest.structures[value] for k, value in enumerate(targets, start=1)}
        facts = {"label_values": sorted(names), "foreground_in_every_case": False}
        facts = whole.manifest.facts.model_copy(update=facts)
        super().__init__(whole.manifest.model_copy(update={"classes": names, "facts": facts}))
        self.whole, self.targets, self.axial = whole, targets, axial and whole.manifest.modality == "CT"

    @property
    def version(self) -> str:
        return f"focused 1, {'axial, ' * self.axial}{self.whole.version}"

    def index(self) -> dict[str, str]:
        return self.whole.index()

    def attributes(self, case_id: str) -> dict:
        known = self.whole.attributes(case_id)
        drawn = known.get("annotated", self.targets)
        there = [k for k, value in enumerate(self.targets, start=1) if value in drawn]
        return known | {"annotated": there, "missing": [k for k in self.manifest.structures if k not in there]}

    def load(self, case_id: str) -> Case:
        """As the set itself reads it (which refuses test cases, and logs them), with the targets' numbers."""
        case, known = self.whole.load(case_id), self.attributes(case_id)
        label = np.where(case.label == IGNORE, IGNORE, 0).astype(np.uint8)
        for k, value in enumerate(self.targets, start=1):
            label[case.label == value] = k
        organs = ((case.label > 0) & (label == 0)).astype(np.uint8)
        image = case.image
        if self.manifest.modality == "CT":
            image = np.clip(image, *HOUNSFIELD)
            known |= {"roi_centre": head_and_neck(image[0])}
        case = replace(case, image=image, label=label, raters=None, attributes=known, extras={"organs": organs})
        return slices_first(case) if self.axial else case


def slices_first(case: Case) -> Case:
    """A case with its last axis before the others."""
    extras = {name: np.ascontiguousarray(np.moveaxis(array, -1, 0)) for name, array in case.extras.items()}
    first, second, last = case.attributes["roi_centre"]
    return replace(
        case,
        image=np.ascontiguousarray(np.moveaxis(case.image, -1, 1)),
        label=np.ascontiguousarray(np.moveaxis(case.label, -1, 0)),
        spacing=case.spacing and (case.spacing[2], *case.spacing[:2]),
        attributes=case.attributes | {"roi_centre": (last, first, second)},
        extras=extras,
    )


def head_and_neck(image: np.ndarray, depth: int = WINDOW[2]) -> tuple[float, float, float]:
    """Centre of the body in the upper `depth` slices of a CT (front to back, right to left, downwards)."""
    front, right, _ = ndimage.center_of_mass(image[:, :, :depth] > HOUNSFIELD[0])
    return float(front), float(right), (depth - 1) / 2


@dataclass(frozen=True)
class Partial(Preparation):
    """What may be a target that nobody drew is not labelled.

    guided  images get a second channel, the mask of the other organs
    """

    guided: bool = True

    def images(self, case: Case) -> Tensor:
        """(N, 1 or 2, *size) float32."""
        images = super().images(case)
        return torch.cat([images, self.organs(case)[:, None].float()], dim=1) if self.guided else images

    def organs(self, case: Case) -> Tensor:
        """(N, *size) uint8, 1 where another structure than the targets was drawn."""
        return super().labels(case, case.extras["organs"])

    def labels(self, case: Case, values: np.ndarray | None = None) -> Tensor:
        """(N, *size) uint8; in a patient who lacks a target, `IGNORE` wherever no structure was drawn."""
        labels = super().labels(case, values)
        if case.attributes["missing"]:
            labels[(labels == 0) & (self.organs(case) == 0)] = IGNORE
        return labels


@lru_cache(maxsize=4)
def focused(dataset: str, targets: tuple[int, ...], axial: bool) -> Focused:
    """The data set with these targets; the same object for every task of a process."""
    return Focused(shared_dataset(dataset), targets, axial)


@dataclass(frozen=True)
class FocusTask(VolumeTask):
    """Segment `targets`, values of the data set's own labels.

    guided  every image comes with the mask of the other organs
    axial   slices first
    """

    folds: int = 3
    targets: tuple[int, ...] = (BRAINSTEM, RIGHT_PAROTID, LEFT_PAROTID)
    guided: bool = True
    axial: bool = False

    @property
    def data(self) -> Focused:
        return focused(self.dataset, self.targets, self.axial)

    @cached_property
    def preparation(self) -> Partial:
        if self.dataset == "embedded":
            return Partial(super().preparation.size, guided=self.guided)
        return Partial(AXIAL if self.axial else WINDOW, centre="roi", guided=self.guided)


EMBEDDED = FocusTask("embedded", folds=8, targets=(1, 3))
"""What `quick` runs: grey matter and ventricles of the simulated brains, with white matter as the other organ."""
