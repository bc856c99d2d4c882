"""Human correction effort: how many clicks turn a mask into the right one (Qin et al., ECCV 2022).

What is false and borders on what is right is cut off along their border, which costs a click at each of the border's
dominant points (Ramer-Douglas-Peucker); what is missing costs those of its border on the background. A part that has no
such border, an island to be deleted or a hole to be filled, costs a single click. Errors thin enough to lie within the
tolerance of a hand cost nothing, unless they take a part of the structure's skeleton away.
"""

from typing import NamedTuple

import numpy as np
from scipy import ndimage
from skimage import measure
from skimage.morphology import skeletonize

CROSS = ndimage.generate_binary_structure(2, 1)


class Effort(NamedTuple):
    """Clicks at dominant points and on whole parts, of what is false and of what is missing; their sum is `clicks`."""

    false_points: int
    false_parts: int
    missing_points: int
    missing_parts: int

    @property
    def clicks(self) -> int:
        return sum(self)


def correction_effort(truth, guess, relax: int = 5, tolerance: float = 2.0) -> Effort:
    """The effort to correct one mask (H, W) into another.

    relax      pixels by which a border may be off at no cost
    tolerance  pixels by which a polygon through the dominant points may be off the border
    """
    truth, guess = np.asarray(truth, dtype=bool), np.asarray(guess, dtype=bool)
    false, missing = relaxed_errors(truth, guess, relax)
    right = truth & guess
    of_false = effort_of(false, right | missing, tolerance)
    return Effort(*of_false, *effort_of(missing, ~(right | false | missing), tolerance))


def relaxed_errors(truth: np.ndarray, guess: np.ndarray, relax: int) -> tuple[np.ndarray, np.ndarray]:
    """(false, missing): what of the errors is left once the union of both masks has been eroded `relax` times.

    What is left grows back as often, not into the other mask, so that parts which survive come back whole.
    """
    core = truth | guess
    if relax:
        core = ndimage.binary_erosion(core, CROSS, iterations=relax, border_value=1)
    false = grown(guess & ~truth & core, ~truth, relax) & guess
    missing = grown(truth & ~guess & core, ~guess, relax) & truth
    return false, missing | (skeletonize(truth) & ~guess)


def grown(seed: np.ndarray, room: np.ndarray, steps: int) -> np.ndarray:
    """A mask after as many dilations, each within the room."""
    return ndimage.binary_dilation(seed, CROSS, iterations=steps, mask=room) if steps else seed


def effort_of(region: np.ndarray, beside: np.ndarray, tolerance: float) -> tuple[int, int]:
    """(points, parts): dominant points of the region's borders on `beside`, and its parts that have none on it."""
    parts, beside = measure.label(np.pad(region, 1)), np.pad(beside, 1)
    points, bordering = 0, set()
    for contour in measure.find_contours(parts > 0, 0.5, fully_connected="high"):
        ends = np.stack([np.floor(contour), np.ceil(contour)]).astype(int)  # a point lies between two pixels
        faces = beside[ends[..., 0], ends[..., 1]].any(axis=0)
        bordering.update(parts[ends[..., 0], ends[..., 1]].max(axis=0)[faces])
        points += sum(dominant_points(stretch, tolerance) for stretch in stretches(contour, faces))
    return points, int(parts.max()) - len(bordering)


def stretches(contour: np.ndarray, kept: np.ndarray) -> list[np.ndarray]:
    """The stretches of a closed contour (N, 2) whose points are kept; if all are, it begins far from the middle."""
    ring, kept = contour[:-1], kept[:-1]
    if kept.all():
        ring = np.roll(ring, -np.argmax(np.linalg.norm(ring - ring.mean(axis=0), axis=1)), axis=0)
        return [np.concatenate([ring, ring[:1]])]
    start = np.argmin(kept)
    ring, kept = np.roll(ring, -start, axis=0), np.roll(kept, -start)
    cuts = np.flatnonzero(np.diff(kept)) + 1
    return [part for part, stay in zip(np.split(ring, cuts), np.split(kept, cuts), strict=True) if stay[0]]


def dominant_points(line: np.ndarray, tolerance: float) -> int:
    """How many points a polygon through a line (N, 2) needs; the point at which a closed one ends counts once."""
    closed = len(line) > 1 and np.array_equal(line[0], line[-1])
    return len(measure.approximate_polygon(line, tolerance)) - closed
