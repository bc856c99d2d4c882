"""Labels that are wrong, partial, of other patients or not asked for yet: the tasks of chapter 12.

Only what is learnt from is touched. Validation labels stay as the experts drew them, and scores are on those.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Literal
from zlib import crc32

import numpy as np
import torch
from scipy import ndimage
from skimage.morphology import skeletonize
from torch import Tensor

from medcook.cohorts import CohortTask, first_attributes, need
from medcook.data import IGNORE, Case
from medcook.data.transforms import warp
from medcook.errors import MedcookError
from medcook.methods import Batch, Supervised
from medcook.tasks import Samples, prepare

BORDER_STEP = 0.5
"""Pixels between a border of a mask and the centres of the pixels beside it."""


def noisy_borders(labels: np.ndarray, amount: float, rng: np.random.Generator) -> np.ndarray:
    """Labels (slices, H, W) as a hasty annotator leaves them: every structure grown or shrunk by up to `amount` pixels.

    One width for each structure, the same in all slices; structures come in random order, and what grows covers what
    was there. What a shrinking structure gives up becomes background.
    """
    noisy = labels.copy()
    values = np.setdiff1d(np.unique(labels), (0, IGNORE))
    for value in rng.permutation(values):
        noisy = moved_border(noisy, labels == value, value, rng.uniform(-amount, amount))
    return noisy


def moved_border(labels: np.ndarray, mask: np.ndarray, value: int, width: float) -> np.ndarray:
    """Labels (slices, H, W) in which `mask` (bool) of structure `value` has grown by `width`; below zero, shrunk."""
    beyond = signed_distance(mask)
    moved = labels.copy()
    moved[mask & (moved == value) & (beyond > width)] = 0
    moved[(beyond <= width) & (labels != IGNORE) & ~mask] = value
    return moved


def signed_distance(mask: np.ndarray) -> np.ndarray:
    """Pixels from the border of each slice of `mask` (slices, H, W): below zero inside, infinite where nothing is."""
    found = np.full(mask.shape, np.inf)
    for number in np.flatnonzero(mask.any((1, 2))):
        inside = mask[number]
        outwards = ndimage.distance_transform_edt(~inside) - BORDER_STEP
        inwards = ndimage.distance_transform_edt(np.pad(inside, 1, mode="edge"))[1:-1, 1:-1] - BORDER_STEP
        found[number] = np.where(inside, -inwards, outwards)
    return found


def correlated_field(shape: tuple[int, ...], length: float, rng: np.random.Generator) -> np.ndarray:
    """Gaussian noise (slices, H, W), mean 0 and variance 1, smoothed in each slice over `length` pixels."""
    noise = ndimage.gaussian_filter(rng.standard_normal(shape), (0, length, length), mode="wrap")
    spread = noise.std(axis=(1, 2), keepdims=True)
    return (noise - noise.mean(axis=(1, 2), keepdims=True)) / np.maximum(spread, 1e-12)


def noisy_regions(
    labels: np.ndarray, classes: int, amount: float, length: float, rng: np.random.Generator
) -> np.ndarray:
    """Labels (slices, H, W) of which a share `amount` of the pixels of every slice is another class, in blobs.

    length  how wide a blob is, in pixels (standard deviation of the smoothing); 0: every pixel is wrong on its own
    """
    noise = correlated_field(labels.shape, length, rng)
    limit = np.quantile(noise, 1 - amount, axis=(1, 2), keepdims=True)
    turn = rng.integers(1, classes, (len(labels), 1, 1))
    wrong = (noise > limit) & (labels != IGNORE)
    return np.where(wrong, (labels.astype(int) + turn) % classes, labels).astype(labels.dtype)


def drawn_scribbles(labels: np.ndarray) -> np.ndarray:
    """A simulated scribble for each class of every slice (slices, H, W): its skeleton; everything else unlabelled."""
    scribble = np.full_like(labels, IGNORE)
    for number, plane in enumerate(labels):
        for value in np.setdiff1d(np.unique(plane), [IGNORE]):
            scribble[number][skeletonize(ndimage.binary_erosion(plane == value)) & (plane == value)] = value
    return scribble


@dataclass(frozen=True)
class NoisyTask(CohortTask):
    """Training labels are wrong, once and for all; `draw` is no draw of patients here but of the mistakes.

    kind    `borders`: see `noisy_borders`, `amount` in pixels; `regions`: see `noisy_regions`, `amount` a share;
            `none`: as the experts drew them
    length  of the blobs, in pixels
    """

    kind: Literal["borders", "regions", "none"] = "borders"
    amount: float = 4.0
    length: float = 6.0

    def samples(self, role: str) -> Samples:
        samples = super().samples(role)
        if role != "labelled" or self.kind == "none":
            return samples
        ids = case_ids(self, self.labelled_patients)
        parts = [self.spoilt(name, samples.labels[samples.case_of == place]) for place, name in enumerate(ids)]
        return Samples(samples.images, torch.cat(parts), samples.case_of)

    def spoilt(self, case_id: str, labels: Tensor) -> Tensor:
        """The labels (slices, *size) of a case with their mistakes, which follow from its name and `draw`."""
        rng = np.random.default_rng([crc32(case_id.encode()), self.draw])
        if self.kind == "borders":
            return torch.from_numpy(noisy_borders(labels.numpy(), self.amount, rng))
        if self.kind == "regions":
            return torch.from_numpy(noisy_regions(labels.numpy(), self.classes, self.amount, self.length, rng))
        raise MedcookError(f"Unknown kind of noise {self.kind!r}.", "Known: borders, regions, none.")


@dataclass(frozen=True)
class UnpairedTask(CohortTask):
    """Half of the training patients give images, the other half label maps without their images.

    A sample's `raters` (N, 1, *size) is a label map of a patient of the other half: it belongs to no image here.

    own  what the images come with. `labels`; `scribbles`: the data set's own where it has some, else drawn by
         `drawn_scribbles`; `nothing`: every pixel unlabelled
    """

    own: Literal["labels", "scribbles", "nothing"] = "scribbles"

    @cached_property
    def _everyone(self) -> tuple[str, ...]:
        plain = {part.name: getattr(self, part.name) for part in fields(CohortTask)}
        return CohortTask(**plain).labelled_patients

    @property
    def labelled_patients(self) -> tuple[str, ...]:
        """The patients whose images are used: every other one."""
        return self._everyone[::2]

    @property
    def mask_patients(self) -> tuple[str, ...]:
        """The patients whose label maps are used."""
        return self._everyone[1::2]

    def samples(self, role: str) -> Samples:
        samples = super().samples(role)
        if role != "labelled":
            return samples
        masks = prepare(self.data, self.preparation, self.mask_patients).labels
        chosen = np.random.default_rng(len(masks)).permutation(len(samples)) % len(masks)
        labels = self.annotation(samples)
        return Samples(samples.images, labels, samples.case_of, masks[torch.from_numpy(chosen)][:, None])

    def annotation(self, samples: Samples) -> Tensor:
        """(N, *size) uint8: what the images come with."""
        if self.own == "labels":
            return samples.labels
        if self.own == "nothing":
            return torch.full_like(samples.labels, IGNORE)
        if self.own == "scribbles":
            return torch.cat([self.scribbles(case) for case in self.cases("labelled")])
        raise MedcookError(f"Unknown annotation {self.own!r}.", "Known: labels, scribbles, nothing.")

    def scribbles(self, case: Case) -> Tensor:
        """(slices, *size) uint8 of one case; outside the image, nothing is labelled."""
        prepared = self.preparation.labels(case)
        if "scribble" not in case.extras:
            return torch.from_numpy(drawn_scribbles(prepared.numpy()))
        inside = self.preparation.labels(case, values=np.ones_like(case.label)) > 0
        drawn = self.preparation.labels(case, values=case.extras["scribble"])
        return torch.where(inside, drawn, IGNORE)


@dataclass(frozen=True)
class ShiftTask(CohortTask):
    """Two groups of patients: the source has labels, the target has an oracle that may be asked for some.

    A sample's group is 0 (source) or 1 (target). Target labels are unlabelled throughout; what the oracle would answer
    is in `raters` (N, 1, *size), to be looked at only where it was asked. The target's patients validate.
    """

    attribute: str = "site"
    source: str = "Montgomery"
    target: str = "Shenzhen"

    @cached_property
    def labelled_patients(self) -> tuple[str, ...]:
        """The source's patients, then the target's."""
        return self._of(self.source, super().labelled_patients) + self._of(self.target, super().labelled_patients)

    @cached_property
    def val_patients(self) -> tuple[str, ...]:
        return self._of(self.target, super().val_patients)

    def _of(self, value: str, patients: tuple[str, ...]) -> tuple[str, ...]:
        return need(self.data, patients, self.attribute, value)

    def samples(self, role: str) -> Samples:
        samples = super().samples(role)
        if role != "labelled":
            return samples
        of = [first_attributes(self.data, patient)[self.attribute] == self.target for patient in self.labelled_patients]
        patient_of = {name: place for place, name in enumerate(self.labelled_patients)}
        owners = [patient_of[self.data.index()[case]] for case in case_ids(self, self.labelled_patients)]
        groups = torch.tensor(of)[torch.tensor(owners)].long()[samples.case_of]
        known = groups.view(-1, *[1] * (samples.labels.ndim - 1)) == 0
        labels = torch.where(known, samples.labels, IGNORE)
        return Samples(samples.images, labels, samples.case_of, samples.labels[:, None], groups)


def case_ids(task: CohortTask, patients: Iterable[str]) -> list[str]:
    """The cases of some patients, in the order of the task's samples."""
    return [case_id for patient in patients for case_id in task.data.patients[patient]]


@dataclass
class PartlyLabelled(Supervised):
    """Supervised training on labels with gaps: what augmentation moves in from outside the image is a gap too."""

    channels: tuple[int, ...] = (8, 16, 32, 64, 64)
    loss: str = "cross-entropy"

    def augment(self, batch: Batch, rng: torch.Generator) -> Batch:
        """As ever, but the area from outside is unlabelled in place of background; raters keep theirs."""
        grid = self.augmentation.grid(batch.images, rng)
        images, shifted = warp(batch.images, batch.labels + 1, grid)  # in 8 bits 255 + 1 is 0, as is what lies outside
        if batch.raters is not None:
            raters = [warp(batch.images[:, :0], mask, grid)[1] for mask in batch.raters.unbind(1)]
            batch = batch._replace(raters=torch.stack(raters, dim=1))
        return batch._replace(images=self.augmentation.intensity(images, rng), labels=shifted - 1)
