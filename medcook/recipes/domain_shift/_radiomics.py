"""Features of slices: radiomic ones, and ImageNet's to compare with.

Radiomic features are those of the image biomarker standardisation initiative (IBSI), as PyRadiomics defines them.

First order (17), of co-occurring neighbours (GLCM, 22), of runs (GLRLM, 16), of zones (GLSZM, 16) and of differences
from the neighbourhood (NGTDM, 5): 76 of an image, over all of its pixels. And the filters in front of them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from typing import Literal

import numpy as np
import torch
from scipy import ndimage
from skimage.measure import label
from torch import Tensor

from medcook.methods import Method
from medcook.methods.frozen import PHOTOGRAPH
from medcook.networks.squeezenet import FEATURES, SqueezeNet, load_squeezenet

WIDTH, MOST = 0.1, 128
"""Width of a grey level in standard deviations, and how many levels there are at most (the rest counts as the last)."""

COUNT, VERSIONS = 76, 7
"""How many features an image has, and how many versions of it are described: itself and six filtered ones."""

DIRECTIONS = ((0, 1), (1, 1), (1, 0), (1, -1))
TINY = np.finfo(float).tiny

COIFLET = np.array([-0.0156557281, -0.0727326195, 0.3848648469, 0.8525720202, 0.3378976625, -0.0727326195])
"""Low-pass filter of the shortest coiflet, `coif1`, the wavelet of PyRadiomics."""


def wavelets(image: np.ndarray) -> Iterator[np.ndarray]:
    """The four bands (H, W) of one level of the undecimated transform of an image (H, W): LL, LH, HL, HH; it wraps."""
    high = COIFLET[::-1] * (-1.0) ** np.arange(1, 7)
    for down in (COIFLET, high):
        for right in (COIFLET, high):
            rows = ndimage.convolve1d(image, down, axis=0, mode="wrap")
            yield ndimage.convolve1d(rows, right, axis=1, mode="wrap")


def blobs(image: np.ndarray, sigmas: tuple[float, ...] = (2.0, 4.0)) -> Iterator[np.ndarray]:
    """Laplacians of Gaussians of an image (H, W), times the variance of the Gaussian."""
    return (sigma**2 * ndimage.gaussian_laplace(image, sigma, mode="nearest") for sigma in sigmas)


def radiomics(image: np.ndarray, filtered: bool = True) -> np.ndarray:
    """(76,) features of an image (H, W), or of it and of its six filtered versions: (532,)."""
    image = image.astype(float)
    versions = [image, *blobs(image), *wavelets(image)] if filtered else [image]
    return np.concatenate([features(version) for version in versions])


def features(image: np.ndarray) -> np.ndarray:
    """(76,) of an image (H, W), whose grey levels are `WIDTH` wide."""
    levels = grey_levels(image)
    parts = (
        first_order(image, levels),
        glcm(levels),
        sizes(runs(levels), levels.size),
        sizes(zones(levels), levels.size),
    )
    return np.concatenate([*parts, ngtdm(levels)])


def grey_levels(image: np.ndarray) -> np.ndarray:
    """(H, W) of whole numbers from 0 on: bins of `WIDTH`, of which one begins at zero."""
    bins = np.floor(image / WIDTH).astype(np.int64)
    return np.minimum(bins - bins.min(), MOST - 1)


def entropy(p: np.ndarray, axis=None) -> np.ndarray:
    return -(p * np.log2(p + TINY)).sum(axis)


def first_order(image: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """(17,) of the values themselves; entropy and uniformity are of the levels."""
    low, quarter, median, three, high = np.percentile(image, (10, 25, 50, 75, 90))
    mean, centred = image.mean(), image - image.mean()
    variance = centred.var()
    inner = image[(image >= low) & (image <= high)]
    p = np.bincount(levels.ravel()) / levels.size
    skewness, kurtosis = ((centred**k).mean() / variance ** (k / 2) if variance > 1e-12 else 0.0 for k in (3, 4))
    spread = (abs(centred).mean(), abs(inner - inner.mean()).mean(), np.sqrt((image**2).mean()), variance)
    places = (image.min(), low, median, high, image.max(), mean, three - quarter, np.ptp(image))
    return np.array([(image**2).sum(), entropy(p), (p**2).sum(), *places, *spread, skewness, kurtosis])


def cooccurrence(levels: np.ndarray) -> np.ndarray:
    """(4, L, L) shares of pairs of neighbours, either way round, in each direction."""
    count = levels.max() + 1
    found = np.zeros((len(DIRECTIONS), count, count))
    for matrix, (down, right) in zip(found, DIRECTIONS, strict=True):
        one = levels[: levels.shape[0] - down, max(0, -right) : levels.shape[1] - max(0, right)]
        other = levels[down:, max(0, right) : levels.shape[1] + min(0, right)]
        pairs = np.bincount((one * count + other).ravel(), minlength=count**2).reshape(count, count)
        matrix += (pairs + pairs.T) / (2 * pairs.sum())
    return found


def glcm(levels: np.ndarray) -> np.ndarray:
    """(22,) of co-occurrences, each the mean over the directions."""
    p = cooccurrence(levels)
    count = p.shape[1]
    i, j = np.ogrid[1 : count + 1, 1 : count + 1]
    apart, total = abs(i - j), i + j - 2
    marginal = p.sum(2)
    mean = (marginal * i[:, 0]).sum(1)[:, None, None]
    variance = (marginal * (i[:, 0] - mean[:, 0]) ** 2).sum(1)
    diagonals = np.stack([np.bincount(np.broadcast_to(apart, q.shape).ravel(), q.ravel(), count) for q in p])
    sums = np.stack([np.bincount(total.ravel(), q.ravel(), 2 * count - 1) for q in p])
    steps = np.arange(count)
    difference = (diagonals * steps).sum(1)
    moments = [(p * (i + j - 2 * mean) ** k).sum((1, 2)) for k in (4, 3, 2)]
    joint, alone = entropy(p, (1, 2)), entropy(marginal, 1)
    product = marginal[:, :, None] * marginal[:, None]
    crossed, independent = -(p * np.log2(product + TINY)).sum((1, 2)), entropy(product, (1, 2))
    found = [
        (p * i * j).sum((1, 2)),
        mean[:, 0, 0],
        *moments,
        (diagonals * steps**2).sum(1),
        np.where(variance > 0, (((p * i * j).sum((1, 2)) - mean[:, 0, 0] ** 2) / np.maximum(variance, TINY)), 1.0),
        difference,
        entropy(diagonals, 1),
        (diagonals * (steps - difference[:, None]) ** 2).sum(1),
        (p**2).sum((1, 2)),
        joint,
        np.where(alone > 0, (joint - crossed) / np.maximum(alone, TINY), 0.0),
        np.sqrt(np.maximum(0, 1 - np.exp(-2 * (independent - joint)))),
        (diagonals / (1 + steps**2)).sum(1),
        (diagonals / (1 + (steps / count) ** 2)).sum(1),
        (diagonals / (1 + steps)).sum(1),
        (diagonals / (1 + steps / count)).sum(1),
        (diagonals[:, 1:] / np.maximum(steps[1:], 1) ** 2).sum(1),
        p.max((1, 2)),
        entropy(sums, 1),
        variance,
    ]
    return np.stack(found).mean(1)


Sizes = list[tuple[np.ndarray, np.ndarray]]
"""For each direction: grey level and size of every run or zone, (N,) each."""


def runs(levels: np.ndarray) -> Sizes:
    """Of pixels of one level in a row, in each direction."""
    height, width = levels.shape
    skewed = np.full((height, 2 * height + width), -1)
    found = [lines(levels), lines(levels.T)]
    for flipped in (levels[:, ::-1], levels):
        skewed[:] = -1
        rows = np.arange(height)
        skewed[rows[:, None], rows[:, None] + np.arange(width)] = flipped
        found.append(lines(skewed.T))
    return found


def lines(levels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Level and length of the runs along the last axis (rows, columns); what is below 0 belongs to none."""
    padded = np.pad(levels, ((0, 0), (0, 1)), constant_values=-2).ravel()
    starts = np.flatnonzero(np.diff(padded, prepend=-3))
    values, lengths = padded[starts], np.diff(starts, append=len(padded))
    return values[values >= 0], lengths[values >= 0]


