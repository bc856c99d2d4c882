"""Nodules drawn into real X-rays, one in each, of which some look malignant: where a diagnosis needs a known truth.

X-rays and lungs are real, nodules are simulated after what radiologists look for: a benign one is round and smooth,
sometimes calcified in its middle; a malignant one is lobulated and sends spicules into the tissue around it. How much
so is drawn from ranges that overlap, so that some cannot be told. The mask is the nodule's body, without its spicules.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from medcook import evaluation
from medcook.cohorts import CohortTask
from medcook.data import IGNORE, Case
from medcook.recipes.language._findings import FindingsTask, Painted, fields_of

BENIGN, MALIGNANT = 1, 2
STRUCTURES = {BENIGN: "benign nodule", MALIGNANT: "malignant nodule"}
RADIUS = (3.0, 5.5)
"""Pixels of a 96 x 96 image."""
DEGREES = {BENIGN: (0.0, 0.4), MALIGNANT: (0.3, 1.0)}
"""How lobulated and spiculated a nodule is, 0 to 1; the two ranges overlap."""
SPICULES = (5, 9)


def nodule(kind: int, centre: tuple[float, float], size: tuple[int, int], rng: np.random.Generator):
    """`shaped` by random numbers of a kind's ranges."""
    return shaped(rng.uniform(*DEGREES[kind]), rng.uniform(*RADIUS), centre, size, rng)


def shaped(degree: float, radius: float, centre: tuple[float, float], size: tuple[int, int], rng: np.random.Generator):
    """Brightness (H, W), 0 to 1.3, and mask (H, W) bool of a nodule around a place.

    degree  how malignant it looks, 0 to 1;   radius  in pixels of an image of 96 rows: sizes scale with the image
    """
    rows, columns = np.indices(size)
    down, across = rows - centre[0], columns - centre[1]
    angle, distance = np.arctan2(down, across), np.hypot(down, across)
    edge = radius * size[0] / 96 * (1 + 0.22 * degree * waves(angle, rng))
    body = np.clip((edge + 0.7 - distance) / 1.4, 0, 1)
    calcified = 0.5 * (rng.random() < 0.4 * (1 - degree)) * np.exp(-((2.5 * distance / edge) ** 2))
    return np.maximum(body * (0.85 + calcified), degree * spicules(angle, distance, edge, rng)), distance <= edge


def waves(angle: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The outline's deviation from a circle by angle, about -1 to 1: three lobes to five."""
    return sum(np.sin(count * angle + rng.uniform(0, 2 * np.pi)) for count in (3, 4, 5)) / 2


def spicules(angle: np.ndarray, distance: np.ndarray, edge: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Brightness of thin rays from the edge outwards, fading over about the nodule's radius."""
    found = np.zeros_like(distance)
    for direction in rng.uniform(-np.pi, np.pi, rng.integers(*SPICULES, endpoint=True)):
        aside = distance * np.sin(angle - direction)
        along = distance * np.cos(angle - direction)
        length = rng.uniform(0.7, 1.3) * edge.mean()
        ray = np.exp(-((aside / 0.75) ** 2)) * np.clip(1 - (along - edge) / length, 0, 1) * (along > 0)
        found = np.maximum(found, 0.9 * ray)
    return found


def with_nodule(image: np.ndarray, lungs: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """An image (H, W) of unit variance with one nodule in its lungs (H, W), and its label map (H, W)."""
    label, kind = np.zeros(image.shape, np.uint8), (BENIGN, MALIGNANT)[rng.integers(2)]
    cells = np.argwhere(np.any(list(fields_of(inner(lungs)).values()), axis=0))
    if not len(cells):
        return image.copy(), label
    bright, mask = nodule(kind, tuple(cells[rng.integers(len(cells))]), image.shape, rng)
    label[mask] = kind
    return image + rng.uniform(0.9, 1.5) * bright, label


def inner(lungs: np.ndarray) -> np.ndarray:
    """Lungs (H, W) without their rim, so that nodules lie in them; all of them where nothing would be left."""
    kept = ndimage.binary_erosion(lungs, iterations=max(1, round(3 * lungs.shape[0] / 96)))
    return kept if kept.any() else lungs


@dataclass(frozen=True)
class PaintedNodule(Painted):
    """A preparation after which each image has one nodule, which the case's name decides."""

    what: ClassVar[str] = "nodule"

    def paint(self, image: np.ndarray, lungs: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        return with_nodule(image, lungs, rng)


@dataclass(frozen=True)
class NoduleTask(FindingsTask, CohortTask):
    """X-rays of `side` x `side` pixels with one nodule each; labels are 1 in a benign one, 2 in a malignant one."""

    side: int = 96
    versions: int = 2

    painter: ClassVar[type[Painted]] = PaintedNodule

    @property
    def classes(self) -> int:
        return 1 + len(STRUCTURES)

    @property
    def structures(self) -> dict[int, str]:
        return STRUCTURES


def bodies(labels: Tensor) -> Tensor:
    """(B, H, W) bool: where label maps (B, H, W) have a nodule of either kind."""
    return (labels > 0) & (labels != IGNORE)


def has_nodule(labels: Tensor) -> Tensor:
    """(B,) bool: whether each label map (B, H, W) has a nodule at all."""
    return bodies(labels).flatten(1).any(1)


def malignant(labels: Tensor) -> Tensor:
    """(B,) bool: whether each label map (B, H, W) has a malignant nodule."""
    return (labels == MALIGNANT).flatten(1).any(1)


def patches(images: Tensor, labels: Tensor, side: int) -> Tensor:
    """(B, C, side, side): squares of images (B, C, H, W) around the middle of each nodule; beyond the border, zeros.

    Without a nodule the middle of the image is taken.
    """
    middles = []
    for body in bodies(labels):
        places = body.nonzero().float()
        middles.append(places.mean(0) if len(places) else body.new_tensor(body.shape, dtype=torch.float32) // 2)
    return squares(images, range(len(images)), torch.stack(middles), side)


def squares(images: Tensor, numbers, places: Tensor, side: int) -> Tensor:
    """(N, C, side, side): of images (B, C, H, W) those with these numbers (N), around places (N, 2), row and column."""
    padded = F.pad(images, [side // 2] * 4)
    corners = zip(numbers, places.round().long().tolist(), strict=True)
    return torch.stack([padded[number, :, top : top + side, left : left + side] for number, (top, left) in corners])


def nodule_rows(scores, case: Case, labels: Tensor) -> list[dict]:
    """Rows for `metric="auc"`, one for each version of an image: score (0 to 1, `scores` (N,)), outcome and hospital.

    Versions without a nodule have no row. `radius` in pixels tells small from large ones.
    """
    rows = []
    there = has_nodule(labels).nonzero().flatten().tolist()
    for number in there:
        score, label = scores[number], labels[number]
        values = {
            "score": float(score),
            "outcome": float((label == MALIGNANT).any()),
            "group": str(case.attributes.get("site") or ""),
            "radius": float(bodies(label).sum() / np.pi) ** 0.5,
        }
        rows.append(evaluation.row(case, f"nodule {number + 1}", **values))
    return rows
