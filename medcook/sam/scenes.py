"""Synthetic scenes: everything that the book's small SAM has ever seen. No real image is used.

A scene is a map of numbered regions and a list of targets, each a set of regions: random closed curves, boxes, tubes,
rings with something inside, nested and paired objects over a background of tissue-like regions, all under one smooth
random deformation. Its appearance is drawn apart from it (`appearance.py`). A scene is a function of its seed.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage

SIZE = 160
SMALLEST, LARGEST = 30, 0.6
"""Areas of a target: pixels, and share of the image."""

Shape = np.ndarray
"""(SIZE, SIZE) bool."""


@dataclass(frozen=True)
class Scene:
    """regions (SIZE, SIZE) uint8, numbered from 0; targets are tuples of region numbers.

    looks (256,) uint8: as which region each region looks, mostly as itself
    """

    regions: np.ndarray
    targets: tuple[tuple[int, ...], ...]
    looks: np.ndarray

    @property
    def seen(self) -> np.ndarray:
        """(SIZE, SIZE) uint8 regions of one look each: what `appearance` takes."""
        return self.looks[self.regions]

    def mask(self, target: int) -> np.ndarray:
        """(SIZE, SIZE) bool of one target."""
        chosen = np.zeros(256, bool)
        chosen[list(self.targets[target])] = True
        return chosen[self.regions]


def scene(seed: int) -> Scene:
    """The scene of a seed: background regions, then two to seven objects, the later ones in front."""
    rng = np.random.default_rng([17, seed])
    x, y = warped_grid(rng)
    painter = Painter(partition(rng, int(rng.integers(1, 6))))
    for _ in range(int(rng.integers(2, 8))):
        kind = rng.choice(len(KINDS), p=CHANCES)
        KINDS[kind](painter, x, y, rng)
    return painter.finish()


class Painter:
    """Paints objects over a background and remembers which regions belong together."""

    def __init__(self, background: np.ndarray):
        self.regions = background.astype(np.uint8)
        self.count = self.tissues = int(background.max()) + 1
        self.looks = np.arange(256, dtype=np.uint8)
        self.targets = [(number,) for number in range(self.count)]

    def paint(self, shape: Shape, like: int | None = None) -> int:
        """A new region, which may look like another; its number."""
        self.regions[shape] = self.count
        if like is not None:
            self.looks[self.count] = self.looks[like]
        self.count += 1
        return self.count - 1

    def target(self, *numbers: int) -> None:
        self.targets.append(numbers)

    def finish(self) -> Scene:
        """The scene with the targets of a sensible size; of the tissues one at most, most of which hangs together."""
        areas = np.bincount(self.regions.ravel(), minlength=self.count)
        keep = [t for t in self.targets if SMALLEST <= areas[list(t)].sum() <= LARGEST * self.regions.size]
        whole = [t for t in keep if t[0] < self.tissues and in_one_piece(self.regions == t[0])]
        keep = whole[:1] + [t for t in keep if t[0] >= self.tissues]
        if not keep:  # everything was covered or cut off: one plain disc in the middle
            rows, columns = np.ogrid[:SIZE, :SIZE]
            keep = [(self.paint((rows - SIZE / 2) ** 2 + (columns - SIZE / 2) ** 2 < (SIZE / 6) ** 2),)]
        return Scene(self.regions, tuple(keep), self.looks)


def in_one_piece(mask: Shape, share: float = 0.9) -> bool:
    """Whether the largest connected part holds at least `share` of a mask."""
    parts, _ = ndimage.label(mask)
    sizes = np.bincount(parts.ravel())[1:]
    return sizes.max() >= share * sizes.sum()


def warped_grid(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates x and y from -1 to 1, smoothly deformed: straight shapes on them come out bent."""
    y, x = np.meshgrid(*[np.linspace(-1, 1, SIZE, dtype=np.float32)] * 2, indexing="ij")
    strength = rng.uniform(0, 0.25)
    return x + strength * smooth(rng, int(rng.integers(2, 6))), y + strength * smooth(rng, int(rng.integers(2, 6)))


