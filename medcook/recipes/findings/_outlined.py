"""A nodule's outline found inside its box, and radiomic features of any region.

Four ways to part the grey values of a box in two, of which the brighter part is the nodule: Otsu's threshold, k-means,
fuzzy C-means and a mixture of two Gaussians. Features are those of `_radiomics`, of the pixels of a mask: first order
(17), runs (16) and zones (16), with shape (8) and co-occurrence (7).
"""

import warnings
from collections.abc import Callable
from types import MappingProxyType

import numpy as np
from scipy import ndimage
from skimage.measure import regionprops

from medcook.recipes.domain_shift._radiomics import (
    DIRECTIONS,
    TINY,
    entropy,
    first_order,
    grey_levels,
    runs,
    sizes,
    zones,
)

STEPS = 100
SQUARE = np.ones((3, 3), bool)
COUNT = 64
"""How many features a region has."""


def otsu(values: np.ndarray) -> np.ndarray:
    """Which of the values (N,) are above the threshold that leaves least variance on both sides (Otsu 1979)."""
    ordered = np.sort(values)
    below = np.arange(1, len(values))
    total = ordered.cumsum()
    means = total[:-1] / below, (total[-1] - total[:-1]) / (len(values) - below)
    between = below * (len(values) - below) * (means[0] - means[1]) ** 2
    return values >= ordered[1 + between.argmax()]


def k_means(values: np.ndarray) -> np.ndarray:
    """Which of the values (N,) are nearer to the brighter of two means; these begin at the ends."""
    dark, bright = values.min(), values.max()
    for _ in range(STEPS):
        mine = abs(values - bright) < abs(values - dark)
        means = values[~mine].mean() if not mine.all() else dark, values[mine].mean() if mine.any() else bright
        if means == (dark, bright):
            break
        dark, bright = means
    return mine


def fuzzy_c_means(values: np.ndarray, tolerance: float = 1e-6) -> np.ndarray:
    """Which of the values (N,) belong more to the brighter of two centres."""
    return memberships(values, tolerance)[1] > 0.5


def memberships(values: np.ndarray, tolerance: float = 1e-6) -> tuple[np.ndarray, np.ndarray]:
    """Centres (2,), the darker first, and how much of each value (N,) belongs to the brighter one (Bezdek 1981).

    The exponent is 2: they minimise the sum of u^2 (x - c)^2 over values and centres.
    """
    centres = np.array([values.min(), values.max()])
    for _ in range(STEPS):
        dark, bright = (values[:, None] - centres).T ** 2 + TINY
        u = dark / (dark + bright)
        shares = np.stack([1 - u, u]) ** 2
        moved = (shares @ values) / shares.sum(1)
        done, centres = abs(moved - centres).max() < tolerance, moved
        if done:
            break
    return centres, u


def mixture(values: np.ndarray) -> np.ndarray:
    """Which of the values (N,) more probably come from the brighter of two normal distributions, fitted by EM."""
    return responsibilities(values)[1] > 0.5


def responsibilities(values: np.ndarray, tolerance: float = 1e-6) -> tuple[np.ndarray, np.ndarray]:
    """Means (2,) and the probability (N,) that each value is of the brighter one; EM begins with k-means."""
    u, before = k_means(values).astype(float), -np.inf
    for _ in range(STEPS):
        shares = np.stack([1 - u, u]) + TINY
        weight = shares.sum(1)
        means = (shares @ values) / weight
        spread = (shares * (values - means[:, None]) ** 2).sum(1) / weight + 1e-6
        log = np.log(weight / len(values)) - 0.5 * np.log(2 * np.pi * spread)
        log = log[:, None] - 0.5 * (values - means[:, None]) ** 2 / spread[:, None]
        top = np.logaddexp(*log)
        u, likelihood = np.exp(log[means.argmax()] - top), top.mean()
        if means[1] < means[0]:
            means = means[::-1]
        if likelihood - before < tolerance:
            break
        before = likelihood
    return means, u


