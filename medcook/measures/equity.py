"""Equity-scaled metrics: the overall value of a metric, divided by one plus how far groups are from each other.

Two formulas go by this name, and one value cannot be read as the other. Of the FairSeg paper (Tian et al., ICLR 2024)
the first preprint defines the one with the standard deviation, the published version the one with the sum, which is
also that of FairVision and FairCLIP (Luo et al., 2024); its official code reports both. With alpha = 1, overall value
m and K groups of values m_g:

    by the sum     m / (1 + alpha * sum_g |m_g - m|)
    by the spread  m / (1 + alpha * s),  s the standard deviation of the m_g with K - 1 in its denominator

The sum grows with the number of groups, and m itself is mostly the largest group's value, so a small group that is
far off counts once, whatever its size. For two equally large groups s is the gap over sqrt(2), the sum the gap itself.
"""

import numpy as np


def equity_scaled(overall: float, groups: np.ndarray, alpha: float = 1.0) -> float:
    """The metric scaled by the sum of the groups' distances to the overall value; NaN without a group."""
    groups = np.asarray(groups, dtype=float)
    return float(overall / (1 + alpha * np.abs(groups - overall).sum())) if len(groups) else np.nan


def equity_scaled_std(overall: float, groups: np.ndarray, alpha: float = 1.0) -> float:
    """The metric scaled by the standard deviation of the groups' values; NaN for fewer than two groups."""
    groups = np.asarray(groups, dtype=float)
    return float(overall / (1 + alpha * groups.std(ddof=1))) if len(groups) > 1 else np.nan
