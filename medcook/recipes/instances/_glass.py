"""Glass slides composed of real tissue: cross-sections that lie torn and close together, among dust and pen markings.

A slide holds neighbouring slices of one patient's organ, cut out along its real masks and turned: as on a glass slide,
where serial sections of one block lie side by side. Tissue and outlines are real; how sections lie and tear, stain,
light, dust and pen are simulated. Colours follow the law of Beer and Lambert, light = exp(-amount * absorbance), with
absorbances of haematoxylin and eosin (Ruifrok and Johnston 2001). What is dark in the image takes more of both.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import ndimage
from skimage import draw

from medcook.measures.trees import largest_part

STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11]])
"""Absorbance of red, green and blue: haematoxylin, eosin."""
INKS = {
    "black": (1.0, 1.0, 0.95),
    "blue": (1.1, 0.7, 0.15),
    "green": (1.0, 0.25, 0.75),
    "red": (0.12, 1.0, 0.9),
}
LEAST = 0.03
"""The smallest share of a piece's square that counts as a section; what is smaller is no part of a slide."""
TRIES = 30


Maps = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Grey, structures and sections of a slide, as they fill up."""


class Piece(NamedTuple):
    """A section before it lies on a slide: grey (h, w), 0 to 1 on tissue; label (h, w) uint8, 0 beside it."""

    grey: np.ndarray
    label: np.ndarray


class Slide(NamedTuple):
    """light (3, H, W), 0 to 1; sections (H, W) uint8 from 1; structures (H, W) uint8: real labels; pen (H, W) bool.

    Beside tissue, sections and structures are 0.
    """

    light: np.ndarray
    sections: np.ndarray
    structures: np.ndarray
    pen: np.ndarray


@dataclass(frozen=True)
class Manner:
    """How slides are made; lengths are shares of the slide's side.

    least, most  sections on a slide
    tear, touch  chances that a section is torn, and that it touches another one
    gap          how far fragments lie apart;  apart: how far sections do that do not touch
    marks, dust  pen markings and specks, none to so many
    """

    least: int = 1
    most: int = 6
    tear: float = 0.4
    touch: float = 0.4
    gap: tuple[float, float] = (0.02, 0.06)
    apart: float = 0.025
    marks: int = 3
    dust: int = 8


CROWDED = Manner(least=3, most=6, tear=0.0, touch=0.9, marks=0)
"""Many sections, whole ones, most of which touch another; no pen."""


def cut_close(piece: Piece) -> Piece:
    """A piece without the empty rows and columns around it."""
    (box,) = ndimage.find_objects(np.uint8(piece.label > 0))
    return Piece(*(one[box] for one in piece))


def pieces(images: np.ndarray, labels: np.ndarray) -> list[Piece]:
    """Of slices (N, h, w) with label maps (N, h, w): the largest part of each that is large enough, in order."""
    found = []
    for image, label in zip(images, labels, strict=True):
        mask = largest_part(label > 0)
        if mask.mean() >= LEAST:
            low, high = np.percentile(image[mask], [2, 98])
            grey = np.clip((image - low) / max(high - low, 1e-6), 0, 1)
            found.append(cut_close(Piece(grey * mask, (label * mask).astype(np.uint8))))
    return found


def turned(piece: Piece, rng: np.random.Generator) -> Piece:
    """A piece turned by any angle, mirrored or not, in the middle of a square twice as large."""
    side, angle, mirror = max(piece.label.shape), rng.uniform(0, 2 * np.pi), rng.choice([-1, 1])
    matrix = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) * [1, mirror]
    offset = np.array(ndimage.center_of_mass(piece.label > 0)) - matrix @ np.full(2, side - 0.5)
    parts = zip(piece, (1, 0), strict=True)
    size = (2 * side, 2 * side)
    return Piece(*(ndimage.affine_transform(one, matrix, offset, size, order=order) for one, order in parts))


def torn(piece: Piece, gap: float, rng: np.random.Generator) -> Piece:
    """A piece cut along a line near its middle, whose halves lie `gap` pixels apart."""
    angle = rng.uniform(0, 2 * np.pi)
    normal, mask = np.array([np.cos(angle), np.sin(angle)]), piece.label > 0
    along = np.tensordot(normal, np.indices(mask.shape), 1)
    beyond = along > rng.uniform(*np.quantile(along[mask], [0.25, 0.75]))
    halves = [(mask & ~beyond, -gap / 2), (mask & beyond, gap / 2)]
    moved = [[np.roll(one * half, np.round(by * normal).astype(int), (0, 1)) for half, by in halves] for one in piece]
    return Piece(*(first + second for first, second in moved))


def free_place(mask: np.ndarray, taken: np.ndarray, apart: float, rng: np.random.Generator) -> tuple[int, int] | None:
    """Where (top, left) a mask (h, w) lies at random, more than `apart` pixels from what is taken (H, W).

    None: no place was found.
    """
    room = np.array(taken.shape) - mask.shape
    near = ndimage.distance_transform_edt(~taken) <= apart if taken.any() else taken
    for top, left in rng.integers(0, room + 1, (TRIES, 2)) if (room >= 0).all() else ():
        if not (near[top : top + mask.shape[0], left : left + mask.shape[1]] & mask).any():
            return int(top), int(left)
    return None


def touching_place(mask: np.ndarray, other: np.ndarray, taken: np.ndarray, rng: np.random.Generator):
    """Where (top, left) a mask (h, w) comes to lie that was pushed against another section (H, W) from any side.

    The edge of the last to come lies under it by up to three pixels. None: there is no room.
    """
    room, middle = np.array(taken.shape) - mask.shape, np.array(ndimage.center_of_mass(other))
    for angle in rng.uniform(0, 2 * np.pi, TRIES):
        way = np.array([np.cos(angle), np.sin(angle)])
        core = ndimage.binary_erosion(mask, iterations=int(rng.integers(1, 4)))
        for distance in range(max(taken.shape)):
            top, left = np.round(middle + distance * way - np.array(mask.shape) / 2).astype(int)
            if top < 0 or left < 0 or top > room[0] or left > room[1]:
                break
            shared = (slice(top, top + mask.shape[0]), slice(left, left + mask.shape[1]))
            if not (core & taken[shared]).any():
                if (mask & other[shared]).any() and (mask & taken[shared]).sum() < 0.2 * mask.sum():
                    return int(top), int(left)
                break
    return None


def laid(found: list[Piece], manner: Manner, side: int, rng: np.random.Generator) -> Maps:
    """Grey, structures and sections (side, side) of pieces that lie on a slide one after the other.

    Neighbouring slices lie on it; where the organ ends, they go back. What finds no room is left out.
    """
    maps, order = empty(side), [*range(len(found)), *range(len(found) - 2, 0, -1)]
    first, count = rng.integers(len(order)), rng.integers(manner.least, manner.most + 1)
    for step in range(count):
        piece = turned(found[order[(first + step) % len(order)]], rng)
        if rng.random() < manner.tear:
            piece = torn(piece, side * rng.uniform(*manner.gap), rng)
        piece = cut_close(piece)
        mask, sections, place = piece.label > 0, maps[2], None
        if sections.any() and rng.random() < manner.touch:
            place = touching_place(mask, sections == rng.integers(1, sections.max() + 1), sections > 0, rng)
        place = place or free_place(mask, sections > 0, side * manner.apart, rng)
        if place:
            lay(maps, piece, place)
    return maps


def empty(side: int) -> Maps:
    """Grey, structures and sections (side, side) of an empty slide."""
    return np.zeros((side, side)), np.zeros((side, side), np.uint8), np.zeros((side, side), np.uint8)


def lay(maps: Maps, piece: Piece, place: tuple[int, int]) -> None:
    """Put a piece down at (top, left), as the next section; what lies there already covers it."""
    grey, structures, sections = maps
    here = tuple(slice(start, start + size) for start, size in zip(place, piece.label.shape, strict=True))
    fresh = (piece.label > 0) & (sections[here] == 0)
    grey[here][fresh], structures[here][fresh] = piece.grey[fresh], piece.label[fresh]
    sections[here][fresh] = sections.max() + 1


def side_by_side(one: Piece, other: Piece, near: int, side: int) -> Maps:
    """Grey, structures and sections (side, side) of two pieces in a row, `near` pixels apart.

    Below zero, the edge of the second one lies under the first.
    """
    maps = empty(side)
    for piece in (one, other):
        piece = cut_close(piece)
        (height, width), taken = piece.label.shape, maps[2] > 0
        core = ndimage.binary_erosion(piece.label > 0, iterations=-near) if near < 0 else piece.label > 0
        free = ndimage.distance_transform_edt(~taken) > max(near, 0) if taken.any() else ~taken
        top = (side - height) // 2
        left = next(k for k in range(2, side) if free[top : top + height, k : k + width][core[:, : side - k]].all())
        lay(maps, piece, (top, left))
    spare = side - 1 - np.flatnonzero(maps[2].any(0)).max()
    return tuple(np.roll(one, spare // 2, axis=1) for one in maps)


def marking(sections: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(H, W) bool: a dot, a stroke, or a ring around a section (H, W)."""
    side, line = sections.shape[0], np.zeros(sections.shape, bool)
    kind = ("dot", "stroke", "ring")[rng.integers(3)]
    if kind == "dot":
        line[tuple(rng.integers(0, side, 2))] = True
        width = rng.uniform(0.015, 0.035)
    else:
        width = rng.uniform(0.006, 0.014)
        if kind == "stroke":
            rows, columns = draw.bezier_curve(*rng.integers(0, side, 6).tolist(), 1.0, shape=line.shape)
        else:
            box = ndimage.find_objects(sections)[rng.integers(sections.max())]
            middle = [(part.start + part.stop) // 2 for part in box]
            radii = [round((part.stop - part.start) / 2 + side * rng.uniform(-0.01, 0.06)) + 1 for part in box]
            rows, columns = draw.ellipse_perimeter(*middle, *radii, shape=line.shape)
        line[rows, columns] = True
    return ndimage.distance_transform_edt(~line) <= width * side


def absorbed(grey: np.ndarray, tissue: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(3, H, W): what stained tissue of these grey values (H, W) absorbs."""
    amounts, dark = rng.uniform(0.3, 0.9, 2), 1 - grey
    stains = np.stack([amounts[0] * (0.1 + dark), amounts[1] * (0.35 + 0.65 * dark)])
    return np.tensordot(STAINS.T, stains * tissue, 1)


def dusted(side: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """(3, side, side): what specks absorb, some grey and some of the colour of tissue."""
    found = np.zeros((3, side, side))
    rows, columns = np.indices((side, side))
    for _ in range(count):
        (row, column), radius = rng.uniform(0, side, 2), side * rng.uniform(0.004, 0.012)
        speck = np.exp(-((rows - row) ** 2 + (columns - column) ** 2) / (2 * radius**2))
        colour = STAINS[1] if rng.random() < 0.5 else np.ones(3)
        found += rng.uniform(0.2, 1.2) * colour[:, None, None] * speck
    return found


def lamp(side: int, rng: np.random.Generator) -> np.ndarray:
    """(3, side, side): the light of an empty slide, bright, of some hue, and brighter on one side."""
    ramp = np.linspace(-1, 1, side)
    uneven = 1 + np.add.outer(rng.uniform(-0.04, 0.04) * ramp, rng.uniform(-0.04, 0.04) * ramp)
    return rng.uniform(0.86, 0.96, (3, 1, 1)) * uneven


def composed(found: list[Piece], manner: Manner, side: int, rng: np.random.Generator) -> Slide:
    """A slide (side, side) of neighbouring pieces."""
    return painted(*laid(found, manner, side, rng), manner, rng)


def painted(grey: np.ndarray, structures: np.ndarray, sections: np.ndarray, manner: Manner, rng) -> Slide:
    """A slide of sections (H, W) that lie on it already, with dust and pen markings."""
    side = len(sections)
    taken_up = absorbed(grey, sections > 0, rng) + dusted(side, rng.integers(manner.dust + 1), rng)
    pen = np.zeros(sections.shape, bool)
    ink = np.array(list(INKS.values())[rng.integers(len(INKS))])[:, None, None]
    for _ in range(rng.integers(manner.marks + 1)):
        mark = marking(sections, rng)
        streaks = ndimage.gaussian_filter(rng.standard_normal(mark.shape), 1.0)
        taken_up += rng.uniform(0.7, 1.6) * ink * mark * (1 + 0.4 * streaks)
        pen |= mark
    light = lamp(side, rng) * np.exp(-taken_up) + 0.01 * rng.standard_normal((3, side, side))
    return Slide(np.clip(light, 0, 1).astype(np.float32), sections, structures, pen)
