"""Metrics on binary masks, with a stated answer for every case that libraries leave open.

Masks are arrays of one shape and any number of dimensions; non-zero is foreground. The policy:

=================  ====  ==================  ==================================
prediction, truth  Dice  HD95, ASSD          flag
=================  ====  ==================  ==================================
both empty         1     0                   none: there was nothing to find
only prediction    0     image diagonal      `missed`: counted, never dropped
 is empty
only truth         0     image diagonal      `false_alarm`
 is empty
both non-empty     overlap and distances between the surfaces
=================  ====  ==================  ==================================

Libraries answer NaN or infinity in the second and third row, and averages then leave the failures out.

A surface voxel is a foreground voxel with a face neighbour that is background or outside the image (MONAI's
definition). Distances run between the centres of surface voxels, in mm where the spacing is known; where it is
None they are in pixels, and must be called so.
"""

from dataclasses import dataclass

import numpy as np
from scipy.ndimage import distance_transform_edt

from medcook.data.case import IGNORE
from medcook.errors import MedcookError


@dataclass(frozen=True)
class Score:
    """Everything measured on one pair of masks; distances in `unit`, `volume_difference` in `unit` to the power of
    the mask's dimensions, `volume_ratio` prediction / truth (NaN where the truth is empty)."""

    dice: float
    iou: float
    hd95: float
    assd: float
    volume_difference: float
    volume_ratio: float
    missed: bool
    false_alarm: bool
    unit: str
    n_voxels: int
    """Foreground voxels of the truth."""


def score(pred: np.ndarray, truth: np.ndarray, spacing: tuple[float, ...] | None = None) -> Score:
    """All metrics of one pair of binary masks at once, so that surfaces are found only once."""
    pred, truth = _masks(pred, truth)
    steps = _steps(spacing, pred.ndim)
    n_pred, n_truth = int(pred.sum()), int(truth.sum())
    overlap = int((pred & truth).sum())
    if n_pred and n_truth:
        forth, back = surface_distances(pred, truth, spacing)
        far, average = _percentile(forth, back, 95), float(np.concatenate([forth, back]).mean())
    else:
        far = average = diagonal(pred.shape, spacing) if n_pred or n_truth else 0.0
    return Score(
        dice=_dice(overlap, n_pred, n_truth),
        iou=_iou(overlap, n_pred, n_truth),
        hd95=far,
        assd=average,
        volume_difference=abs(n_pred - n_truth) * float(np.prod(steps)),
        volume_ratio=n_pred / n_truth if n_truth else float("nan"),
        missed=n_truth > 0 and n_pred == 0,
        false_alarm=n_truth == 0 and n_pred > 0,
        unit=unit(spacing),
        n_voxels=n_truth,
    )


def dice(pred: np.ndarray, truth: np.ndarray) -> float:
    """Twice the overlap over the sum of both sizes, 0 to 1; 1 where both masks are empty."""
    pred, truth = _masks(pred, truth)
    return _dice(int((pred & truth).sum()), int(pred.sum()), int(truth.sum()))


def iou(pred: np.ndarray, truth: np.ndarray) -> float:
    """Overlap over union (Jaccard), 0 to 1; 1 where both masks are empty."""
    pred, truth = _masks(pred, truth)
    return _iou(int((pred & truth).sum()), int(pred.sum()), int(truth.sum()))


def hd95(pred: np.ndarray, truth: np.ndarray, spacing: tuple[float, ...] | None = None) -> float:
    """95th percentile Hausdorff distance: the larger of the two directions' percentiles (as MONAI, not pooled)."""
    return hausdorff(pred, truth, spacing, percentile=95)


def hausdorff(
    pred: np.ndarray, truth: np.ndarray, spacing: tuple[float, ...] | None = None, percentile: float = 100
) -> float:
    """Hausdorff distance at a percentile of the surface distances; 100 is the maximum."""
    pred, truth = _masks(pred, truth)
    if (empty := _empty_distance(pred, truth, spacing)) is not None:
        return empty
    return _percentile(*surface_distances(pred, truth, spacing), percentile)


def assd(pred: np.ndarray, truth: np.ndarray, spacing: tuple[float, ...] | None = None) -> float:
    """Average symmetric surface distance: the mean over both surfaces' voxels, pooled (as MONAI, symmetric)."""
    pred, truth = _masks(pred, truth)
    if (empty := _empty_distance(pred, truth, spacing)) is not None:
        return empty
    return float(np.concatenate(surface_distances(pred, truth, spacing)).mean())