def smooth(rng: np.random.Generator, knots: int) -> np.ndarray:
    """(SIZE, SIZE) smooth random field with standard deviation near 1: `knots` values a side, interpolated."""
    values = torch.from_numpy(rng.standard_normal((1, 1, knots + 1, knots + 1)).astype(np.float32))
    return F.interpolate(values, (SIZE, SIZE), mode="bicubic", align_corners=True)[0, 0].numpy()


def partition(rng: np.random.Generator, count: int) -> np.ndarray:
    """Tissue-like regions: where each of `count` smooth fields is the largest."""
    if count == 1:
        return np.zeros((SIZE, SIZE), np.uint8)
    return np.stack([smooth(rng, int(rng.integers(2, 7))) for _ in range(count)]).argmax(0)


def outline(x, y, rng: np.random.Generator, radius: float, centre, rough: float) -> np.ndarray:
    """Level of a random closed curve: below 1 inside. An ellipse whose radius has a few random waves."""
    turn, stretch = rng.uniform(0, np.pi), np.exp(rng.uniform(-0.5, 0.5))
    u = (x - centre[0]) * np.cos(turn) + (y - centre[1]) * np.sin(turn)
    v = (y - centre[1]) * np.cos(turn) - (x - centre[0]) * np.sin(turn)
    u, v = u / (radius * stretch), v / (radius / stretch)
    angle, wave = np.arctan2(v, u), 1.0
    for order in range(2, 6):
        wave = wave + rough * rng.normal() / order * np.cos(order * angle + rng.uniform(0, 2 * np.pi))
    return np.hypot(u, v) / np.maximum(wave, 0.3)


def place(rng: np.random.Generator) -> tuple[float, np.ndarray, float]:
    """Radius (small ones more often), centre and roughness of an object."""
    return (
        float(np.exp(rng.uniform(np.log(0.05), np.log(0.6)))),
        rng.uniform(-0.75, 0.75, 2),
        rng.choice([0.0, 0.1, 0.3]),
    )


def blob(painter: Painter, x, y, rng) -> None:
    """One closed curve."""
    painter.target(painter.paint(outline(x, y, rng, *place(rng)) < 1))


def block(painter: Painter, x, y, rng) -> None:
    """A box, or something between a box and an ellipse."""
    radius, centre, _ = place(rng)
    turn, power, stretch = rng.uniform(0, np.pi), rng.uniform(2, 8), np.exp(rng.uniform(-0.8, 0.8))
    u = (x - centre[0]) * np.cos(turn) + (y - centre[1]) * np.sin(turn)
    v = (y - centre[1]) * np.cos(turn) - (x - centre[0]) * np.sin(turn)
    inside = np.abs(u / (radius * stretch)) ** power + np.abs(v / (radius / stretch)) ** power < 1
    painter.target(painter.paint(inside))


def tube(painter: Painter, x, y, rng) -> None:
    """A wavy band of finite length; sometimes thicker at one end."""
    turn, centre = rng.uniform(0, np.pi), rng.uniform(-0.6, 0.6, 2)
    u = (x - centre[0]) * np.cos(turn) + (y - centre[1]) * np.sin(turn)
    v = (y - centre[1]) * np.cos(turn) - (x - centre[0]) * np.sin(turn)
    length, width = rng.uniform(0.2, 1.2), np.exp(rng.uniform(np.log(0.025), np.log(0.12)))
    bend = rng.uniform(0, 0.25) * np.sin(rng.uniform(1, 6) * u + rng.uniform(0, 6))
    taper = 1 + rng.uniform(-0.7, 0.7) * u / length
    painter.target(painter.paint((np.abs(v - bend) < width * taper) & (np.abs(u) < length)))