def zones(levels: np.ndarray) -> Sizes:
    """Of connected pixels of one level, corners connect; there is one direction. Pixels of level -1 are outside."""
    levels, parts = levels.ravel(), label(levels, connectivity=2, background=-1).ravel()
    first = np.unique(parts[parts > 0], return_index=True)[1]
    return [(levels[parts > 0][first], np.bincount(parts)[1:])]


def sizes(found: Sizes, pixels: int) -> np.ndarray:
    """(16,) of runs or zones, each the mean over the directions."""
    return np.mean([_sizes(level + 1, size, pixels) for level, size in found], axis=0)


def _sizes(level: np.ndarray, size: np.ndarray, pixels: int) -> np.ndarray:
    """Short, long, unevenness of levels and sizes and normalised, share, variances, entropy; low and high levels."""
    number, both = len(level), np.unique(level * (pixels + 1) + size, return_counts=True)[1] / len(level)
    by_level, by_size = np.bincount(level), np.bincount(size)
    level, size = level.astype(float), size.astype(float)
    short, long, low, high = size**-2, size**2, level**-2, level**2
    uneven = [(by**2).sum() / number**power for by in (by_level, by_size) for power in (1, 2)]
    means = [x.mean() for x in (low, high, short * low, short * high, long * low, long * high)]
    return np.array(
        [short.mean(), long.mean(), *uneven, number / pixels, level.var(), size.var(), entropy(both), *means]
    )


