"""How sure a number is: hierarchical bootstrap, paired differences, correction for many tests.

The unit is the patient. Rows of one patient (cases, structures) are averaged first, because they are not independent.
Where a frame has several replicates (column `replicate`: seeds, draws or folds), these are resampled too:

crossed  the same patients were scored in every replicate (seeds, draws): patients and replicates are resampled
         independently of each other;
nested   every replicate has its own patients (folds of a cross-validation): replicates are resampled, and within each
         its patients.

A measure of `medcook.pooled` (an AUC, a gap between groups) is computed anew for every resample of the patients.

Intervals are 95% percentile intervals. With very few patients or replicates they are too narrow; n stands beside them.
"""

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from medcook import pooled
from medcook.errors import MedcookError

RESAMPLES = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean with its interval; `low` and `high` are NaN where `note` says why there is none."""

    mean: float
    low: float
    high: float
    n_patients: int
    n_replicates: int
    design: str
    note: str = ""

    @property
    def half_width(self) -> float:
        """Half of the interval's width."""
        return (self.high - self.low) / 2


@dataclass(frozen=True)
class Difference(Estimate):
    """A paired difference: `mean` is the effect, a minus b."""

    p: float = math.nan
    """Two-sided: Wilcoxon signed-rank test on the patients' mean differences; of a pooled measure by its resamples."""
    per_replicate: tuple[float, ...] = ()
    """Mean difference in each replicate, in the replicates' order."""

    @property
    def effect(self) -> float:
        return self.mean

    @property
    def same_sign(self) -> bool:
        """Whether every replicate's difference points the same way (a zero points nowhere)."""
        return {np.sign(value) for value in self.per_replicate} in ({1.0}, {-1.0})


def interval(frame: pd.DataFrame, metric: str = "dice", resamples: int = RESAMPLES, seed: int = 0) -> Estimate:
    """Mean of `metric` over patients and replicates with its bootstrap interval.

    frame  columns patient_id, `metric` and, where there are several replicates, replicate; undefined values (NaN)
           are left out, and counted in `note`; for a pooled measure the columns that it is made from
    """
    if metric in pooled.POOLED:
        return _pooled([frame], metric, resamples, seed)
    table = patient_table(frame, metric)
    note = _note(frame, metric, table)
    low, high = (math.nan, math.nan) if _too_few(table) else _bounds(_bootstrap(table, resamples, seed))
    return Estimate(_mean(table), low, high, table.shape[1], table.shape[0], _design(table), note)


def difference(
    a: pd.DataFrame, b: pd.DataFrame, metric: str = "dice", resamples: int = RESAMPLES, seed: int = 0
) -> Difference:
    """a minus b, paired by replicate, case and structure, with interval, per-replicate effects and p.

    Both frames must hold the same rows; MedcookError where one has a case that the other lacks.
    """
    if metric in pooled.POOLED:
        _pair(a, b, pooled.POOLED[metric].columns[0])
        return _pooled([a, b], metric, resamples, seed)
    paired = _pair(a, b, metric)
    estimate = interval(paired, metric, resamples, seed)
    table = patient_table(paired, metric)
    return Difference(**vars(estimate), p=_wilcoxon(table), per_replicate=tuple(map(float, np.nanmean(table, axis=1))))


def correlation(frame: pd.DataFrame, x: str, y: str, resamples: int = RESAMPLES, seed: int = 0) -> Estimate:
    """Spearman's rank correlation of two columns over patients (their means), with an interval over patients."""
    means = frame.groupby("patient_id")[[x, y]].mean().dropna().to_numpy()
    count = len(means)
    if count < 3:
        return Estimate(math.nan, math.nan, math.nan, count, 1, "single", f"{_patients(count)}: no correlation")
    draws = np.random.default_rng(seed).integers(count, size=(resamples, count))
    low, high = _bounds(_spearman(means[draws]))
    return Estimate(float(_spearman(means[None])[0]), low, high, count, 1, "single")


def holm(pvalues) -> np.ndarray:
    """Holm's step-down adjustment for several tests; NaN (no test) stays NaN and is not counted."""
    given = np.asarray(pvalues, dtype=float)
    adjusted = np.full(given.shape, math.nan)
    tested = np.flatnonzero(~np.isnan(given))
    order = tested[np.argsort(given[tested], kind="stable")]
    factors = np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(given[order] * factors), 1.0)
    return adjusted


def smallest_effect(estimate: Estimate) -> float:
    """The smallest effect that this run could have seen: one whose interval of this width would just exclude zero."""
    return estimate.half_width


def patient_table(frame: pd.DataFrame, metric: str) -> np.ndarray:
    """(replicates, patients) array of patient means; NaN where a replicate did not score a patient."""
    if frame.empty or frame[metric].isna().all():
        raise MedcookError(f"There is no value of {metric!r} to average.", "Evaluate at least one annotated case.")
    replicate = frame["replicate"] if "replicate" in frame else pd.Series(0, index=frame.index, name="replicate")
    means = frame[metric].astype(float).groupby([replicate, frame["patient_id"]]).mean()
    return means.unstack("patient_id").dropna(axis="columns", how="all").to_numpy()


