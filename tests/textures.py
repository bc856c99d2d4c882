"""Smooth random images."""

import numpy as np
from scipy import ndimage


def texture(size: tuple[int, int] = (20, 17), seed: int = 0) -> np.ndarray:
    """A smooth random image of zero mean and unit variance."""
    image = ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal(size), 1.5)
    return (image - image.mean()) / image.std()