def ngtdm(levels: np.ndarray) -> np.ndarray:
    """(5,) coarseness, contrast, busyness, complexity and strength: how far pixels are from their eight neighbours."""
    ones = np.ones((3, 3))
    total, number = (ndimage.convolve(x, ones, mode="constant") - x for x in (levels + 1.0, np.ones(levels.shape)))
    away = abs(levels + 1 - total / number).ravel()
    count = np.bincount(levels.ravel())
    there = np.flatnonzero(count)
    p, s = count[there] / levels.size, np.bincount(levels.ravel(), away)[there]
    i = there + 1.0
    apart = i[:, None] - i
    pairs = len(there) * (len(there) - 1)
    spread = (p[:, None] * p * apart**2).sum() / pairs if pairs else 0.0
    changes = abs((i * p)[:, None] - i * p).sum()
    mixed = (abs(apart) * ((p * s)[:, None] + p * s) / (p[:, None] + p)).sum() / levels.size
    strength = ((p[:, None] + p) * apart**2).sum() / s.sum() if s.sum() else 0.0
    coarse = 1 / (p * s).sum() if (p * s).sum() else 1e6
    busy = (p * s).sum() / changes if changes else 0.0
    return np.array([min(coarse, 1e6), spread * s.sum() / levels.size, busy, mixed, strength])


@lru_cache(maxsize=2)
def network(kind: str = "imagenet") -> SqueezeNet:
    """SqueezeNet as ImageNet left it, or with `random` weights, always the same; once a process."""
    if kind == "imagenet":
        return load_squeezenet()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return SqueezeNet(features_only=True).eval()


@torch.no_grad()
def imagenet(image: np.ndarray, kind: str = "imagenet") -> np.ndarray:
    """(512,) of an image (H, W): the mean of SqueezeNet's last features."""
    grey = torch.from_numpy(image).float().expand(1, 3, -1, -1)
    return network(kind).features(PHOTOGRAPH * grey).mean((2, 3))[0].double().numpy()


_known: dict[tuple, np.ndarray] = {}


def described(images: Tensor, kind: str, filtered: bool) -> np.ndarray:
    """Features (N, D) of images (N, C, H, W), of the first channel; each is looked at once a process."""
    found = []
    for image in images[:, 0].float().cpu().numpy():
        key = (sha256(image.tobytes()).digest(), image.shape, kind, filtered)
        if key not in _known:
            _known[key] = radiomics(image, filtered) if kind == "radiomics" else imagenet(image, kind)
        found.append(_known[key])
    return np.stack(found)


@dataclass
class Describing(Method):
    """A method that looks at images by their features. As a base class it makes runs depend on what stands above.

    features      `radiomics`; `imagenet`: SqueezeNet's, as FID would have them; `random`: those of a SqueezeNet that
                  knows nothing, where there is no network to fetch weights
    filtered      whether filtered versions of the image are described too (radiomics)
    """

    features: Literal["radiomics", "imagenet", "random"] = "radiomics"
    filtered: bool = True

    def size(self) -> int:
        """How many features an image has."""
        return FEATURES if self.features != "radiomics" else COUNT * (VERSIONS if self.filtered else 1)

    def describe(self, images: Tensor) -> np.ndarray:
        """(N, D) of images (N, C, H, W)."""
        return described(images, self.features, self.filtered)
