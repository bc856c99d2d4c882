"""How well a score finds what it should find, over flat arrays such as the pixels of one image.

Each takes a score (higher: more likely) and an outcome (True where it is there), and gives NaN where every outcome is
the same. Equal scores are one threshold.
"""

import numpy as np

from medcook import pooled


def auroc(score, outcome) -> float:
    """Area under the ROC curve: the chance that a positive scores above a negative, ties half."""
    return pooled.auc(np.asarray(score).reshape(-1), np.asarray(outcome).reshape(-1))


def average_precision(score, outcome) -> float:
    """Mean precision over the positives, from the highest score down: the area under the precision-recall steps."""
    hits, alarms = _at_thresholds(score, outcome)
    if not hits[-1] or not alarms[-1]:
        return np.nan
    return float(np.sum(np.diff(hits, prepend=0) * hits / (hits + alarms)) / hits[-1])


def fpr_at_95(score, outcome, recall: float = 0.95) -> float:
    """The share of negatives that is flagged at the highest threshold that finds 95% of the positives."""
    hits, alarms = _at_thresholds(score, outcome)
    if not hits[-1] or not alarms[-1]:
        return np.nan
    return float(alarms[np.argmax(hits >= recall * hits[-1] - 1e-9)] / alarms[-1])


def _at_thresholds(score, outcome) -> tuple[np.ndarray, np.ndarray]:
    """(hits, false alarms) with every score from a threshold on flagged, from the highest threshold down."""
    score, outcome = np.asarray(score, dtype=float).reshape(-1), np.asarray(outcome).reshape(-1).astype(bool)
    if not len(score):
        return np.zeros(1), np.zeros(1)
    order = np.argsort(-score, kind="stable")
    last = np.append(np.flatnonzero(np.diff(score[order])), len(score) - 1)
    hits = np.cumsum(outcome[order])[last].astype(float)
    return hits, last + 1 - hits
