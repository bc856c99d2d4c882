"""Selection: what is left of the error when the least certain cases (or voxels) are handed to a human."""

import math

import numpy as np


def risk_coverage(uncertainty, risk) -> tuple[np.ndarray, np.ndarray]:
    """(coverage k / n, mean risk of the k least uncertain) for k = 1 .. n (Geifman and El-Yaniv 2017).

    Equally uncertain entries share their mean risk: what a random order among them gives on average.
    """
    risk = _in_order(uncertainty, risk)
    count = np.arange(1, len(risk) + 1)
    return count / max(1, len(risk)), np.cumsum(risk) / count


def aurc(uncertainty, risk) -> float:
    """Area under the risk-coverage curve: its mean over k. Low where uncertainty ranks errors well."""
    risks = risk_coverage(uncertainty, risk)[1]
    return float(risks.mean()) if len(risks) else np.nan


def handed_over(uncertainty, risk, share: float = 0.1) -> tuple[float, float]:
    """(mean risk of all, mean risk of the rest) when the most uncertain `share`, rounded up, goes to a human."""
    risk = _in_order(uncertainty, risk)
    kept = len(risk) - math.ceil(share * len(risk) - 1e-9)
    return (float(risk.mean()), float(risk[:kept].mean())) if kept > 0 else (np.nan, np.nan)


def handover_gain(uncertainty, error, share: float = 0.1) -> float:
    """How much lower the mean error is without the most uncertain `share`; zero where uncertainty says nothing."""
    everything, rest = handed_over(uncertainty, error, share)
    return everything - rest


def _in_order(uncertainty, risk) -> np.ndarray:
    """Risks from the least to the most uncertain entry, the mean of a tie in every entry of it."""
    uncertainty, risk = (np.asarray(each, dtype=float).reshape(-1) for each in (uncertainty, risk))
    level, count = np.unique(uncertainty, return_inverse=True, return_counts=True)[1:]
    mean = np.bincount(level, risk, len(count)) / count
    return np.repeat(mean, count)
