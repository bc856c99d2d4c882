"""Measures that only a group of patients has: an area under a curve, a gap between groups, a rank correlation.

They are no means over patients. `medcook.statistics` resamples patients and computes them anew for every resample.
Each takes the columns it names, as arrays with one entry a row, and gives NaN where the rows do not determine it.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pandas as pd

from medcook.measures import equity, selective


class Pooled(NamedTuple):
    """A pooled measure: the columns it is made from, and the function of these.

    resampled  where there is a fast way: columns and (resamples, rows), how often each row is taken, to (resamples,)
    own_scale  a network's scores are ranked, which have no common scale with those of another: folds, each scored by
               a network of its own, are then never put together, but averaged
    """

    columns: tuple[str, ...]
    value: Callable[..., float]
    resampled: Callable[..., np.ndarray] | None = None
    own_scale: bool = False


def auc(score: np.ndarray, outcome: np.ndarray) -> float:
    """Area under the ROC curve: the chance that a positive scores above a negative, ties half (Mann-Whitney)."""
    return _of_all(resampled_auc, score, outcome)


def resampled_auc(score: np.ndarray, outcome: np.ndarray, times: np.ndarray) -> np.ndarray:
    """`auc` with the rows taken `times` (resamples, rows) times; NaN where only one outcome is left."""
    level = np.unique(score, return_inverse=True)[1]
    positive, negative = (_per_level(times * kind, level) for kind in (outcome.astype(bool), ~outcome.astype(bool)))
    won = (positive * (np.cumsum(negative, axis=1) - negative / 2)).sum(1)
    return _divided(won, positive.sum(1) * negative.sum(1))


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Rank correlation; NaN where a column is constant."""
    return _of_all(resampled_spearman, x, y)


def resampled_spearman(x: np.ndarray, y: np.ndarray, times: np.ndarray) -> np.ndarray:
    """`spearman` with the rows taken `times` (resamples, rows) times."""
    a, b = (_ranks(values, times) for values in (x, y))
    return _divided((times * a * b).sum(1), np.sqrt((times * a**2).sum(1) * (times * b**2).sum(1)))


def _ranks(values: np.ndarray, times: np.ndarray) -> np.ndarray:
    """(resamples, rows): ranks about their mean, ties sharing theirs, where each row is taken `times` times."""
    level = np.unique(values, return_inverse=True)[1]
    count = _per_level(times, level)
    ranks = np.cumsum(count, axis=1) - (count - 1) / 2
    return ranks[:, level] - (times.sum(1, keepdims=True) + 1) / 2


def _per_level(times: np.ndarray, level: np.ndarray) -> np.ndarray:
    """Sums of (resamples, rows) over the rows of each level 0, 1, ...: (resamples, levels)."""
    order = np.argsort(level, kind="stable")
    return np.add.reduceat(times[:, order], np.searchsorted(level[order], np.arange(level.max() + 1)), axis=1)


