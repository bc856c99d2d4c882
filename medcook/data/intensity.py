"""Intensities: CT windows, normalisation, and the bias field of MR, simulated and removed. Arrays of any dimension."""

from itertools import product

import numpy as np

WINDOWS = {"soft tissue": (40.0, 400.0), "bone": (400.0, 1800.0), "lung": (-600.0, 1500.0)}
"""Usual CT windows: (level, width) in Hounsfield units."""

BIAS_PASSES = 8
"""Rounds in which `estimate_bias` looks again which voxels are the main tissue; later ones change little."""


def window(hounsfield: np.ndarray, level: float, width: float) -> np.ndarray:
    """Hounsfield units to 0..1 float32: `level` becomes 0.5, and `width` HU around it fill the range."""
    scaled = (np.asarray(hounsfield, np.float32) - np.float32(level)) / np.float32(width) + np.float32(0.5)
    return np.clip(scaled, 0, 1)


def zscore(image: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """Zero mean and unit standard deviation, float32, over a boolean mask (None: everywhere); constant gives zeros."""
    values = image if mask is None else image[mask]
    spread = max(float(np.std(values, dtype=np.float64)), 1e-6)
    return ((image - np.mean(values, dtype=np.float64)) / spread).astype(np.float32)


def clip_percentiles(image: np.ndarray, low: float = 0.5, high: float = 99.5) -> np.ndarray:
    """Values beyond these percentiles moved to them, so that single bright voxels do not set the scale."""
    return np.clip(image, *np.percentile(image, [low, high]).astype(image.dtype))


def bias_field(shape: tuple[int, ...], strength: float, rng: np.random.Generator, order: int = 2) -> np.ndarray:
    """Random smooth factor around 1, float32: the sensitivity of an MR coil, from exp(-strength) to exp(strength).

    Its logarithm is a polynomial of at most `order` in the coordinates, as in `estimate_bias`.
    """
    terms = polynomials(shape, order)[1:]
    field = np.tensordot(rng.standard_normal(len(terms)), terms, 1)
    return np.exp(strength * field / np.abs(field).max()).astype(np.float32)


def estimate_bias(image: np.ndarray, mask: np.ndarray, order: int = 2) -> np.ndarray:
    """The smooth factor that makes the main tissue within `mask` flat, float32, with mean logarithm 0 there.

    Logarithms turn the factor into a sum; a polynomial is fitted to them by least squares. Other tissues would bend
    the fit, so that each pass keeps only voxels near the commonest corrected value. A sketch of what N4 does better.
    """
    terms = polynomials(image.shape, order)
    inside = np.asarray(mask, bool) & (image > 0)
    design, logs = terms[:, inside].T, np.log(image[inside])
    weights = np.zeros(len(terms))
    for width in np.geomspace(3 * logs.std() + 1e-6, 0.1, BIAS_PASSES):
        flat = logs - design[:, 1:] @ weights[1:]
        kept = np.abs(flat - mode(flat)) <= width
        weights = np.linalg.lstsq(design[kept], logs[kept], rcond=None)[0]
    field = np.tensordot(weights, terms, 1)
    return np.exp(field - field[inside].mean()).astype(np.float32)


def remove_bias(image: np.ndarray, mask: np.ndarray, order: int = 2) -> np.ndarray:
    """The image divided by its estimated bias field, float32."""
    return (image / estimate_bias(image, mask, order)).astype(np.float32)


def polynomials(shape: tuple[int, ...], order: int) -> np.ndarray:
    """Every product of Legendre polynomials of total degree at most `order`: (terms, *shape), the constant first."""
    axes = [np.linspace(-1, 1, size) if size > 1 else np.zeros(1) for size in shape]
    bases = [np.polynomial.legendre.legvander(axis, order).T for axis in axes]
    degrees = [powers for powers in product(range(order + 1), repeat=len(shape)) if sum(powers) <= order]
    terms = []
    for powers in sorted(degrees, key=sum):
        term = np.ones(())
        for base, power in zip(bases, powers, strict=True):
            term = np.multiply.outer(term, base[power])
        terms.append(term)
    return np.stack(terms)


def mode(values: np.ndarray, bins: int = 100) -> float:
    """The commonest value: the middle of the fullest of `bins` bins, smoothed a little."""
    counts, edges = np.histogram(values, bins=bins)
    fullest = int(np.convolve(counts, np.ones(5), mode="same").argmax())
    return float(edges[fullest : fullest + 2].mean())
