"""What can be said of a mask beside its name; and which slices of a case are asked about."""

import numpy as np
import torch
from scipy import ndimage
from skimage.measure import regionprops
from torch import Tensor

LEAST = 8
"""Pixels of a structure in a slice below which nobody is asked about it."""


def described(mask: np.ndarray) -> dict[str, str]:
    """What can be said of a mask (H, W) bool that is not empty: number, size, shape and place.

    number  one, two or several parts;   size  below 2% of the image, up to 8%, and above
    shape   of the largest part: irregular where it fills little of its convex hull, else round or elongated
    place   of the middle: left, center or right, and top, middle or bottom, by thirds of the image
    """
    parts, count = ndimage.label(mask)
    largest = max(regionprops(parts), key=lambda part: part.area)
    shape = "elongated" if largest.eccentricity > 0.75 else "round"
    share = mask.mean()
    down, across = (int(3 * (k + 0.5) / side) for k, side in zip(np.argwhere(mask).mean(0), mask.shape, strict=True))
    return {
        "number": ("one", "two", "several")[min(count, 3) - 1],
        "size": "small" if share < 0.02 else "medium" if share < 0.08 else "large",
        "shape": "irregular" if largest.solidity < 0.8 else shape,
        "place": f"{('top', 'middle', 'bottom')[down]} {('left', 'center', 'right')[across]}",
    }


WORDS = {
    "number": ("one", "two", "several"),
    "size": ("small", "medium", "large"),
    "shape": ("round", "elongated", "irregular"),
    "place": tuple(f"{row} {column}" for row in ("top", "middle", "bottom") for column in ("left", "center", "right")),
}


def wrong(true: dict[str, str]) -> dict[str, str]:
    """Another word for everything that is said: the one that follows."""
    return {what: WORDS[what][(WORDS[what].index(word) + 1) % len(WORDS[what])] for what, word in true.items()}


def anything() -> dict[str, str]:
    """Something said at random, by torch's own generator."""
    return {what: words[int(torch.randint(len(words), ()))] for what, words in WORDS.items()}


def prompt(name: str, words: dict[str, str] | None) -> str:
    """A name, and what is said of it."""
    if words is None:
        return name
    return f"{words['number']} {words['size']} {words['shape']} {name} located in the {words['place']} of the image"


def showing(masks: Tensor, most: int) -> Tensor:
    """Numbers of at most so many of masks (N, H, W) bool that show at least `LEAST` pixels, spread over all that do."""
    there = (masks.flatten(1).sum(1) >= LEAST).nonzero()[:, 0]
    return there[[round(k) for k in np.linspace(0, len(there) - 1, min(most, len(there)))]]


def dice(found: Tensor, masks: Tensor) -> float:
    """The mean over masks (N, H, W) bool, none of which is empty."""
    shared = (found & masks).flatten(1).sum(1)
    return float((2 * shared / (found.flatten(1).sum(1) + masks.flatten(1).sum(1))).mean())
