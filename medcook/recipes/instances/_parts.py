"""Instances that are connected parts of a mask, or flooded within these: without votes that are counted."""

import numpy as np
from scipy import ndimage
from skimage.feature import peak_local_max
from skimage.segmentation import watershed

SMALLEST = 0.004
"""The smallest share of an image that counts as an instance."""


def by_parts(mask: np.ndarray, distance: np.ndarray | None = None) -> np.ndarray:
    """Sections (H, W) that are the connected parts of a mask (H, W), without the smallest."""
    parts, _ = ndimage.label(mask)
    large = np.bincount(parts.ravel()) >= SMALLEST * mask.size
    large[0] = False
    return (np.cumsum(large) * large)[parts]


def by_watershed(mask: np.ndarray, distance: np.ndarray) -> np.ndarray:
    """Sections (H, W) flooded from where the distance is smallest, over connected tissue: no votes are counted."""
    parts = by_parts(mask)
    near, size = (ndimage.gaussian_filter(part, 2.0) for part in (np.hypot(*distance) * mask, mask * 1.0))
    height = near / np.maximum(size, 1e-6)
    seeds = peak_local_max(-height, min_distance=mask.shape[0] // 8, labels=parts, exclude_border=False)
    markers = np.zeros(mask.shape, int)
    markers[tuple(seeds.T)] = 1 + np.arange(len(seeds))
    return watershed(height, markers, mask=parts > 0)
