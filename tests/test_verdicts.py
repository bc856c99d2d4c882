"""The verdict rule, as a table of cases."""

import math

import pytest

from medcook.verdicts import gains, judge

UP, DOWN, MIXED = (0.02, 0.03, 0.01), (-0.02, -0.03, -0.01), (0.02, -0.01, 0.03)


def verdict(low, high, per_replicate=UP, expect="superior", profile="full", **options):
    return judge(profile=profile, expect=expect, low=low, high=high, per_replicate=per_replicate, **options)


@pytest.mark.parametrize(
    ("low", "high", "per_replicate", "options", "expected"),
    [
        (0.01, 0.04, UP, {}, "supported"),
        (0.01, 0.04, MIXED, {}, "inconclusive here"),
        (-0.01, 0.04, UP, {}, "inconclusive here"),
        (0.0, 0.04, UP, {}, "inconclusive here"),
        (-0.04, -0.01, DOWN, {}, "not supported"),
        (-0.04, -0.01, MIXED, {}, "inconclusive here"),
        (0.0, 0.0, (0.0, 0.0, 0.0), {}, "not supported"),
        (0.006, 0.03, UP, {"margin": 0.005}, "supported"),
        (0.004, 0.03, UP, {"margin": 0.005}, "inconclusive here"),
        (0.001, 0.004, (0.002, 0.003, 0.001), {"margin": 0.005}, "not supported"),
        (-0.004, 0.002, (-0.001, 0.001, -0.002), {"expect": "non-inferior", "margin": 0.01}, "supported"),
        (-0.02, 0.002, (-0.001, 0.001, -0.002), {"expect": "non-inferior", "margin": 0.01}, "inconclusive here"),
        (-0.05, -0.02, (-0.03, -0.04, -0.03), {"expect": "non-inferior", "margin": 0.01}, "not supported"),
        (0.01, 0.04, UP, {"expect": "association"}, "supported"),
        (-0.04, -0.01, DOWN, {"expect": "association"}, "supported"),
        (-0.01, 0.01, MIXED, {"expect": "association"}, "inconclusive here"),
        (-0.01, 0.01, MIXED, {"expect": "association", "margin": 0.02}, "not supported"),
        (0.01, 0.04, MIXED, {"expect": "association"}, "inconclusive here"),
        (math.nan, math.nan, UP, {}, "inconclusive here"),
    ],
)
def test_the_rule(low, high, per_replicate, options, expected):
    assert verdict(low, high, per_replicate, **options) == expected


@pytest.mark.parametrize(
    ("low", "high", "ratio", "expected"),
    [
        (-0.005, 0.01, 0.5, "supported"),
        (-0.005, 0.01, 1.0, "not supported"),
        (-0.02, 0.01, 0.5, "inconclusive here"),
        (-0.005, 0.01, None, "inconclusive here"),
        (-0.04, -0.02, 0.5, "not supported"),
    ],
)
def test_cheaper_at_equal_quality_needs_both(low, high, ratio, expected):
    middle = ((low + high) / 2,) * 3
    found = verdict(low, high, middle, "cheaper-at-equal-quality", margin=0.01, cost_ratio=ratio)
    assert found == expected


def test_quick_and_too_few_replicates_are_not_judged():
    assert verdict(0.01, 0.04, profile="quick") == "not judged"
    assert verdict(0.01, 0.04, UP[:2]) == "not judged"


@pytest.mark.parametrize(
    ("bounds", "replicates", "data", "expected"),
    [
        ((0.01, 0.04), UP, "real", "reproduced"),
        ((-0.04, -0.01), DOWN, "real", "contradicted"),
        ((-0.01, 0.04), UP, "real", "inconclusive here"),
        ((0.01, 0.04), UP, "simulated", "supported"),
    ],
)
def test_only_paper_on_real_data_reproduces_or_contradicts(bounds, replicates, data, expected):
    assert verdict(*bounds, replicates, profile="paper", data=data) == expected


def test_a_smaller_distance_is_a_gain():
    assert gains("hd95", -3.0, -1.0, (-2.0, -1.5)) == (1.0, 3.0, (2.0, 1.5))
    assert gains("dice", -3.0, -1.0, (-2.0,)) == (-3.0, -1.0, (-2.0,))


@pytest.mark.parametrize("metric", ["ece", "brier", "crps", "energy_distance", "error", "aurc", "fpr_at_95"])
def test_so_is_a_smaller_error_of_a_forecast(metric):
    assert gains(metric, -0.3, -0.1, (-0.2,)) == (0.1, 0.3, (0.2,))


def test_so_is_a_smaller_share_of_wrong_frames():
    assert gains("frame_error", -0.3, -0.1, (-0.2,)) == (0.1, 0.3, (0.2,))


def test_an_unknown_expectation_is_refused():
    with pytest.raises(ValueError, match="better"):
        verdict(0.01, 0.04, expect="better")