def surface_distances(
    pred: np.ndarray, truth: np.ndarray, spacing: tuple[float, ...] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Distances of the surface voxels of `pred` to the truth's surface, and of those of `truth` to the prediction's.

    Both masks must be non-empty. Two 1-D arrays, in mm, or in pixels where `spacing` is None.
    """
    pred, truth = _masks(pred, truth)
    steps = _steps(spacing, pred.ndim)
    if not (pred.any() and truth.any()):
        raise MedcookError("An empty mask has no surface.", "Use hd95 or assd, which say what happens then.")
    box = _bounding_box(pred | truth)
    pred_edge, truth_edge = surface(pred[box]), surface(truth[box])
    forth = distance_transform_edt(~truth_edge, sampling=steps)[pred_edge]
    back = distance_transform_edt(~pred_edge, sampling=steps)[truth_edge]
    return forth, back


def surface(mask: np.ndarray) -> np.ndarray:
    """Foreground voxels with a face neighbour that is background or outside the array; bool, shape of `mask`."""
    mask = np.asarray(mask).astype(bool)
    inner = mask.copy()
    for axis in range(mask.ndim):
        here, found = np.moveaxis(mask, axis, 0), np.moveaxis(inner, axis, 0)  # views
        found[1:] &= here[:-1]
        found[:-1] &= here[1:]
        found[[0, -1]] = False
    return mask & ~inner


def diagonal(shape: tuple[int, ...], spacing: tuple[float, ...] | None = None) -> float:
    """Length of the image's diagonal: the distance that a missed structure is charged."""
    return float(np.linalg.norm(np.multiply(shape, _steps(spacing, len(shape)))))


def unit(spacing: tuple[float, ...] | None) -> str:
    """`mm` where the spacing is known, else `pixels`."""
    return "pixels" if spacing is None else "mm"


def without_ignored(pred: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two label maps with every voxel that nobody annotated (`IGNORE` in `label`) set to background in both."""
    ignored = label == IGNORE
    if not ignored.any():
        return pred, label
    return np.where(ignored, 0, pred), np.where(ignored, 0, label)


def _dice(overlap: int, n_pred: int, n_truth: int) -> float:
    return 2 * overlap / (n_pred + n_truth) if n_pred + n_truth else 1.0


def _iou(overlap: int, n_pred: int, n_truth: int) -> float:
    union = n_pred + n_truth - overlap
    return overlap / union if union else 1.0


def _percentile(forth: np.ndarray, back: np.ndarray, percentile: float) -> float:
    return float(max(np.percentile(forth, percentile), np.percentile(back, percentile)))


def _empty_distance(pred: np.ndarray, truth: np.ndarray, spacing: tuple[float, ...] | None) -> float | None:
    """The distance by policy where a mask is empty; None where both have a surface."""
    found = pred.any(), truth.any()
    if all(found):
        _steps(spacing, pred.ndim)
        return None
    return diagonal(pred.shape, spacing) if any(found) else 0.0


def _bounding_box(mask: np.ndarray) -> tuple[slice, ...]:
    """Slices around the foreground. No margin: outside the box counts as background, as it does outside the image."""
    box = []
    for axis in range(mask.ndim):
        occupied = np.flatnonzero(mask.any(axis=tuple(other for other in range(mask.ndim) if other != axis)))
        box.append(slice(occupied[0], occupied[-1] + 1))
    return tuple(box)


def _masks(pred: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    pred, truth = np.asarray(pred), np.asarray(truth)
    if pred.shape != truth.shape:
        raise MedcookError(
            f"The prediction has shape {pred.shape} and the truth {truth.shape}.", "Compare both on the same grid."
        )
    return pred.astype(bool, copy=False), truth.astype(bool, copy=False)


def _steps(spacing: tuple[float, ...] | None, ndim: int) -> tuple[float, ...]:
    if spacing is None:
        return (1.0,) * ndim
    if len(spacing) != ndim or not all(np.isfinite(step) and step > 0 for step in spacing):
        raise MedcookError(
            f"Spacing {tuple(spacing)} does not fit an image of {ndim} dimensions.",
            "Give one positive mm per axis, or None.",
        )
    return tuple(map(float, spacing))
