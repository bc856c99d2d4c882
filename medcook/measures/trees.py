"""How much of a tree, such as the airways, a segmentation finds: the measures of ATM'22 (Zhang et al., MedIA 2023).

The true tree is thinned to its centre line. Tree length detected is the share of the centre line's voxels within the
segmentation; a branch, what lies between two forks, is detected where that share is at least 0.8. Both look at the true
tree alone and so reward a segmentation that leaks, which is why precision stands beside them. Of a segmentation only
the largest connected part counts, since nobody can reach the others.
"""

from typing import NamedTuple

import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree
from skimage.morphology import skeletonize

from medcook.errors import MedcookError


class TreeFound(NamedTuple):
    """Shares from 0 to 1. length, branches: of the true tree that is found, NaN where there is none; precision: of the
    segmentation, all parts of it, that is right, NaN where it is empty; parts: how many it has, 1 for a right tree."""

    length: float
    branches: float
    precision: float
    parts: int


def tree_found(truth, guess) -> TreeFound:
    """All measures of one segmentation, both of (X, Y, Z) or (H, W), non-zero is the tree."""
    truth, guess = np.asarray(truth) != 0, np.asarray(guess) != 0
    if truth.shape != guess.shape:
        raise MedcookError(f"The true tree is of {truth.shape}, the segmentation of {guess.shape}.", "Resample one.")
    line, reached = centre_line(truth), largest_part(guess)
    return TreeFound(
        length=tree_length_detected(line, reached),
        branches=branches_detected(branches_of(line), reached),
        precision=float((truth & guess).sum() / guess.sum()) if guess.any() else np.nan,
        parts=ndimage.label(guess)[1],
    )


def tree_length_detected(line: np.ndarray, guess: np.ndarray) -> float:
    """The share of a centre line within a mask of its shape; NaN where there is no line."""
    return float(guess[line].mean()) if line.any() else np.nan


def branches_detected(branches: np.ndarray, guess: np.ndarray, least: float = 0.8) -> float:
    """The share of branches, numbered from 1, that are within a mask by at least so much; NaN where there are none.

    A number without a voxel is of no branch.
    """
    length = np.bincount(branches.ravel())[1:]
    found = np.bincount(branches[guess], minlength=len(length) + 1)[1:]
    there = length > 0
    return float((found[there] / length[there] >= least).mean()) if there.any() else np.nan


def centre_line(tree: np.ndarray) -> np.ndarray:
    """The skeleton, bool, of a tree's largest part, whose cavities are filled before."""
    tree, line = largest_part(tree), np.zeros(tree.shape, bool)
    if tree.any():
        box = ndimage.find_objects(tree.astype(np.uint8))[0]
        inner = np.pad(ndimage.binary_fill_holes(tree[box]), 1)
        line[box] = skeletonize(inner)[(slice(1, -1),) * tree.ndim] > 0
    return line


def branches_of(line: np.ndarray, shortest: int = 5) -> np.ndarray:
    """Each voxel of a centre line with the number of its branch, from 1; 0 elsewhere.

    A voxel with more than two neighbours is a fork and divides. What is then left in pieces of at least `shortest`
    voxels are the branches; forks and shorter pieces belong to the nearest of them. The challenge also joins some
    branches by their place in the tree, which is not done here.
    """
    around = np.ones((3,) * line.ndim, np.uint8)
    crowd = ndimage.convolve(line.astype(np.uint8), around, mode="constant")
    pieces = ndimage.label(line & (crowd <= 3), around)[0]
    long = np.bincount(pieces.ravel()) >= shortest
    long[0] = False
    if not long.any():
        return line.astype(int)
    numbers = (np.cumsum(long) * long)[pieces]
    places, owned = np.argwhere(line), np.argwhere(numbers)
    nearest = cKDTree(owned).query(places)[1]
    numbers[tuple(places.T)] = numbers[tuple(owned[nearest].T)]
    return numbers


def largest_part(mask: np.ndarray, corners: bool = False) -> np.ndarray:
    """The largest of a mask's parts that are connected by faces, or by corners, too; an empty mask as it is."""
    parts = ndimage.label(mask, np.ones((3,) * mask.ndim) if corners else None)[0]
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    return mask & (parts == sizes.argmax()) if mask.any() else mask
