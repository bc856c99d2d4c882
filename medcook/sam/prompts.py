"""Prompts: points, a box, a scribble, a rough mask; checked when made, and drawn at random or by rule from a truth."""

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from medcook.errors import MedcookError

Points = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Prompt:
    """What a person shows about one object, in pixels of the image: x to the right, y down, as in SAM.

    foreground, background   points (x, y) on the object and beside it; a scribble is many points
    box                      (left, top, right, bottom) around the object
    mask                     (height, width) a rough mask, or logits of an earlier answer
    """

    foreground: Points = ()
    background: Points = ()
    box: tuple[float, float, float, float] | None = None
    mask: np.ndarray | None = None

    def check(self, shape: tuple[int, int]) -> None:
        """MedcookError where the prompt says nothing, or lies outside an image of (height, width) `shape`."""
        height, width = shape
        if not (self.foreground or self.background or self.box is not None or self.mask is not None):
            raise MedcookError("The prompt is empty.", "Give a point, a box, a scribble or a mask.")
        corners = () if self.box is None else (self.box[:2], self.box[2:])
        for x, y in (*self.foreground, *self.background, *corners):
            if not (0 <= x <= width and 0 <= y <= height):
                where = f"({x:g}, {y:g}) lies outside the image of {width} x {height} pixels"
                raise MedcookError(f"The prompt's point {where}.", "Give x, then y, in pixels.")
        if self.box is not None and not (self.box[0] < self.box[2] and self.box[1] < self.box[3]):
            raise MedcookError(f"The box {self.box} has no area.", "Give left, top, right, bottom.")
        if self.mask is not None and self.mask.shape != shape:
            raise MedcookError(f"The prompt's mask is {self.mask.shape}, the image {shape}.", "Use the same pixels.")

    def scaled(self, factor: float) -> "Prompt":
        """The same prompt in an image resized by `factor` (a mask is left out: it is resized with the image)."""
        move = lambda points: tuple((x * factor, y * factor) for x, y in points)  # noqa: E731
        box = None if self.box is None else tuple(value * factor for value in self.box)
        return Prompt(move(self.foreground), move(self.background), box)

    def adding(self, point: tuple[float, float], is_foreground: bool, mask: np.ndarray | None = None) -> "Prompt":
        """The prompt with one more click, and the answer that it corrects."""
        foreground = (*self.foreground, point) if is_foreground else self.foreground
        background = self.background if is_foreground else (*self.background, point)
        return Prompt(foreground, background, self.box, mask)


def box_of(mask: np.ndarray) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) that holds every pixel of a mask (height, width)."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        raise MedcookError("An empty mask has no box.", "Ask only for structures that are there.")
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def middle_of(mask: np.ndarray) -> tuple[float, float]:
    """(x, y) of the pixel deepest inside the largest part of a mask: where a careful person clicks first."""
    row, column = deepest(mask)
    return column + 0.5, row + 0.5


def deepest(mask: np.ndarray) -> tuple[int, ...]:
    """Index of the pixel deepest inside the largest part of a mask of any dimension."""
    parts, _ = ndimage.label(mask)
    largest = parts == np.bincount(parts.ravel())[1:].argmax() + 1
    depth = ndimage.distance_transform_edt(np.pad(largest, 1))
    inner = depth[tuple(slice(1, -1) for _ in mask.shape)]
    return tuple(int(place) for place in np.unravel_index(inner.argmax(), mask.shape))


def first_click(truth: np.ndarray) -> Prompt:
    """One click in the middle of the object."""
    return Prompt(foreground=(middle_of(truth),))


def next_click(prompt: Prompt, answer: np.ndarray, truth: np.ndarray, logits: np.ndarray | None = None) -> Prompt:
    """The prompt with a click in the middle of the largest error of an answer; unchanged where there is none."""
    wrong = answer != truth
    if not wrong.any():
        return prompt
    missing, extra = truth & ~answer, answer & ~truth
    error = missing if largest_part(missing) >= largest_part(extra) else extra
    return prompt.adding(middle_of(error), error is missing, logits)


def largest_part(mask: np.ndarray) -> int:
    """Pixels of the largest connected part."""
    parts, count = ndimage.label(mask)
    return int(np.bincount(parts.ravel())[1:].max()) if count else 0
