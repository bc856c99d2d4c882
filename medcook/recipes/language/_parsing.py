"""Whether an answer fits its prompt, and everything that an image shows: what BiomedParse does with probabilities.

m   mean probability, and mean brightness, of the pixels that an answer claims
F   a Beta distribution for each structure, fitted to these means on training images that show it
p   of the Kolmogorov-Smirnov test of the one value: 2 min(F(m), 1 - F(m)); the geometric mean over both
"""

from typing import NamedTuple

import numpy as np
from scipy import stats
from skimage.morphology import convex_hull_image
from torch import Tensor

FEWEST = 5
"""Training images of a structure without which nothing is known of its answers, and none is rejected."""
INSIDE = 1e-3
"""Means are kept so far away from 0 and 1, where a Beta distribution has no density."""

LEAST_SPREAD = 0.01
"""Standard deviation of means that are all alike."""


def means(answer: Tensor, image: Tensor) -> tuple[float, float] | None:
    """Mean probability and brightness (0 to 1) where an answer (H, W) is above one half; None where it is nowhere."""
    mask = answer > 0.5
    if not mask.any():
        return None
    return float(answer[mask].mean()), float(image[mask].sigmoid().mean())


class Expected(NamedTuple):
    """(a, b) of the Beta distributions of a structure's mean probability and brightness."""

    probability: tuple[float, float]
    brightness: tuple[float, float]


def expected(found: list[tuple[float, float]]) -> Expected | None:
    """Fitted to what `means` found on training images, by maximum likelihood; None from too few of them."""
    if len(found) < FEWEST:
        return None
    columns = np.clip(np.array(found).T, INSIDE, 1 - INSIDE)
    return Expected(*(beta(values) for values in columns))


def beta(values: np.ndarray) -> tuple[float, float]:
    """(a, b) of the likeliest Beta distribution; where values are too much alike, the one of their mean and spread."""
    if values.std() > LEAST_SPREAD:
        try:
            return tuple(map(float, stats.beta.fit(values, floc=0, fscale=1)[:2]))
        except stats.FitError:
            pass
    mean, spread = values.mean(), max(values.std(), LEAST_SPREAD)
    total = max(mean * (1 - mean) / spread**2 - 1, 1.0)
    return float(mean * total), float((1 - mean) * total)


def p_value(found: tuple[float, float] | None, fits: Expected | None) -> float:
    """Of an answer, given what `expected` says of its structure: 0 where it claims nothing."""
    if found is None:
        return 0.0
    if fits is None:
        return 1.0
    below = np.array([stats.beta.cdf(value, *shape) for value, shape in zip(found, fits, strict=True)])
    return float(np.prod(2 * np.minimum(below, 1 - below)) ** (1 / len(below)))


def recognised(answers: Tensor, p_values: list[float], least: float, shared: float = 0.5) -> list[int]:
    """Which of answers (S, H, W) an image really shows, the surest first.

    Those below a p-value of `least` are dropped, and of the others, in falling order, those of which a surer one that
    was kept covers more than the share `shared`.
    """
    kept: list[int] = []
    masks = answers > 0.5
    for number in np.argsort(-np.array(p_values), kind="stable").tolist():
        mask = masks[number]
        if p_values[number] < least or not mask.any():
            continue
        if all((masks[other] & mask).sum() <= shared * mask.sum() for other in kept):
            kept.append(number)
    return kept


def f1(found: frozenset | set, true: frozenset | set) -> float:
    """2 |found and true| / (|found| + |true|); 1 where both are empty."""
    return 2 * len(found & true) / (len(found) + len(true)) if found or true else 1.0


def regularity(mask: np.ndarray) -> dict[str, float]:
    """How regular the shape of a mask (H, W) bool is; a filled box has 1 in the first, a disc in the last.

    box_ratio     its share of its tight box;   convex_ratio  of its convex hull
    inertia_ratio area^2 / (2 pi I), I the sum of squared distances to its middle
    """
    rows, columns = np.nonzero(mask)
    area = len(rows)
    box = (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
    inertia = ((rows - rows.mean()) ** 2).sum() + ((columns - columns.mean()) ** 2).sum() + area / 6
    hull = convex_hull_image(mask).sum()
    ratios = {"box_ratio": area / box, "convex_ratio": area / hull, "inertia_ratio": area**2 / (2 * np.pi * inertia)}
    return {name: float(value) for name, value in ratios.items()}
