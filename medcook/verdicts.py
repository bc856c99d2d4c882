"""The verdict on a claim, by rule: a pure function of the comparison and what the claim expects.

All effects here are gains: positive is better, also where the metric is a distance. With margin m >= 0:

========================  ===============================================  =====================================
expectation               supported                                        not supported
========================  ===============================================  =====================================
superior                  interval above m, every replicate above 0        interval and every replicate at most m
non-inferior              interval above -m, every replicate above -m      interval and every replicate at most -m
cheaper-at-equal-quality  non-inferior, and the named cost ratio below 1   non-inferiority is not supported, or the
                                                                           cost ratio is 1 or more
association               interval outside [-m, m], every replicate of     interval inside [-m, m]
                          the same sign                                    (never for m = 0)
========================  ===============================================  =====================================

Everything else is inconclusive here. Fewer than three replicates, and everything at `quick`, is not judged. Only
`paper`, on real data in the paper's own setting, may say reproduced (supported) or contradicted (not supported).
"""

from math import isfinite
from typing import Literal

Verdict = Literal["supported", "not supported", "inconclusive here", "not judged", "reproduced", "contradicted"]

MIN_REPLICATES = 3
LOWER_IS_BETTER = frozenset(
    ("hd95", "assd", "hausdorff", "volume_difference", "missed", "false_alarm")
    + ("ece", "brier", "crps", "energy_distance", "error", "aurc", "fpr_at_95", "frame_error")
)
EXPECTATIONS = ("superior", "non-inferior", "cheaper-at-equal-quality", "association")


def judge(
    *,
    profile: str,
    expect: str,
    low: float,
    high: float,
    per_replicate: tuple[float, ...],
    margin: float = 0.0,
    cost_ratio: float | None = None,
    data: str = "real",
) -> Verdict:
    """The verdict on one comparison.

    low, high      95% interval of the gain; per_replicate the gain in each replicate
    cost_ratio     cost of the method over the baseline's, for cheaper-at-equal-quality
    data           `real`, or one of the simulated kinds, on which nothing is reproduced or contradicted
    """
    if expect not in EXPECTATIONS:
        raise ValueError(f"expect is {expect!r}, not one of {', '.join(EXPECTATIONS)}")
    if profile == "quick" or len(per_replicate) < MIN_REPLICATES:
        return "not judged"
    if not (isfinite(low) and isfinite(high)):
        return "inconclusive here"
    answer = _answer(expect, low, high, per_replicate, margin, cost_ratio)
    if profile == "paper" and data == "real":
        return {"supported": "reproduced", "not supported": "contradicted"}.get(answer, answer)
    return answer


def gains(metric: str, low: float, high: float, per_replicate: tuple[float, ...]):
    """(low, high, per_replicate) of a difference as gains: negated where a lower value of the metric is better."""
    if metric not in LOWER_IS_BETTER:
        return low, high, tuple(per_replicate)
    return -high, -low, tuple(-value for value in per_replicate)


def _answer(expect, low, high, per_replicate, margin, cost_ratio) -> Verdict:
    if expect == "superior":
        return _against(margin, 0.0, low, high, per_replicate)
    if expect == "association":
        return _association(low, high, per_replicate, margin)
    quality = _against(-margin, -margin, low, high, per_replicate)
    if expect == "non-inferior" or quality == "not supported":
        return quality
    if cost_ratio is None or not isfinite(cost_ratio):
        return "inconclusive here"
    return quality if cost_ratio < 1 else "not supported"


def _against(bar, replicate_bar, low, high, per_replicate) -> Verdict:
    """Supported with the interval above `bar` and every replicate above `replicate_bar`."""
    if low > bar and all(value > replicate_bar for value in per_replicate):
        return "supported"
    if high <= bar and all(value <= bar for value in per_replicate):
        return "not supported"
    return "inconclusive here"


def _association(low, high, per_replicate, margin) -> Verdict:
    positive = low > margin and all(value > 0 for value in per_replicate)
    negative = high < -margin and all(value < 0 for value in per_replicate)
    if positive or negative:
        return "supported"
    return "not supported" if margin > 0 and -margin <= low and high <= margin else "inconclusive here"