SEGMENTERS: MappingProxyType[str, Callable[[np.ndarray], np.ndarray]] = MappingProxyType(
    {"otsu": otsu, "k-means": k_means, "fuzzy c-means": fuzzy_c_means, "mixture": mixture}
)


def outlined(image: np.ndarray, truth: np.ndarray, how: str, margin: int) -> np.ndarray:
    """The nodule (H, W) bool in an image (H, W), found within `margin` pixels of the box around `truth` (H, W) bool.

    Of the truth nothing but its box is looked at. Small gaps are closed and what is thinner than three pixels goes,
    unless nothing would be left.
    """
    box = tuple(
        slice(max(0, part.start - margin), part.stop + margin) for part in ndimage.find_objects(truth.astype(int))[0]
    )
    values = image[box].astype(float)
    bright = SEGMENTERS[how](values.ravel()).reshape(values.shape)
    tidy = ndimage.binary_opening(ndimage.binary_closing(bright, SQUARE), SQUARE)
    found = np.zeros(image.shape, bool)
    found[box] = tidy if tidy.any() else bright
    return found


def expanded(mask: np.ndarray, steps: int) -> np.ndarray:
    """The mask (H, W) and all pixels at most so many chessboard steps from it."""
    return ndimage.binary_dilation(mask, SQUARE, iterations=steps) if steps else mask


def described(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """(64,) features of the pixels of an image (H, W) that are in a mask (H, W), which has some."""
    rows, columns = ndimage.find_objects(mask.astype(int))[0]
    image, mask = image[rows, columns].astype(float), mask[rows, columns]
    levels = np.full(mask.shape, -1)
    levels[mask] = grey_levels(image[mask])
    count = int(mask.sum())
    parts = (
        first_order(image[mask], levels[mask]),
        shape(mask),
        cooccurring(levels),
        sizes(runs(levels), count),
        sizes(zones(levels), count),
    )
    return np.nan_to_num(np.concatenate(parts))


def shape(mask: np.ndarray) -> np.ndarray:
    """(8,) area, perimeter, circularity, eccentricity, both axes, share of the box, share of the convex hull."""
    (found,) = regionprops(mask.astype(np.uint8))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a hull without an area
        hull = max(found.area_convex, found.area)
    circular = 4 * np.pi * found.area / max(found.perimeter, 1.0) ** 2
    axes = found.axis_major_length, found.axis_minor_length
    return np.array([found.area, found.perimeter, circular, found.eccentricity, *axes, found.extent, found.area / hull])


def cooccurring(levels: np.ndarray) -> np.ndarray:
    """(7,) of neighbours that are both in the mask, each the mean over the directions; levels below 0 are outside.

    Contrast, dissimilarity, homogeneity, energy, entropy, correlation and cluster shade.
    """
    count, found = levels.max() + 1, []
    i, j = np.indices((count, count))
    for down, right in DIRECTIONS:
        one = levels[: levels.shape[0] - down, max(0, -right) : levels.shape[1] - max(0, right)]
        other = levels[down:, max(0, right) : levels.shape[1] + min(0, right)]
        both = (one >= 0) & (other >= 0)
        if not both.any():
            continue
        pairs = np.bincount(one[both] * count + other[both], minlength=count**2).reshape(count, count)
        p = (pairs + pairs.T) / (2 * pairs.sum())
        mean = (p * i).sum()
        variance = (p * (i - mean) ** 2).sum()
        together = (p * (i - mean) * (j - mean)).sum()
        values = ((p * (i - j) ** 2).sum(), (p * abs(i - j)).sum(), (p / (1 + (i - j) ** 2)).sum(), (p**2).sum())
        related = together / variance if variance > TINY else 1.0
        found.append([*values, entropy(p), related, (p * (i + j - 2 * mean) ** 3).sum()])
    return np.mean(found, axis=0) if found else np.zeros(7)
