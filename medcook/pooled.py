"""Measures that only a group of patients has: an area under a curve, a gap between groups, a rank correlation.

They are no means over patients. `medcook.statistics` resamples patients and computes them anew for every resample.
Each takes the columns it names, as arrays with one entry a row, and gives NaN where the rows do not determine it.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from medcook.measures import equity, selective


class Pooled(NamedTuple):
    """A pooled measure: the columns it is made from, and the function of these."""

    columns: tuple[str, ...]
    value: Callable[..., float]


def auc(score: np.ndarray, outcome: np.ndarray) -> float:
    """Area under the ROC curve: the chance that a positive scores above a negative, ties half (Mann-Whitney)."""
    positive = outcome.astype(bool)
    n, m = int(positive.sum()), int((~positive).sum())
    if not n or not m:
        return np.nan
    return float((stats.rankdata(score)[positive].sum() - n * (n + 1) / 2) / (n * m))


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Rank correlation; NaN where a column is constant."""
    a, b = (stats.rankdata(values) - (len(values) + 1) / 2 for values in (x, y))
    scale = np.sqrt((a**2).sum() * (b**2).sum())
    return float((a * b).sum() / scale) if scale else np.nan


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
    "auc": Pooled(("score", "outcome"), auc),
    "rank_correlation": Pooled(("uncertainty", "error"), spearman),
    "aurc": Pooled(("uncertainty", "error"), selective.aurc),
    "ece_dice_correlation": Pooled(("ece", "dice"), spearman),
    "handover_gain": Pooled(("uncertainty", "error"), selective.handover_gain),
    "dice_gap": Pooled(("dice", "group"), gap),
    "worst_group_dice": Pooled(("dice", "group"), worst_group),
    "equity_scaled_dice": Pooled(("dice", "group"), equity_scaled),
    "equity_scaled_dice_std": Pooled(("dice", "group"), equity_scaled_std),
}
"""{metric: measure}; what a recipe names as its metric and finds here is pooled, everything else is averaged."""


def value(frame: pd.DataFrame, metric: str) -> float:
    """Any metric over all rows of a frame: computed if it is pooled, else the mean of its column."""
    return measure(frame, metric) if metric in POOLED else float(frame[metric].mean())


def measure(frame: pd.DataFrame, metric: str) -> float:
    """A pooled measure over all rows of a frame."""
    columns, function = POOLED[metric]
    return function(*(_plain(frame[column]) for column in columns))


def _plain(column: pd.Series) -> np.ndarray:
    """A column as an array: numbers as float, names as str (a missing name is empty)."""
    if column.dtype == object or isinstance(column.dtype, pd.StringDtype):
        return column.fillna("").astype(str).to_numpy(dtype=str)
    return column.to_numpy(dtype=float)


def bootstrap(frames: list[pd.DataFrame], metric: str, resamples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(values (frames, replicates), samples (frames, resamples)) of frames that hold the same patients.

    A replicate's patients are resampled as a whole, the same ones in every frame and replicate, and replicates are
    resampled too. Where every patient stands in one replicate only (folds), the folds are put together first.
    """
    columns, value = POOLED[metric]
    patients = sorted(set(frames[0]["patient_id"]))
    code = {patient: number for number, patient in enumerate(patients)}
    parts = [[_columns(part, columns, code) for part in _replicates(frame)] for frame in frames]
    values = np.array([[value(*arrays) for _, arrays in found] for found in parts])
    count, rng = len(parts[0]), np.random.default_rng(seed)
    samples = np.empty((len(frames), resamples))
    for k in range(resamples):
        times = rng.multinomial(len(patients), np.full(len(patients), 1 / len(patients)))
        weights = rng.multinomial(count, np.full(count, 1 / count)) / count
        for number, found in enumerate(parts):
            drawn = [_again(value, *part, times) for part in found]
            samples[number, k] = weights[weights > 0] @ np.array(drawn)[weights > 0]
    return values, samples


def _replicates(frame: pd.DataFrame) -> list[pd.DataFrame]:
    if "replicate" not in frame or is_nested(frame):
        return [frame]
    return [part for _, part in frame.groupby("replicate")]


def is_nested(frame: pd.DataFrame) -> bool:
    """Whether there are several replicates, and each patient stands in one of them only (folds)."""
    several = "replicate" in frame and frame["replicate"].nunique() > 1
    return several and bool((frame.groupby("patient_id")["replicate"].nunique() == 1).all())


def _columns(frame: pd.DataFrame, columns: tuple[str, ...], code: dict) -> tuple[np.ndarray, list[np.ndarray]]:
    return frame["patient_id"].map(code).to_numpy(), [_plain(frame[column]) for column in columns]


def _again(value, of: np.ndarray, arrays: list[np.ndarray], times: np.ndarray) -> float:
    """The measure with every patient's rows taken `times` times."""
    rows = np.repeat(np.arange(len(of)), times[of])
    return value(*(array[rows] for array in arrays))
