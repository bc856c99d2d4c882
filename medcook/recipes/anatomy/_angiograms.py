"""Angiograms made of real X-rays: a tree like that of a coronary artery, filled with contrast, some of it narrowed.

Drawn into the middle of a chest X-ray, where the heart is, shown as angiograms are, dark where much is absorbed. Rays
are absorbed in proportion to the thickness of the vessel, so that thin branches hardly differ from ribs and texture.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from scipy import ndimage

from medcook.recipes.anatomy import _trees
from medcook.recipes.anatomy._planted import Planted, PlantedTrees, TreeTask
from medcook.recipes.anatomy._trees import Growth, Tree

VESSELS = Growth(radius=4.2, length=36, generations=4)
MARGIN = 4
"""Pixels at the border without a vessel."""
DEGREES = (0.35, 0.75)
WIDTH = (3.5, 5.5)
"""Standard deviation of a stenosis along its vessel, in pixels of 128 rows, as all that follows."""
MOST = 3
"""Stenoses of an image: none to so many, one in a vessel, where it is at least so wide and long:"""
WIDE, LONG = 2.2, 22.0
DARK = (0.2, 0.4)
"""Absorption by a pixel's depth of contrast, in standard deviations of the X-ray."""


def coronary(size: tuple[int, int], rng: np.random.Generator) -> Tree:
    """A tree that comes from above, with none to `MOST` stenoses."""
    scale, field = size[0] / _trees.ROWS, np.zeros(size, bool)
    edge = max(1, round(MARGIN * scale))
    field[edge:-edge, edge:-edge] = True
    start = (2 * edge, size[1] * rng.uniform(0.3, 0.7))
    tree = list(_trees.grow([(start, np.deg2rad(90 + rng.uniform(-25, 25)))], field, VESSELS, rng))
    fit = [k for k, one in enumerate(tree) if one.radius[-1] >= WIDE * scale and one.length >= LONG * scale]
    for number in rng.permutation(fit)[: rng.integers(MOST + 1)]:
        branch = tree[number]
        at = round(rng.uniform(0.35, 0.65) * (len(branch.points) - 1))
        tree[number] = _trees.narrowed(branch, at, rng.uniform(*DEGREES), rng.uniform(*WIDTH) * scale)
    return tuple(tree)


def angiogram(image: np.ndarray, rng: np.random.Generator) -> Planted:
    """An X-ray (H, W) of unit variance with a tree of vessels, and their mask."""
    tree = coronary(image.shape, rng)
    drawn, scale = _trees.rendered(tree, image.shape), image.shape[0] / _trees.ROWS
    depth = ndimage.gaussian_filter(drawn.thickness, 0.6) / scale
    shown = -(image + rng.uniform(*DARK) * depth)
    return Planted(shown[None], _trees.solid(tree, drawn).astype(np.uint8), {"vessels": tree})


@dataclass(frozen=True)
class PlantedVessels(PlantedTrees):
    """Angiograms; what the case has labelled plays no part."""

    what: ClassVar[str] = "vessels"

    def plant(self, image: np.ndarray, organ: np.ndarray, rng: np.random.Generator) -> Planted:
        return angiogram(image, rng)


@dataclass(frozen=True)
class AngiogramTask(TreeTask):
    """Vessels to be found in angiograms."""

    side: int = 96
    zoom: float = 2.0

    painter: ClassVar[type[PlantedTrees]] = PlantedVessels
    names: ClassVar[dict[int, str]] = {1: "vessel"}
