"""Nodules among vessels and airways, all drawn into real X-rays: malignant ones lie nearer to both, by known odds.

Trees grow from the hilum of each lung outwards. Vessels are bright lines, airways dark ones between bright walls. A
nodule looks the same whether it is called benign or malignant, and both lie as far from the edge of the lung: only what
is around it says anything. Nobody is told where the trees are; a method has to find them in the image.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from medcook.data import Case
from medcook.preparation import Preparation
from medcook.recipes.findings._nodules import BENIGN, MALIGNANT, NoduleTask, PaintedNodule, inner, nodule
from medcook.recipes.language._findings import Painted, fields_of

ODDS = {"vessels": 7.06, "airways": 22.96}
"""Odds ratio of being near such a structure, malignant against benign: those of the paper, for counts near a nodule."""
NEAR = {"vessels": 4.0, "airways": 6.0}
"""Pixels of a 96 x 96 image, from the middle of a nodule to that of the structure, that count as near."""
GENERATIONS = {"vessels": 3, "airways": 2}
TRUNKS = {"vessels": (-60.0, 0.0, 60.0), "airways": (-40.0, 40.0)}
"""Degrees between a tree's trunks and the way straight outwards."""


class Tree(NamedTuple):
    """How far every pixel is from the middle of the nearest branch, and how wide that is: (H, W) each, in pixels."""

    distance: np.ndarray
    width: np.ndarray


def chance(kind: int, structure: str) -> float:
    """How probable it is that a nodule of a kind lies near such a structure; both kinds together: a half."""
    odds = ODDS[structure] ** (0.5 if kind == MALIGNANT else -0.5)
    return odds / (1 + odds)


def hila(lungs: np.ndarray) -> list[tuple[np.ndarray, float]]:
    """For each lung of (H, W) bool: where its tree begins, at the inner edge at middle height, and 1 or -1, the
    direction outwards along a row."""
    found, parts = [], fields_of(lungs)
    for side, outwards in (("right", -1.0), ("left", 1.0)):
        lung = np.any([mask for (name, _), mask in parts.items() if name == side], axis=0)
        if lung.any():
            row = int(np.median(np.nonzero(lung)[0]))
            columns = np.nonzero(lung[row])[0]
            if len(columns):
                found.append((np.array([row, columns.max() if outwards < 0 else columns.min()], float), outwards))
    return found


def grown(lungs: np.ndarray, structure: str, rng: np.random.Generator) -> Tree:
    """A tree in each lung of (H, W) bool: every branch ends in two, shorter and thinner ones."""
    scale, width = lungs.shape[0] / 96, np.zeros(lungs.shape)
    for root, outwards in hila(lungs):
        todo = [(root, np.deg2rad(angle + rng.uniform(-15, 15)), 0) for angle in TRUNKS[structure]]
        while todo:
            start, angle, generation = todo.pop()
            length = 15 * scale * 0.85**generation * rng.uniform(0.7, 1.2)
            steps = np.linspace(0, length, max(2, int(4 * length)))[:, None]
            points = start + steps * np.array([np.sin(angle), outwards * np.cos(angle)])
            cells = points.round().astype(int)
            inside = ((cells >= 0) & (cells < lungs.shape)).all(1)
            inside[inside] &= lungs[tuple(cells[inside].T)]
            rows, columns = cells[inside].T
            width[rows, columns] = np.maximum(width[rows, columns], scale * 1.1 * 0.88**generation)
            if generation + 1 < GENERATIONS[structure]:
                turns = np.deg2rad(rng.uniform(15, 40, 2)) * (1, -1)
                todo += [(points[-1], angle + turn, generation + 1) for turn in turns]
    if not width.any():
        return Tree(np.full(lungs.shape, np.inf), np.ones(lungs.shape))
    distance, nearest = ndimage.distance_transform_edt(width == 0, return_indices=True)
    return Tree(distance, width[tuple(nearest)])


def brightness(tree: Tree, structure: str) -> np.ndarray:
    """(H, W), 1 in the middle of a vessel; -1 in that of an airway, and half as bright in its walls."""
    line = np.exp(-((tree.distance / tree.width) ** 2))
    if structure == "vessels":
        return line
    walls = np.exp(-(((tree.distance - 2.2 * tree.width) / (0.7 * tree.width)) ** 2))
    return 0.5 * walls - line


def placed(kind: int, cells: np.ndarray, trees: dict[str, Tree], rng: np.random.Generator) -> tuple[int, int]:
    """A place among cells (H, W) bool for a nodule of a kind: near each structure by its odds, if there is such one.

    How far from the edge it lies is drawn first, as that of any cell; so it says nothing of the kind.
    """
    scale, depth = cells.shape[0] / 96, ndimage.distance_transform_edt(cells)
    drawn = depth[some_of(cells, rng)]
    cells = cells & (np.abs(depth - drawn) <= scale)
    for structure, tree in trees.items():
        near = tree.distance <= NEAR[structure] * scale
        wanted = cells & (near if rng.random() < chance(kind, structure) else ~near)
        cells = wanted if wanted.any() else cells
    return some_of(cells, rng)


def some_of(cells: np.ndarray, rng: np.random.Generator) -> tuple[int, int]:
    """One of cells (H, W) bool, each as probable as the others."""
    places = np.argwhere(cells)
    return tuple(places[rng.integers(len(places))])


def with_surroundings(image: np.ndarray, lungs: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """An image (H, W) of unit variance with trees and one nodule in its lungs (H, W), and the nodule's label map."""
    label, kind = np.zeros(image.shape, np.uint8), (BENIGN, MALIGNANT)[rng.integers(2)]
    if not lungs.any():
        return image.copy(), label
    trees = {structure: grown(lungs, structure, rng) for structure in ODDS}
    drawn = sum(rng.uniform(0.6, 0.9) * brightness(tree, name) for name, tree in trees.items())
    place = placed(kind, inner(lungs), trees, rng)
    bright, mask = nodule(BENIGN, place, image.shape, rng)
    label[mask] = kind
    return image + ndimage.gaussian_filter(drawn * lungs, 0.5) + rng.uniform(0.9, 1.5) * bright, label


@dataclass(frozen=True)
class PaintedSurroundings(PaintedNodule):
    """Images come with a second channel: 1 in the lungs."""

    what: ClassVar[str] = "nodule among vessels"

    def paint(self, image: np.ndarray, lungs: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        return with_surroundings(image, lungs, rng)

    def both(self, case: Case) -> tuple[Tensor, Tensor]:
        images, labels = super().both(case)
        lungs = (Preparation.labels(self, case) > 0).float().repeat_interleave(self.versions, 0)
        return torch.cat([images, lungs[:, None]], dim=1), labels


@dataclass(frozen=True)
class SurroundingsTask(NoduleTask):
    """X-rays with trees and one nodule each, and with their lungs."""

    painter: ClassVar[type[Painted]] = PaintedSurroundings
