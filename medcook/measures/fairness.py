"""How groups of patients fare: a table with intervals, whether their gap is more than noise, equity-scaled metrics.

A gap between groups, best minus worst, is never negative: groups of a few patients differ by chance alone, and its
bootstrap interval cannot reach zero. What it must be held against is the gap that the same patients show when the
groups' names are dealt out at random.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from medcook import statistics
from medcook.errors import MedcookError
from medcook.measures.equity import equity_scaled, equity_scaled_std

__all__ = ["GapTest", "by_group", "dealt_gaps", "equity_scaled", "equity_scaled_std", "gap_test"]

PERMUTATIONS = 5000
LEVEL = 0.05


@dataclass(frozen=True)
class GapTest:
    """The gap between the best and the worst group's mean, and what chance makes of it.

    chance  the gap that 95% of random groups of the same sizes stay below
    p       the share of random groups whose gap is at least as large
    n       {group: patients}
    """

    gap: float
    chance: float
    p: float
    n: dict[str, int]

    @property
    def is_noise(self) -> bool:
        """Whether the gap cannot be told from noise."""
        return not self.p < LEVEL

    def __str__(self) -> str:
        sizes = ", ".join(f"{name} {count}" for name, count in self.n.items())
        verdict = "cannot be told from noise" if self.is_noise else "is more than noise"
        return f"A gap of {self.gap:.3f} {verdict} (chance: up to {self.chance:.3f}, p = {self.p:.2g}; {sizes})."


def by_group(frame: pd.DataFrame, metric: str = "dice", group: str = "group") -> pd.DataFrame:
    """One line for each group: mean of `metric` with its 95% interval over patients (and replicates), and n patients.

    A pooled measure (an AUC) is computed for each group. Rows without a group are left out.
    """
    lines = {}
    for name, rows in _named(frame, group).groupby(group):
        found = statistics.interval(rows, metric)
        lines[name] = {"mean": found.mean, "low": found.low, "high": found.high, "n": found.n_patients}
    return pd.DataFrame.from_dict(lines, orient="index").rename_axis(group)


def gap_test(
    frame: pd.DataFrame, metric: str = "dice", group: str = "group", permutations: int = PERMUTATIONS, seed: int = 0
) -> GapTest:
    """Is the gap between the groups' means more than what random groups of the same sizes show?

    frame  one or more rows a patient, which are averaged first (also over replicates); a patient has one group
    """
    gap, random, n = dealt_gaps(frame, metric, group, permutations, seed)
    p = (1 + np.sum(random >= gap - 1e-12)) / (1 + permutations)
    return GapTest(gap, float(np.quantile(random, 1 - LEVEL)), float(p), n)


def dealt_gaps(
    frame: pd.DataFrame, metric: str = "dice", group: str = "group", permutations: int = PERMUTATIONS, seed: int = 0
) -> tuple[float, np.ndarray, dict[str, int]]:
    """(gap, gaps (permutations,) of the same patients in groups dealt out at random, {group: patients})."""
    patients = _named(frame, group).groupby("patient_id").agg(value=(metric, "mean"), group=(group, "first"))
    names, codes, sizes = np.unique(patients["group"].to_numpy(str), return_inverse=True, return_counts=True)
    if len(names) < 2:
        raise MedcookError("A gap needs at least two groups.", f"These rows have {len(names)}.")
    rng = np.random.default_rng(seed)
    dealt = rng.permuted(np.tile(codes, (permutations, 1)), axis=1)
    values = patients["value"].to_numpy(float)
    gap, random = (gaps(values, each, sizes) for each in (codes[None], dealt))
    return float(gap[0]), random, dict(zip(names.tolist(), sizes.tolist(), strict=True))


def gaps(values: np.ndarray, codes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """(N,) best minus worst group's mean of `values` (patients,) for N ways (N, patients) of dealing out groups."""
    means = np.stack([(codes == code) @ values for code in range(len(sizes))], axis=1) / sizes
    return np.ptp(means, axis=1)


def _named(frame: pd.DataFrame, group: str) -> pd.DataFrame:
    """The rows whose group is known."""
    known = frame[group].notna() & (frame[group] != "")
    if not known.any():
        raise MedcookError(f"No row has a {group}.", "Take an attribute that the data set knows.")
    return frame[known]