def ring(painter: Painter, x, y, rng) -> None:
    """A wall around a cavity, sometimes open, sometimes with a neighbour that hugs it; each alone and both together."""
    radius, centre, rough = place(rng)
    radius = max(radius, 0.12)
    rough *= 0.4
    state = rng.bit_generator.state
    level = outline(x, y, rng, radius, centre, rough)
    if rng.random() < 0.5:
        hug = rng.uniform(0.5, 1.2) * radius * np.array([np.cos(t := rng.uniform(0, 6.28)), np.sin(t)])
        painter.target(painter.paint(outline(x, y, rng, radius * rng.uniform(0.5, 1.3), centre + hug, rough) < 1))
    wall = painter.paint(level < 1)
    thin = rng.uniform(0.45, 0.9)
    again = np.random.default_rng()
    again.bit_generator.state = state
    shift = rng.normal(0, 0.04, 2) * radius
    inner = outline(x, y, again, radius * thin, centre + shift, rough)
    cavity = painter.paint((inner < 1) & (level < 1))
    like = wall if rng.random() < 0.75 else None
    filled = [cavity]
    if rng.random() < 0.4:
        filled += intruders(painter, x, y, rng, painter.regions == cavity, like)
    if rng.random() < 0.4:
        filled.append(painter.paint(bites(rng, inner) & (painter.regions == cavity), like))
    painter.target(wall)
    painter.target(*filled)
    if rng.random() < 0.25:  # open: a mandible, a horseshoe
        start, width = rng.uniform(-np.pi, np.pi), rng.uniform(0.5, 2.5)
        angle = (np.arctan2(y - centre[1], x - centre[0]) - start) % (2 * np.pi)
        painter.regions[(painter.regions == wall) & (angle < width)] = cavity
    elif rng.random() < 0.3:
        painter.target(wall, *filled)


def bites(rng: np.random.Generator, level: np.ndarray) -> Shape:
    """What a ragged border takes from inside a level of 1, as trabeculae do from a ventricle."""
    return level > 1 - rng.uniform(0.1, 0.6) * np.maximum(smooth(rng, int(rng.integers(10, 30))), 0)


def intruders(painter: Painter, x, y, rng, cavity: Shape, like: int | None = None) -> list[int]:
    """One to five small things at the border of a cavity that count as cavity, as papillary muscles do in a heart.

    like  the region that they look like, or None: each as itself
    """
    border = np.argwhere(cavity & ~ndimage.binary_erosion(cavity, iterations=max(1, int(cavity.sum() ** 0.5 / 8))))
    numbers, size = [], (cavity.sum() / np.pi) ** 0.5 * 2 / SIZE
    for _ in range(int(rng.integers(1, 6)) if len(border) else 0):
        row, column = border[rng.integers(len(border))]
        small = outline(x, y, rng, size * rng.uniform(0.1, 0.35), (x[row, column], y[row, column]), 0.2) < 1
        numbers.append(painter.paint(small & cavity, like))
    return numbers


def nested(painter: Painter, x, y, rng) -> None:
    """An object with one to three smaller ones in it: a lesion in an organ, nuclei in a cell."""
    radius, centre, rough = place(rng)
    radius = max(radius, 0.15)
    level = outline(x, y, rng, radius, centre, rough)
    numbers = [painter.paint(level < 1)]
    for _ in range(int(rng.integers(1, 4))):
        inside = centre + rng.uniform(-0.5, 0.5, 2) * radius
        part = outline(x, y, rng, radius * rng.uniform(0.15, 0.5), inside, rough) < 1
        numbers.append(painter.paint(part & (level < 1)))
        painter.target(numbers[-1])
    painter.target(*numbers)


def pair(painter: Painter, x, y, rng) -> None:
    """Two like objects left and right of an axis: one target together, and each alone."""
    radius, centre, rough = place(rng)
    radius, apart = max(radius, 0.1), rng.uniform(1.0, 1.8)
    lean = rng.normal(0, 0.15)
    state = rng.bit_generator.state
    sides = []
    for side in (-1, 1):
        same = np.random.default_rng()
        same.bit_generator.state = state
        middle = centre * np.array([0.3, 1.0])
        u, v = side * (x - middle[0]), y - middle[1]
        sides.append(painter.paint(outline(u, v + lean * u, same, radius, (apart * radius / 1.5, 0.0), rough) < 1))
    painter.target(*sides)
    painter.target(sides[int(rng.integers(2))])


KINDS = (blob, block, tube, ring, nested, pair)
CHANCES = (0.23, 0.07, 0.11, 0.34, 0.13, 0.12)