def _divided(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b, NaN where b is zero."""
    return np.divide(a, b, out=np.full(len(a), np.nan), where=b > 0)


def _of_all(resampled: Callable[..., np.ndarray], *columns: np.ndarray) -> float:
    """The measure of all rows, each taken once; NaN where there is none or a number is missing."""
    if not len(columns[0]) or any(np.isnan(np.asarray(column, dtype=float)).any() for column in columns):
        return np.nan
    return float(resampled(*columns, np.ones((1, len(columns[0])), dtype=int))[0])


def group_means(value: np.ndarray, group: np.ndarray) -> np.ndarray:
    """The mean of every group, in the order of the groups' names; rows without a group (empty name) are left out."""
    names, codes = np.unique(group, return_inverse=True)
    means = np.bincount(codes, value) / np.bincount(codes)
    return means[names != ""]


def gap(value: np.ndarray, group: np.ndarray) -> float:
    """The best group's mean minus the worst group's; never negative, so its interval cannot fall below zero."""
    means = group_means(value, group)
    return float(np.ptp(means)) if len(means) > 1 else np.nan


def worst_group(value: np.ndarray, group: np.ndarray) -> float:
    """The lowest mean of a group."""
    means = group_means(value, group)
    return float(means.min()) if len(means) else np.nan


def equity_scaled(value: np.ndarray, group: np.ndarray) -> float:
    """The mean over the sum formula of `medcook.measures.equity`; the overall mean is of all rows with a group."""
    return equity.equity_scaled(_overall(value, group), group_means(value, group))


def equity_scaled_std(value: np.ndarray, group: np.ndarray) -> float:
    """The mean over the standard-deviation formula of `medcook.measures.equity`."""
    return equity.equity_scaled_std(_overall(value, group), group_means(value, group))


def _overall(value: np.ndarray, group: np.ndarray) -> float:
    known = value[group != ""]
    return float(known.mean()) if len(known) else np.nan


POOLED: dict[str, Pooled] = {
    "auc": Pooled(("score", "outcome"), auc, resampled_auc, own_scale=True),
    "rank_correlation": Pooled(("uncertainty", "error"), spearman, resampled_spearman, own_scale=True),
    "aurc": Pooled(("uncertainty", "error"), selective.aurc, own_scale=True),
    "ece_dice_correlation": Pooled(("ece", "dice"), spearman, resampled_spearman),
    "handover_gain": Pooled(("uncertainty", "error"), selective.handover_gain, own_scale=True),
    "dice_gap": Pooled(("dice", "group"), gap),
    "worst_group_dice": Pooled(("dice", "group"), worst_group),
    "equity_scaled_dice": Pooled(("dice", "group"), equity_scaled),
    "equity_scaled_dice_std": Pooled(("dice", "group"), equity_scaled_std),
}
"""{metric: measure}; what a recipe names as its metric and finds here is pooled, everything else is averaged."""


def value(frame: pd.DataFrame, metric: str) -> float:
    """Any metric over all rows of a frame: computed if it is pooled, else the mean of its column.

    What ranks each network's own score is computed in each replicate, and averaged.
    """
    if metric not in POOLED:
        return float(frame[metric].mean())
    if POOLED[metric].own_scale and "replicate" in frame:
        return float(np.mean(of_replicates(frame, metric)))
    return measure(frame, metric)


def of_replicates(frame: pd.DataFrame, metric: str) -> list[float]:
    """Any metric of each replicate: pooled, or the mean over patients, as in intervals; not over rows, which may be
    many more of some patients."""
    parts = [part for _, part in frame.groupby("replicate")]
    if metric in POOLED:
        return [measure(part, metric) for part in parts]
    return [float(part.groupby("patient_id")[metric].mean().mean()) for part in parts]


def measure(frame: pd.DataFrame, metric: str) -> float:
    """A pooled measure over all rows of a frame."""
    columns, function = POOLED[metric].columns, POOLED[metric].value
    return function(*(_plain(frame[column]) for column in columns))


def _plain(column: pd.Series) -> np.ndarray:
    """A column as an array: numbers as float, names as str (a missing name is empty)."""
    if column.dtype == object or isinstance(column.dtype, pd.StringDtype):
        return column.fillna("").astype(str).to_numpy(dtype=str)
    return column.to_numpy(dtype=float)


def bootstrap(frames: list[pd.DataFrame], metric: str, resamples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(values (frames, replicates), samples (frames, resamples)) of frames that hold the same patients.

    A replicate's patients are resampled as a whole, the same ones in every frame and replicate, and replicates are
    resampled too. Where every patient stands in one replicate only (folds), the folds are put together first, unless
    what is ranked is each network's own score.
    """
    columns, value, _, own_scale = POOLED[metric]
    patients = sorted(set(frames[0]["patient_id"]))
    code = {patient: number for number, patient in enumerate(patients)}
    parts = [[_columns(part, columns, code) for part in _replicates(frame, own_scale)] for frame in frames]
    values = np.array([[value(*arrays) for _, arrays in found] for found in parts])
    count, rng = len(parts[0]), np.random.default_rng(seed)
    drawn = [
        [rng.multinomial(many, np.full(many, 1 / many)) for many in (len(patients), count)] for _ in range(resamples)
    ]
    times, weights = (np.array(each) for each in zip(*drawn, strict=True))
    samples = [
        sum(_weighted(weights[:, k] / count, _again(metric, *part, times)) for k, part in enumerate(found))
        for found in parts
    ]
    return values, np.array(samples)


def _weighted(weight: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """Their product, 0 where the weight is 0, even if the sample is NaN."""
    return np.where(weight > 0, weight * samples, 0.0)


def _replicates(frame: pd.DataFrame, own_scale: bool) -> list[pd.DataFrame]:
    if "replicate" not in frame or (is_nested(frame) and not own_scale):
        return [frame]
    return [part for _, part in frame.groupby("replicate")]


def is_nested(frame: pd.DataFrame) -> bool:
    """Whether there are several replicates, and each patient stands in one of them only (folds)."""
    several = "replicate" in frame and frame["replicate"].nunique() > 1
    return several and bool((frame.groupby("patient_id")["replicate"].nunique() == 1).all())


def _columns(frame: pd.DataFrame, columns: tuple[str, ...], code: dict) -> tuple[np.ndarray, list[np.ndarray]]:
    return frame["patient_id"].map(code).to_numpy(), [_plain(frame[column]) for column in columns]


def _again(metric: str, of: np.ndarray, arrays: list[np.ndarray], times: np.ndarray) -> np.ndarray:
    """(resamples,) the measure with every patient's rows taken `times` (resamples, patients) times."""
    value, resampled = POOLED[metric].value, POOLED[metric].resampled
    if resampled and not any(np.isnan(array).any() for array in arrays):
        return np.concatenate(
            [resampled(*arrays, some[:, of]) for some in np.array_split(times, len(times) // 250 + 1)]
        )
    chosen = (np.repeat(np.arange(len(of)), row[of]) for row in times)
    return np.array([value(*(array[rows] for array in arrays)) for rows in chosen])
