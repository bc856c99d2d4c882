"""Hearts with scars of which the truth is known: a simulated infarct in a real wall (chapter 15).

A late-enhancement MR image shows the dead muscle of an infarct bright, and dark cores in it that no blood reaches any
more (no-reflow): the two lesions of the cardiac set Emidec (Lalande et al., Data 2020), which is not at hand. Here the
same is painted into cine MR, between the experts' contours of the wall. With d the depth of a wall's voxel, 0 at the
cavity and 1 outside, and a its angle around the cavity, as seen from the middle of the scar,

    infarct     d < transmurality sqrt(1 - (a / width)^2),    the width narrows towards the ends of the scar
    no-reflow   the same in the infarct, with a part of its width, and not the fifth of the wall beside the cavity

Where a scar is, its size and how bright it is follow from the patient's name, its texture from the case's. There are
two types of patients: scars brighter than blood, and coarser ones that are as bright as that. Cores are a little darker
than the wall.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple
from zlib import crc32

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from medcook import evaluation
from medcook.data import IGNORE, Case
from medcook.data.transforms import warp
from medcook.methods import Batch
from medcook.preparation import Preparation, Window
from medcook.tasks import Samples, Task, prepare

WALLS = {"acdc": (2, 3), "embedded": (2, 3)}
"""Labels of the wall and of the cavity in it, by data set. Scars of the embedded brains (white matter around the
ventricles) show that code runs, and no more."""
LESIONS = {1: "infarct", 2: "no-reflow"}
INFARCT, CORE = LESIONS
LEAST = 20
"""Pixels of wall that a lesion-free slice shows at least: in others there is no place for a scar."""


class Scar(NamedTuple):
    """Angles in radians; slices as a share of those that show a wall; brightness from 0 (the wall) to 1 (blood)."""

    angle: float
    twist: float
    width: float
    middle: float
    reach: float
    transmurality: float
    core: float
    bright: float
    dark: float
    grain: float
    coarse: float


def scar_of(patient: str) -> Scar:
    """The scar of a patient: every other one is brighter than blood, by chance."""
    rng = np.random.default_rng(crc32(f"scar {patient}".encode()))
    between = lambda low, high: float(rng.uniform(low, high))  # noqa: E731
    bright = rng.random() < 0.5
    return Scar(
        angle=between(-np.pi, np.pi),
        twist=between(-0.6, 0.6),
        width=between(0.7, 1.4),
        middle=between(0.35, 0.65),
        reach=between(0.35, 0.6),
        transmurality=between(0.7, 1.15),
        core=between(0.5, 0.75),
        bright=between(1.4, 1.8) if bright else between(0.8, 1.1),
        dark=between(-0.5, -0.25),
        grain=between(0.08, 0.12) if bright else between(0.12, 0.18),
        coarse=0.7 if bright else 1.5,
    )


def depth_and_angle(wall: np.ndarray, cavity: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of the pixels of a slice (H, W): depth in the wall from 0 to 1, and the angle around the middle of both."""
    inner = ndimage.distance_transform_edt(~cavity) if cavity.any() else np.ones(wall.shape)
    outer = ndimage.distance_transform_edt(wall | cavity)
    rows, columns = np.indices(wall.shape)
    down, right = ndimage.center_of_mass(wall | cavity)
    return inner / (inner + outer), np.arctan2(rows - down, columns - right)


def lesions_of(wall: np.ndarray, cavity: np.ndarray, scar: Scar) -> np.ndarray:
    """(slices, H, W) uint8 of the label values in `LESIONS`; only slices that show wall and cavity have any."""
    found = np.zeros(wall.shape, dtype=np.uint8)
    there = np.flatnonzero(wall.any((1, 2)) & cavity.any((1, 2)))
    for number, place in enumerate(there):
        along = (number + 0.5) / len(there) - scar.middle
        if abs(along) >= scar.reach:
            continue
        depth, angle = depth_and_angle(wall[place], cavity[place])
        width = scar.width * np.sqrt(1 - (along / scar.reach) ** 2)
        away = np.abs(np.angle(np.exp(1j * (angle - scar.angle - scar.twist * along))))
        dome = lambda half: np.sqrt(np.clip(1 - (away / half) ** 2, 0, None))  # noqa: B023, E731
        infarct = wall[place] & (depth < scar.transmurality * dome(width))
        core = infarct & (depth > 0.2) & (depth < 0.85 * scar.transmurality * dome(scar.core * width))
        found[place] = np.where(core, CORE, np.where(infarct, INFARCT, 0))
    return found


def scarred(case: Case, wall: int, cavity: int) -> Case:
    """The same case with a scar in its wall, which is all that is labelled; always the same one."""
    scar = scar_of(case.patient_id)
    masks = case.label == wall, case.label == cavity
    lesions = lesions_of(*masks, scar)
    if not lesions.any():
        return replace(case, label=lesions, raters=None)
    rng = np.random.default_rng(crc32(f"texture {case.case_id}".encode()))
    image = case.image[0]
    low, high = (float(np.median(image[mask])) for mask in masks)
    grain = ndimage.gaussian_filter(rng.standard_normal(image.shape), (0, scar.coarse, scar.coarse))
    level = np.where(lesions == CORE, scar.dark, scar.bright) + scar.grain * grain / grain.std()
    soft = ndimage.gaussian_filter((lesions > 0).astype(np.float32), (0, 0.5, 0.5))
    level = ndimage.gaussian_filter(level, (0, 0.4, 0.4))
    painted = (1 - soft) * image + soft * (low + level * (high - low))
    return replace(case, image=painted[None].astype(np.float32), label=lesions, raters=None)