def _pooled(frames: list[pd.DataFrame], metric: str, resamples: int, seed: int) -> Estimate:
    """The Estimate of one frame, or the Difference of two, of a pooled measure."""
    first = frames[0]
    count, several = first["patient_id"].nunique(), "replicate" in first
    values, samples = pooled.bootstrap(frames, metric, resamples, seed)
    if np.isnan(values).all():
        raise MedcookError(f"{metric} is not defined on these cases.", "It needs cases of every group or outcome.")
    mean, drawn = (np.subtract(*both) if len(frames) == 2 else both[0] for both in (values.mean(1), samples))
    drawn = drawn[np.isfinite(drawn)]
    low, high = _bounds(drawn) if count > 1 and len(drawn) else (math.nan, math.nan)
    replicates = first["replicate"].nunique() if several else 1
    design = "nested" if pooled.is_nested(first) else "crossed" if replicates > 1 else "single"
    note = "" if count > 1 else "1 patient: no interval"
    content = (float(mean), low, high, count, replicates, design, note)
    if len(frames) == 1:
        return Estimate(*content)
    per = np.array([[pooled.measure(part, metric) for _, part in _by_replicate(frame)] for frame in frames])
    return Difference(*content, p=_two_sided(drawn), per_replicate=tuple(map(float, per[0] - per[1])))


def _by_replicate(frame: pd.DataFrame):
    return frame.groupby("replicate") if "replicate" in frame else [(0, frame)]


def _two_sided(samples: np.ndarray) -> float:
    """Twice the share of resamples beyond zero, whichever side is smaller; never below what so many can show."""
    beyond = min((samples <= 0).sum(), (samples >= 0).sum())
    return min(1.0, 2 * float(beyond + 1) / (len(samples) + 1))


def _design(table: np.ndarray) -> str:
    if len(table) == 1:
        return "single"
    return "nested" if (np.isfinite(table).sum(axis=0) == 1).all() else "crossed"


def _bootstrap(table: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (_nested if _design(table) == "nested" else _crossed)(table, resamples, rng)


def _crossed(table: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Means of resampled rows and columns: the counts of a resample are multinomial, so that no index is drawn."""
    rows, columns = (rng.multinomial(n, np.full(n, 1 / n), size=resamples) for n in table.shape)
    known = np.isfinite(table)
    total = ((rows @ np.where(known, table, 0.0)) * columns).sum(axis=1)
    count = ((rows @ known) * columns).sum(axis=1)
    return total[count > 0] / count[count > 0]


def _nested(table: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Means of resampled replicates, and of resampled patients within each drawn one."""
    drawn = rng.multinomial(len(table), np.full(len(table), 1 / len(table)), size=resamples)
    total, count = np.zeros(resamples), np.zeros(resamples)
    for times, row in zip(drawn.T, table, strict=True):
        values = row[np.isfinite(row)]
        size = len(values)
        total += rng.multinomial(times * size, np.full(size, 1 / size)) @ values
        count += times * size
    return total / count


def _bounds(means: np.ndarray) -> tuple[float, float]:
    low, high = np.nanpercentile(means, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return float(low), float(high)


def _mean(table: np.ndarray) -> float:
    return float(np.nanmean(table))


def _too_few(table: np.ndarray) -> bool:
    return table.shape[1] < 2


def _patients(count: int) -> str:
    return f"{count} patient" if count == 1 else f"{count} patients"


def _note(frame: pd.DataFrame, metric: str, table: np.ndarray) -> str:
    undefined = int(frame[metric].isna().sum())
    parts = [f"{undefined} of {len(frame)} values undefined"] * (undefined > 0)
    parts += ["1 patient: no interval"] * _too_few(table)
    return "; ".join(parts)


def _pair(a: pd.DataFrame, b: pd.DataFrame, metric: str) -> pd.DataFrame:
    """One row per common key with the difference a minus b in column `metric`.

    Where cases are answered with several supports (few-shot), each answer is paired with that of the same support.
    """
    keys = [key for key in ("replicate", "patient_id", "case_id", "structure", "support") if key in a and key in b]
    if a.duplicated(keys).any() or b.duplicated(keys).any():
        raise MedcookError("A case stands twice in a table to compare.", "One row per replicate, case and structure.")
    joined = a[[*keys, metric]].merge(b[[*keys, metric]], on=keys, how="outer", suffixes=("_a", "_b"), indicator=True)
    if (alone := joined["_merge"] != "both").any():
        example = " ".join(str(joined.loc[alone, key].iloc[0]) for key in keys)
        raise MedcookError(
            f"Only one of the two arms was scored on {int(alone.sum())} rows ({example} is the first).",
            "Evaluate both arms on the same replicates and cases.",
        )
    return joined[keys].assign(**{metric: joined[f"{metric}_a"] - joined[f"{metric}_b"]})


def _wilcoxon(table: np.ndarray) -> float:
    """p of the signed-rank test on patient means; NaN for one patient, 1 where no patient differs."""
    means = np.nanmean(table, axis=0)
    if len(means) < 2:
        return math.nan
    return 1.0 if not means.any() else float(stats.wilcoxon(means).pvalue)


def _spearman(samples: np.ndarray) -> np.ndarray:
    """Rank correlation of each of (resamples, patients, 2) samples; NaN where a column is constant."""
    ranks = stats.rankdata(samples, axis=1)
    centred = ranks - ranks.mean(axis=1, keepdims=True)
    scale = np.sqrt((centred**2).sum(axis=1)).prod(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (centred[..., 0] * centred[..., 1]).sum(axis=1) / scale
