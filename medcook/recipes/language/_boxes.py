"""Detection with masks: boxes with scores out of probabilities, and average precision over many questions."""

import numpy as np
from scipy import ndimage

from medcook.recipes.language._findings import box_iou

Box = tuple[int, int, int, int]
"""(top, left, bottom, right), the last two exclusive."""
LEVEL = 0.3
"""Probability above which pixels belong to a detection."""


def detections(answer: np.ndarray, level: float = LEVEL) -> list[tuple[float, Box]]:
    """(score, box) of every connected part of probabilities (H, W) above a level; the score is its highest one."""
    parts, count = ndimage.label(answer > level)
    scores = ndimage.maximum(answer, parts, range(1, count + 1))
    slices = ndimage.find_objects(parts)
    boxes = [(rows.start, columns.start, rows.stop, columns.stop) for rows, columns in slices]
    return [(float(score), box) for score, box in zip(scores, boxes, strict=True)]


def matched(found: list[tuple[float, Box]], true: list[Box], least: float = 0.5) -> list[tuple[float, bool]]:
    """(score, whether it is right) of one question's detections, the surest first.

    One is right if it overlaps a box, of those that none before has taken, by `least` of their union; it takes the one
    that it overlaps most.
    """
    free, rows = list(true), []
    for score, box in sorted(found, key=lambda pair: -pair[0]):
        overlaps = [box_iou(box, other) for other in free]
        right = bool(overlaps) and max(overlaps) >= least
        if right:
            free.pop(int(np.argmax(overlaps)))
        rows.append((score, right))
    return rows


def average_precision(questions: list[tuple[list[tuple[float, Box]], list[Box]]], least: float = 0.5) -> float:
    """Of the pooled detections of many questions, each with its own true boxes: the mean over 101 recalls of the best
    precision at that recall or above, as in COCO; NaN where there is nothing to find."""
    total = sum(len(true) for _, true in questions)
    rows = [row for found, true in questions for row in matched(found, true, least)]
    rows.sort(key=lambda row: -row[0])
    right = np.cumsum([row[1] for row in rows])
    if not total:
        return float("nan")
    precision = np.maximum.accumulate((right / np.arange(1, len(rows) + 1))[::-1])[::-1]
    places = np.searchsorted(right / total, np.linspace(0, 1, 101))
    return float(np.append(precision, 0.0)[places].mean())
