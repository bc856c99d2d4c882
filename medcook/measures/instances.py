"""How well instances are found: which ones, and how exactly each. Of maps (H, W) of whole numbers, 0 is the background.

What an instance is called does not count: two maps are the same if they cut the image into the same instances.
"""

from typing import NamedTuple

import numpy as np


class Quality(NamedTuple):
    """panoptic = detection * segmentation (Kirillov et al., CVPR 2019), each from 0 to 1.

    detection     matched / (matched + (alarms + missed) / 2), the F1 score of the matching
    segmentation  the mean intersection over union of what is matched; 0 where nothing is
    """

    panoptic: float
    detection: float
    segmentation: float


def overlaps(found: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Intersection and union (F, T), in pixels, of each instance of one map and each of the other."""
    names = [np.unique(part, return_inverse=True) for part in (found, truth)]
    (mine, at), (theirs, on) = names
    both = np.bincount(at.ravel() * len(theirs) + on.ravel(), minlength=len(mine) * len(theirs))
    both = both.reshape(len(mine), len(theirs))
    area, size = both.sum(1), both.sum(0)
    union = area[:, None] + size[None] - both
    return both[mine != 0][:, theirs != 0], union[mine != 0][:, theirs != 0]


def quality(found: np.ndarray, truth: np.ndarray) -> Quality:
    """Panoptic quality of one class. An instance is matched with the one whose IoU is above a half: there is no other.

    1 throughout where there is nothing to find, and nothing was found.
    """
    both, union = overlaps(found, truth)
    if not sum(both.shape):
        return Quality(1.0, 1.0, 1.0)
    iou = both / union
    matched = iou > 0.5
    count = int(matched.sum())
    detection = 2 * count / sum(both.shape)
    segmentation = float(iou[matched].sum() / max(count, 1))
    return Quality(detection * segmentation, detection, segmentation)


def aggregated_jaccard(found: np.ndarray, truth: np.ndarray) -> float:
    """AJI (Kumar et al., IEEE TMI 2017): every true instance and the found one of the highest IoU, intersections over
    unions; what was found and is nobody's best counts in full. 1 where both are empty.

    One that covers several true instances is counted with each of them, so merging is punished severely.
    """
    both, union = overlaps(found, truth)
    if not both.size:
        return float(not sum(both.shape))
    area, size = (np.unique(part[part != 0], return_counts=True)[1] for part in (found, truth))
    best, each = (both / union).argmax(0), np.arange(len(size))
    touched = both[best, each] > 0
    together = np.where(touched, union[best, each], size).sum()
    alarms = np.delete(area, best[touched]).sum()
    return float(both[best, each].sum() / (together + alarms))
