"""Calibration: whether what is said with 80% probability is true 80% of the time.

Probabilities are (classes, *spatial) and labels (*spatial) whole numbers, arrays or CPU tensors; voxels labelled
`IGNORE` do not count. NaN where no voxel counts.
"""

import numpy as np
import torch

from medcook.data.case import IGNORE


def expected_calibration_error(probabilities, labels, bins: int = 15) -> float:
    """ECE of the likeliest class (Naeini et al. 2015; Guo et al. 2017): mean |accuracy - confidence| over bins of
    equal width, each weighted by its share of the voxels."""
    confidence, accuracy, share = reliability(probabilities, labels, bins)
    return float(np.nansum(share * np.abs(accuracy - confidence))) if share.any() else np.nan


def reliability(probabilities, labels, bins: int = 15) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(confidence, accuracy, share of voxels) of each bin, for reliability diagrams; NaN, NaN, 0 of an empty bin.

    Bin k holds confidences from k / bins up to, but without, (k + 1) / bins; the last one also holds 1.
    """
    probabilities, labels = _counted(probabilities, labels)
    top = probabilities.max(0)
    right = probabilities.argmax(0) == labels
    place = np.minimum((top * bins).astype(int), bins - 1)
    count = np.bincount(place, minlength=bins)
    confidence, accuracy = (
        np.divide(np.bincount(place, what, bins), count, out=np.full(bins, np.nan), where=count > 0)
        for what in (top, right)
    )
    return confidence, accuracy, count / max(1, len(labels))


def brier(probabilities, labels) -> float:
    """Brier score, half the squared distance to the one-hot label: 0 to 1; (p - y)^2 for two classes."""
    probabilities, labels = _counted(probabilities, labels)
    truth = probabilities[labels, np.arange(len(labels))]  # sum (p - y)^2 = sum p^2 - 2 p[label] + 1
    return float(((probabilities**2).sum(0) - 2 * truth + 1).mean() / 2) if len(labels) else np.nan


def temper(probabilities, temperature: float, axis: int = 0):
    """p^(1/T) / sum p^(1/T) over the classes, as if the logits were divided by T: T > 1 makes a forecast less sure.

    An array gives an array, a tensor a tensor.
    """
    logits = torch.as_tensor(probabilities).clamp_min(1e-12).log()
    found = (logits / temperature).softmax(axis)
    return found if isinstance(probabilities, torch.Tensor) else found.numpy()


def _counted(probabilities, labels) -> tuple[np.ndarray, np.ndarray]:
    """(classes, N) float64 and (N,) of the voxels that have a label."""
    probabilities, labels = np.asarray(probabilities), np.asarray(labels).reshape(-1)
    known = labels != IGNORE
    return probabilities.reshape(len(probabilities), -1)[:, known].astype(float), labels[known].astype(int)
