"""Several annotations of one image against several predictions of it: areas, whole label maps, and consensus.

Label maps are (*spatial) whole numbers, stacked along the first axis; voxels labelled `IGNORE` do not count.
"""

from collections.abc import Callable

import numpy as np
from scipy import stats

from medcook.data.case import IGNORE


def crps(samples, observations) -> float:
    """Continuous ranked probability score of an ensemble of numbers (volumes): the integral of (F - G)^2.

    F is the empirical distribution function of the samples, G that of the observations. With one observation y this
    is the usual CRPS, E|S - y| - E|S - S'| / 2. Several raters are one distribution, so that an ensemble which is
    spread like them scores zero; the mean of the raters' own CRPS is larger, by E|Y - Y'| / 2.
    """
    samples, observations = (np.asarray(each, dtype=float).reshape(-1) for each in (samples, observations))
    return float(_distance(samples, observations) - (_distance(samples, samples) + _inner(observations)) / 2)


def gaussian_crps(mean: float, deviation: float, value: float) -> float:
    """CRPS of the normal distribution N(mean, deviation^2) at a value, in closed form (Gneiting and Raftery 2007).

    CURVAS fits it to the raters' volumes and puts the sum of the predicted probabilities in as the value.
    """
    if deviation <= 0:
        return float(abs(value - mean))
    z = (value - mean) / deviation
    return float(deviation * (z * (2 * stats.norm.cdf(z) - 1) + 2 * stats.norm.pdf(z) - 1 / np.sqrt(np.pi)))


def _distance(one: np.ndarray, other: np.ndarray) -> float:
    """E|A - B| over all pairs."""
    return np.abs(one[:, None] - other[None]).mean()


def _inner(values: np.ndarray) -> float:
    return _distance(values, values)


def jaccard_distances(one, other) -> np.ndarray:
    """(S, R) of 1 - IoU between every map of `one` (S, *spatial) and of `other` (R, *spatial).

    Several structures: the mean over those that either map holds. Two maps without any structure are alike (0).
    """
    one, other = (np.asarray(maps).reshape(len(maps), -1) for maps in (one, other))
    known_one, known_other = ((maps != IGNORE).astype(np.float32) for maps in (one, other))
    total, structures = np.zeros((len(one), len(other))), np.zeros((len(one), len(other)))
    for value in sorted((_values(one) | _values(other)) - {0, IGNORE}):
        mine, theirs = ((maps == value).astype(np.float32) for maps in (one, other))
        both = mine @ theirs.T
        either = mine @ known_other.T + known_one @ theirs.T - both
        total += np.where(either > 0, 1 - both / np.maximum(either, 1), 0)
        structures += either > 0
    return total / np.maximum(structures, 1)


def _values(maps: np.ndarray) -> set[int]:
    """The values in label maps."""
    return set(np.flatnonzero(np.bincount(maps.reshape(-1))).tolist())


def energy_distance(samples, raters, distance: Callable[..., np.ndarray] = jaccard_distances) -> float:
    """Squared generalised energy distance 2 E[d(S, Y)] - E[d(S, S')] - E[d(Y, Y')] (Kohl et al. 2018).

    samples (S, *spatial), raters (R, *spatial); expectations are over all pairs, a map with itself included, so that
    two equal sets are at distance zero. `distance` gives the matrix of d between two stacks.
    """
    return float(
        2 * distance(samples, raters).mean() - distance(samples, samples).mean() - distance(raters, raters).mean()
    )


def consensus(raters, unanimous: bool = False) -> np.ndarray:
    """(*spatial) uint8: the label that most raters (R, *spatial) gave, a tie is background.

    unanimous  True: `IGNORE` where they do not all agree, as CURVAS scores Dice
    A rater's `IGNORE` is no vote; voxels on which nobody voted are `IGNORE`.
    """
    raters = np.asarray(raters)
    values = sorted((_values(raters) | {0}) - {IGNORE})
    votes = np.stack([(raters == value).sum(0) for value in values])
    top = votes.max(0)
    found = np.array(values, dtype=np.uint8)[votes.argmax(0)]
    if unanimous:
        return np.where((top == votes.sum(0)) & (top > 0), found, IGNORE).astype(np.uint8)
    found[(votes == top).sum(0) > 1] = 0
    found[top == 0] = IGNORE
    return found


def entropy(probabilities) -> np.ndarray:
    """(*spatial) entropy in nats of probabilities (classes, *spatial)."""
    probabilities = np.asarray(probabilities)
    return -(probabilities * np.log(np.maximum(probabilities, 1e-12))).sum(0)
