"""The ranking of the Medical Segmentation Decathlon: test, then rank.

In each task, of each structure and each metric: an algorithm's score is the number of others that it beats by a
one-sided Wilcoxon signed-rank test over cases, and scores make ranks. Ranks are averaged over a task's structures and
metrics, and then over tasks.
"""

from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd
from scipy import stats

from medcook import metrics

ALPHA = 0.05
METRICS = ("dice", "nsd")


def surface_dice(pred: np.ndarray, truth: np.ndarray, tolerance: float) -> float:
    """The share of both masks' outlines that is within `tolerance` pixels of the other's, in slices (N, H, W) or one.

    All slices' outlines together: where a slice shows one mask alone, its outline is far from everything. 1 where both
    masks are empty everywhere. (The challenge's is of surfaces in three dimensions, in mm.)
    """
    pred, truth = (np.asarray(mask, bool).reshape(-1, *mask.shape[-2:]) for mask in (pred, truth))
    near = total = 0
    for one, other in zip(pred, truth, strict=True):
        if one.any() and other.any():
            away = np.concatenate(metrics.surface_distances(one, other))
            near, total = near + int((away <= tolerance).sum()), total + len(away)
        else:
            total += int(metrics.surface(one).sum() + metrics.surface(other).sum())
    return near / total if total else 1.0


def better(one: np.ndarray, other: np.ndarray) -> float:
    """p of the one-sided signed-rank test that `one` is above `other` on the same cases; 1 where they never differ."""
    difference = np.asarray(one, float) - np.asarray(other, float)
    return float(stats.wilcoxon(difference, alternative="greater").pvalue) if difference.any() else 1.0


def significance(values: pd.DataFrame, alpha: float = ALPHA) -> pd.Series:
    """How many others each algorithm (column) is significantly better than, over cases (rows)."""
    pairs = {name: [better(values[name], values[other]) for other in values if other != name] for name in values}
    return pd.Series({name: sum(p < alpha for p in found) for name, found in pairs.items()})


def ranks(scores: pd.Series) -> pd.Series:
    """1 for the highest score; who has the same shares the best of their places."""
    return scores.rank(ascending=False, method="min")


def by_case(tables: Mapping[str, pd.DataFrame], metric: str) -> pd.DataFrame:
    """A column for each algorithm and a row for each task, structure and case: the mean over replicates."""
    keys = ["set", "structure", "case_id"]
    return pd.DataFrame({name: table.groupby(keys)[metric].mean() for name, table in tables.items()})


def standings(tables: Mapping[str, pd.DataFrame], tasks: Iterable[str] | None = None) -> pd.DataFrame:
    """Algorithms (rows) in tasks (columns): mean ranks over structures and metrics; `mean` over tasks, the best first.

    tables  of the arms: columns set, structure, case_id, and those of `METRICS`
    tasks   which sets count; None: all there are
    """
    found: dict[str, list[pd.Series]] = {}
    for metric in METRICS:
        for (task, _), values in by_case(tables, metric).groupby(level=["set", "structure"], sort=False):
            if tasks is None or task in tasks:
                found.setdefault(task, []).append(ranks(significance(values)))
    means = pd.DataFrame({task: pd.concat(each, axis=1).mean(axis=1) for task, each in found.items()})
    return means.assign(mean=means.mean(axis=1)).sort_values("mean", kind="stable")


def kept(known: pd.DataFrame, unseen: pd.DataFrame) -> float:
    """Kendall's tau of two standings' mean ranks: 1 where everybody keeps the place, -1 where all is turned round.

    NaN where one of them tells nobody apart.
    """
    return float(stats.kendalltau(known["mean"], unseen["mean"].reindex(known.index)).statistic)
