"""Intervals that cover, differences that pair, and corrections that match worked examples."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from medcook import statistics
from medcook.errors import MedcookError


def frame_of(table, patients=None):
    """(replicates, patients) array -> evaluation frame, one case and structure per patient; NaN leaves a row out."""
    table = np.atleast_2d(table)
    patients = patients or [f"p{number:03d}" for number in range(table.shape[1])]
    rows = [
        {"replicate": k, "patient_id": name, "case_id": f"{name}-a", "structure": "heart", "dice": value}
        for k, row in enumerate(table)
        for name, value in zip(patients, row, strict=True)
        if np.isfinite(value)
    ]
    return pd.DataFrame(rows)


def folds_of(values, count):
    """The same values as a nested table: patient i was scored in fold i % count."""
    table = np.full((count, len(values)), np.nan)
    table[np.arange(len(values)) % count, np.arange(len(values))] = values
    return table


def covers(simulate, truth=0.0, trials=300):
    hits = 0
    for trial in range(trials):
        estimate = statistics.interval(frame_of(simulate(np.random.default_rng(trial))), resamples=300, seed=trial)
        hits += estimate.low <= truth <= estimate.high
    return hits / trials


def test_one_replicate_covers_at_its_level():
    assert 0.90 <= covers(lambda rng: rng.normal(size=40)) <= 0.99


def test_crossed_replicates_cover_at_least_their_level():
    def simulate(rng):
        return rng.normal(size=(1, 25)) + 0.3 * rng.normal(size=(6, 1)) + 0.3 * rng.normal(size=(6, 25))

    assert 0.90 <= covers(simulate) <= 1.0


def test_nested_folds_cover_at_least_their_level():
    assert 0.90 <= covers(lambda rng: folds_of(rng.normal(size=40), 5)) <= 1.0


def test_an_interval_over_patients_alone_would_miss_the_spread_between_seeds():
    table = np.repeat([[0.1], [0.5], [0.9]], 30, axis=1) + np.random.default_rng(0).normal(scale=0.01, size=(3, 30))
    crossed = statistics.interval(frame_of(table))
    one_seed = statistics.interval(frame_of(table[1]))
    assert crossed.design == "crossed" and crossed.half_width > 10 * one_seed.half_width


def test_a_patient_that_one_replicate_alone_scored_makes_no_folds():
    table = np.random.default_rng(0).normal(size=(3, 20))
    table[1:, 0] = np.nan
    assert statistics.interval(frame_of(table)).design == "crossed"


def test_p_of_a_pooled_measure_is_never_nought():
    frame = frame_of(np.zeros((1, 20))).assign(outcome=[0.0, 1.0] * 10)
    a, b = (frame.assign(score=sign * frame["outcome"]) for sign in (1, -1))
    found = statistics.difference(a, b, "auc", resamples=199)
    assert found.effect == 1 and found.p == pytest.approx(2 / 200, rel=0.1)


def test_folds_are_recognised_as_nested():
    estimate = statistics.interval(frame_of(folds_of(np.linspace(0, 1, 20), 5)))
    assert (estimate.design, estimate.n_patients, estimate.n_replicates) == ("nested", 20, 5)
    assert estimate.mean == pytest.approx(0.5)


def test_rows_of_one_patient_are_averaged_before_anything_is_resampled():
    many = pd.DataFrame({"patient_id": ["a"] * 50 + ["b"], "dice": [0.0] * 50 + [1.0]})
    estimate = statistics.interval(many)
    assert estimate.mean == 0.5 and estimate.n_patients == 2
    assert (estimate.low, estimate.high) == (0.0, 1.0)


def test_one_patient_has_no_interval_and_says_so():
    estimate = statistics.interval(frame_of([[0.8], [0.9]]))
    assert estimate.mean == pytest.approx(0.85)
    assert math.isnan(estimate.low) and math.isnan(estimate.high) and "1 patient" in estimate.note


def test_undefined_values_are_counted_in_the_note():
    frame = frame_of([0.1, 0.2, 0.3])
    frame.loc[0, "dice"] = math.nan
    assert statistics.interval(frame).note == "1 of 3 values undefined"


def test_nothing_to_average_is_an_error():
    with pytest.raises(MedcookError, match="dice"):
        statistics.interval(pd.DataFrame({"patient_id": [], "dice": []}))


def test_same_seed_same_interval():
    frame = frame_of(np.random.default_rng(0).random((3, 10)))
    assert statistics.interval(frame) == statistics.interval(frame)


def test_difference_pairs_patients_so_that_their_spread_cancels():
    rng = np.random.default_rng(1)
    hard = rng.normal(scale=5, size=(1, 20))
    a, b = hard + 0.2 + rng.normal(scale=0.05, size=(3, 20)), hard + rng.normal(scale=0.05, size=(3, 20))
    found = statistics.difference(frame_of(a), frame_of(b))
    assert found.low < 0.2 < found.high and found.half_width < 0.1
    assert found.same_sign and len(found.per_replicate) == 3
    assert (found.n_patients, found.n_replicates) == (20, 3)


def test_difference_tests_patient_means_with_wilcoxon():
    a, b = np.array([[0.5, 0.6, 0.8, 0.4, 0.9, 0.7]]), np.array([[0.4, 0.65, 0.6, 0.3, 0.7, 0.4]])
    assert statistics.difference(frame_of(a), frame_of(b)).p == pytest.approx(stats.wilcoxon((a - b)[0]).pvalue)


def test_row_order_does_not_matter_to_a_difference():
    a, b = frame_of([[0.5, 0.6, 0.8]]), frame_of([[0.4, 0.6, 0.9]])
    assert statistics.difference(a, b.iloc[::-1]) == statistics.difference(a, b)


def test_equal_arms_differ_by_nothing():
    frame = frame_of([[0.5, 0.6], [0.5, 0.7]])
    found = statistics.difference(frame, frame)
    assert (found.effect, found.low, found.high, found.p, found.same_sign) == (0, 0, 0, 1, False)


def test_a_sign_that_changes_between_replicates_is_seen():
    found = statistics.difference(frame_of([[0.5, 0.6], [0.5, 0.6]]), frame_of([[0.4, 0.5], [0.6, 0.7]]))
    assert not found.same_sign and found.per_replicate == pytest.approx((0.1, -0.1))


def test_a_difference_of_one_patient_has_no_p():
    found = statistics.difference(frame_of([[0.5]]), frame_of([[0.4]]))
    assert math.isnan(found.p) and math.isnan(found.low) and found.effect == pytest.approx(0.1)


def test_arms_scored_on_different_cases_are_refused():
    with pytest.raises(MedcookError, match="p002"):
        statistics.difference(frame_of([[0.5, 0.6, 0.7]]), frame_of([[0.5, 0.6]]))


def test_a_case_listed_twice_is_refused():
    frame = frame_of([[0.5, 0.6]])
    with pytest.raises(MedcookError, match="twice"):
        statistics.difference(pd.concat([frame, frame]), frame)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),
        ([0.5, 0.6], [1.0, 1.0]),
        ([0.02, 0.02, 0.02], [0.06, 0.06, 0.06]),
        ([0.01, math.nan, 0.02], [0.02, math.nan, 0.02]),
        ([], []),
    ],
)
def test_holm_matches_worked_examples(given, expected):
    assert statistics.holm(given) == pytest.approx(expected, nan_ok=True)


def test_correlation_matches_scipy_and_covers_it():
    rng = np.random.default_rng(2)
    x = rng.normal(size=50)
    frame = pd.DataFrame({"patient_id": range(50), "x": x, "y": x + rng.normal(size=50)})
    found = statistics.correlation(frame, "x", "y")
    assert found.mean == pytest.approx(stats.spearmanr(frame.x, frame.y).statistic)
    assert 0 < found.low < found.mean < found.high < 1


def test_two_patients_have_no_correlation():
    found = statistics.correlation(pd.DataFrame({"patient_id": [1, 2], "x": [1, 2], "y": [3, 4]}), "x", "y")
    assert math.isnan(found.mean) and "2 patients" in found.note


def test_the_smallest_effect_is_the_half_width():
    estimate = statistics.Estimate(0.0, -0.03, 0.01, 10, 3, "crossed")
    assert statistics.smallest_effect(estimate) == pytest.approx(0.02)


def test_answers_with_several_supports_are_paired_support_by_support():
    rows = [(patient, number) for patient in "abcde" for number in (0.0, 1.0)]
    frame = pd.DataFrame(rows, columns=["patient_id", "support"]).assign(case_id="x", structure="lung", replicate=0)
    better = frame.assign(dice=frame["support"] * 0.2 + 0.6)
    worse = frame.assign(dice=frame["support"] * 0.2 + 0.5).iloc[::-1]
    assert statistics.difference(better, worse).mean == pytest.approx(0.1)
    with pytest.raises(MedcookError, match="stands twice"):
        statistics.difference(better.drop(columns="support"), worse.drop(columns="support"))
