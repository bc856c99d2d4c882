"""Airways, arteries and veins drawn into the lungs of real X-rays, as they lie: arteries beside airways, veins apart.

Airways are dark between bright walls; arteries and veins look alike, bright as deep as they are. An artery follows each
airway at its side. Veins grow between, where there is room, and cross only thin branches. So what tells an artery from
a vein is what lies beside it, and where it is in the lung. Branches get thinner and fainter outwards.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from scipy import ndimage

from medcook.recipes.anatomy import _airways, _trees
from medcook.recipes.anatomy._airways import both_lungs, inner
from medcook.recipes.anatomy._boxes import BoxPreparation
from medcook.recipes.anatomy._planted import Planted, PlantedTrees, TreeTask
from medcook.recipes.anatomy._trees import Branch, Growth, Tree

STRUCTURES = {1: "airway", 2: "artery", 3: "vein"}
AIRWAYS = Growth(radius=1.7, length=18, generations=4, shortest=5, gap=4.5, turn=(20, 45))
VEINS = Growth(radius=1.5, length=20, generations=4, shortest=5, gap=1.2, turn=(15, 40))
TRUNKS = {
    "airway": ((0.22, -30.0), (0.46, 0.0), (0.7, 30.0)),
    "vein": ((0.35, -10.0), (0.59, 15.0), (0.82, 45.0)),
}
"""Of each trunk of a lung: where it begins at the inner edge, in heights of the lung from above, and its direction, in
degrees downwards from straight outwards."""
BESIDE = 1.2
"""Pixels of 128 rows between an airway and its artery."""
THIN = 0.85
"""Radius of an artery over that of its airway."""


def lung_trees(lungs: np.ndarray, rng: np.random.Generator) -> dict[str, Tree]:
    """The three trees of both lungs (H, W) bool, by name; all empty where a lung is too small."""
    found: dict[str, list[Branch]] = {name: [] for name in STRUCTURES.values()}
    scale = lungs.shape[0] / _trees.ROWS
    for cells, right in zip(both_lungs(lungs), (True, False), strict=True):
        if len(cells) < 60:
            continue
        field = np.zeros(lungs.shape, bool)
        field[tuple(cells.T)] = True
        field = ndimage.binary_erosion(field, iterations=max(1, round(2 * scale)))
        airway = _trees.grow(trunks(cells, right, "airway", rng), ndimage.binary_dilation(field), AIRWAYS, rng)
        artery = accompanying(airway, -1 if right else 1, scale)
        veins = trunks(cells, right, "vein", rng)
        wide = [branch for branch in (*airway, *artery) if branch.generation < 2]
        vein = _trees.grow(veins, ndimage.binary_dilation(field), VEINS, rng, beside=wide)
        for name, tree in zip(found, (airway, artery, vein), strict=True):
            found[name] += moved(tree, len(found[name]))
    return {name: tuple(tree) for name, tree in found.items()}


def trunks(cells: np.ndarray, right: bool, structure: str, rng: np.random.Generator) -> list[tuple]:
    """(place, angle in radians) of each trunk of a lung's cells (N, 2): from its inner edge outwards."""
    top, height = cells[:, 0].min(), max(1, np.ptp(cells[:, 0]))
    found, outwards = [], -1 if right else 1
    for level, degrees in TRUNKS[structure]:
        row = top + (level + rng.uniform(-0.03, 0.03)) * height
        start = inner(cells, row, right, 0.02 * height + 1) + [0, 2 * outwards]
        angle = np.deg2rad(degrees + rng.uniform(-10, 10))
        found.append((start, np.arctan2(np.sin(angle), outwards * np.cos(angle))))
    return found


def accompanying(tree: Tree, side: int, scale: float) -> Tree:
    """A tree beside another, all of it at the same side (1 or -1) as seen outwards; it begins where its parent ends."""
    found: list[Branch] = []
    for branch in tree:
        way = np.gradient(branch.points, axis=0)
        normal = np.stack([way[:, 1], -way[:, 0]], 1) / np.linalg.norm(way, axis=1, keepdims=True)
        radius = THIN * branch.radius
        points = branch.points + side * (branch.radius + radius + BESIDE * scale)[:, None] * normal
        if branch.parent >= 0:
            start = found[branch.parent].points[-1]
            steps = max(2, round(np.linalg.norm(points[0] - start) / _trees.STEP))
            points = np.vstack([np.linspace(start, points[0], steps)[:-1], points])
            radius = np.r_[np.full(steps - 1, radius[0]), radius]
        found.append(replace(branch, points=points, radius=radius))
    return tuple(found)


def moved(tree: Tree, by: int) -> list[Branch]:
    """Branches to be put behind `by` others."""
    return [replace(branch, parent=branch.parent + by if branch.parent >= 0 else -1) for branch in tree]


def context(lungs: np.ndarray) -> np.ndarray:
    """(2, H, W): what is known of anatomy before anything is found.

    The lung context map: 1 in the lungs (H, W), -1 between them, 0 elsewhere. The distance transform map: how far from
    the lungs' border, inside positive, outside negative, in quarters of the image's height, from -1 to 1.
    """
    place = lungs.astype(float)
    for row in np.flatnonzero(lungs.any(1)):
        columns = np.flatnonzero(lungs[row])
        place[row, columns[0] : columns[-1] + 1] += ~lungs[row, columns[0] : columns[-1] + 1] * -1.0
    distance = ndimage.distance_transform_edt(lungs) - ndimage.distance_transform_edt(~lungs) * lungs.any()
    return np.stack([place, np.clip(4 * distance / lungs.shape[0], -1, 1)])


def with_lung_trees(image: np.ndarray, lungs: np.ndarray, rng: np.random.Generator) -> Planted:
    """An X-ray (H, W) of unit variance with airways, arteries and veins, and as further channels its `context`.

    Where they cross, an airway is before an artery, and this before a vein.
    """
    trees, scale = lung_trees(lungs, rng), image.shape[0] / _trees.ROWS
    label, light = np.zeros(image.shape, np.uint8), rng.uniform(0.3, 0.45)
    shown = image.astype(float)
    for value in (3, 2, 1):
        tree = trees[STRUCTURES[value]]
        drawn = _trees.rendered(tree, image.shape)
        look = 0.8 * _airways.brightness(drawn) if value == 1 else light * drawn.thickness / scale
        shown = shown + ndimage.gaussian_filter(look, 0.5)
        label[_trees.solid(tree, drawn)] = value
    return Planted(np.concatenate([shown[None], context(lungs)]).astype(np.float32), label, trees)


@dataclass(frozen=True)
class PlantedLungTrees(PlantedTrees, BoxPreparation):
    """X-rays around the lungs, as drawn by people, with three trees in them, and what is known of anatomy."""

    margin: float = 1.1

    what: ClassVar[str] = "lung trees"

    def plant(self, image: np.ndarray, organ: np.ndarray, rng: np.random.Generator) -> Planted:
        return with_lung_trees(image, organ, rng)


@dataclass(frozen=True)
class LungTreeTask(TreeTask):
    """Airways, arteries and veins to be found; images have three channels, of which two are `context`."""

    painter: ClassVar[type[PlantedTrees]] = PlantedLungTrees
    names: ClassVar[dict[int, str]] = STRUCTURES