@dataclass(frozen=True)
class ScarPreparation(Preparation):
    """Cases as network input with their scars, or `healthy` ones: then the wall is labelled, and there is no scar.

    The window lies around the middle of wall and cavity, which is taken as known of every case.
    """

    wall: int = 2
    cavity: int = 3
    healthy: bool = False

    def window(self, case: Case) -> Window:
        found, heart = super().window(case), np.isin(case.label, (self.wall, self.cavity))
        if not heart.any():
            return found
        return replace(found, centre=tuple(map(float, ndimage.center_of_mass(heart)[-self.dims :])))

    def images(self, case: Case) -> Tensor:
        if not self.healthy:
            case = replace(case, image=scarred(case, self.wall, self.cavity).image)
        return super().images(case)

    def labels(self, case: Case, values: np.ndarray | None = None) -> Tensor:
        if values is None:
            values = case.label == self.wall if self.healthy else scarred(case, self.wall, self.cavity).label
        return super().labels(case, values.astype(np.uint8))


@dataclass(frozen=True)
class ScarTask(Task):
    """Scars are what is to be segmented, in slices of `side` x `side` pixels; every patient that is scored has one.

    The patients without labels are lesion-free: their unlabelled samples show real hearts as they are. Every sample
    that trains comes with its wall, 1 in the first rater, so that it is known where a lesion can be.
    """

    side: int = 64

    @property
    def data_kind(self) -> str:
        return "simulated" if self.data.manifest.simulated else "real-anatomy-simulated"

    @cached_property
    def preparation(self) -> ScarPreparation:
        plain, (wall, cavity) = super().preparation, WALLS[self.dataset]
        zoom = 1.75 if plain.centre == "roi" else 1.0  # around the middle of a heart less is enough
        long_side = round(zoom * self.side * (plain.long_side or plain.size[0]) / plain.size[0])
        return ScarPreparation((self.side,) * 2, long_side, plain.centre, True, wall, cavity)

    @property
    def classes(self) -> int:
        return max(LESIONS) + 1

    @property
    def structures(self) -> dict[int, str]:
        return LESIONS

    def samples(self, role: str) -> Samples:
        patients = getattr(self, f"{role}_patients")
        if role == "val":
            return prepare(self.data, self.preparation, patients)
        plain = prepare(self.data, replace(self.preparation, healthy=True), patients)
        wall = plain.labels[:, None]
        if role == "labelled":
            painted = prepare(self.data, self.preparation, patients)
            return Samples(painted.images, painted.labels, painted.case_of, wall)
        kept = wall.flatten(1).sum(1) >= LEAST
        blank = torch.full_like(plain.labels[kept], IGNORE)
        return Samples(plain.images[kept], blank, plain.case_of[kept], wall[kept])


def scar_rows(fitted, case: Case) -> list[dict]:
    """A row for each lesion of a case with its scar, on the case's own grid: every measure of the plain table."""
    preparation = fitted.task.preparation
    truth = scarred(case, preparation.wall, preparation.cavity)
    return evaluation.score_case(fitted.predict(case), truth, fitted.task.structures)


def with_lesions(batch: Batch) -> Tensor:
    """Numbers (B,) of images in a batch that show a lesion, drawn to fill it again; none where there is no lesion."""
    there = batch.labels.flatten(1).amax(1).nonzero()[:, 0]
    return there[torch.randint(len(there), (len(batch.labels),), device=there.device)] if len(there) else there


def walls(batch: Batch) -> Tensor:
    """(B, 1, H, W) float32: where a lesion can be; everywhere if the task does not say."""
    return torch.ones_like(batch.images[:, :1]) if batch.raters is None else (batch.raters[:, :1] == 1).float()


def moved_lesions(source: Batch, target: Tensor) -> tuple[Tensor, Tensor] | None:
    """Images and labels of a batch's lesions in other walls (B, 1, H, W), at random angles; None if it has none."""
    chosen = with_lesions(source)
    if not len(chosen):
        return None
    grid = alignment(walls(source)[chosen], target, 2 * torch.pi * torch.rand(len(chosen)))
    images, labels = warp(source.images[chosen], source.labels[chosen], grid)
    return images, torch.where(target[:, 0] > 0, labels, 0)


def alignment(source: Tensor, target: Tensor, angles: Tensor) -> Tensor:
    """(B, H, W, 2) grid (see `grid_sample`) that brings source walls (B, 1, H, W) onto target walls, turned by angles.

    Their middles meet, and the mean distances from these.
    """
    height, width = source.shape[2:]
    sides = (torch.arange(side, dtype=torch.float32, device=source.device) for side in (height, width))
    rows, columns = torch.meshgrid(*sides, indexing="ij")
    places = torch.stack([columns, rows], dim=-1)

    def middle_and_spread(wall: Tensor) -> tuple[Tensor, Tensor]:
        share = wall[:, 0, :, :, None] / wall.sum((1, 2, 3)).clamp_min(1)[:, None, None, None]
        middle = (share * places).sum((1, 2))[:, None, None]
        away = (places - middle).norm(dim=-1, keepdim=True)
        return middle, (share * away).sum((1, 2), keepdim=True).clamp_min(1)

    (from_middle, from_spread), (to_middle, to_spread) = middle_and_spread(source), middle_and_spread(target)
    right, down = ((places - to_middle) * (from_spread / to_spread)).unbind(-1)
    cos, sin = (part.to(source)[:, None, None] for part in (angles.cos(), angles.sin()))
    found = from_middle + torch.stack([cos * right - sin * down, sin * right + cos * down], dim=-1)
    return (2 * found + 1) / found.new_tensor([width, height]) - 1
