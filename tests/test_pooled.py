"""Measures of a group of patients: against scikit-learn and scipy, and through intervals and differences."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from medcook import pooled, statistics
from medcook.errors import MedcookError


def scored(seed=0, patients=40, shift=1.0, replicate=None):
    rng = np.random.default_rng(seed)
    outcome = np.arange(patients) % 2
    frame = pd.DataFrame({"patient_id": [f"p{k:02d}" for k in range(patients)], "outcome": outcome})
    frame["score"] = outcome * shift + rng.standard_normal(patients)
    frame["case_id"], frame["structure"] = frame.patient_id, "all"
    frame["group"] = np.where(np.arange(patients) < patients / 4, "rare", "common")
    return frame if replicate is None else frame.assign(replicate=replicate)


def test_auc_agrees_with_scikit_learn_also_with_ties():
    frame = scored()
    rounded = frame.score.round(0)
    for score in (frame.score, rounded):
        assert pooled.auc(score.to_numpy(), frame.outcome.to_numpy()) == pytest.approx(
            roc_auc_score(frame.outcome, score)
        )


def test_auc_of_one_outcome_is_undefined():
    assert math.isnan(pooled.auc(np.arange(3.0), np.ones(3)))


def test_rank_correlation_agrees_with_scipy():
    x, y = np.random.default_rng(1).standard_normal((2, 30)).round(1)
    assert pooled.spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)
    assert math.isnan(pooled.spearman(np.zeros(3), np.arange(3.0)))


@pytest.mark.parametrize("metric", [name for name, measure in pooled.POOLED.items() if measure.resampled])
def test_resampling_by_counts_equals_taking_the_rows_again(metric):
    rng = np.random.default_rng(3)
    columns = [rng.standard_normal(40).round(1), rng.integers(0, 2, 40).astype(float)]
    times = np.vstack([rng.multinomial(40, np.full(40, 1 / 40), size=20), 40 * np.eye(40, dtype=int)[0]])
    taken = [np.repeat(np.arange(40), row) for row in times]
    expected = [pooled.POOLED[metric].value(*(column[rows] for column in columns)) for rows in taken]
    assert pooled.POOLED[metric].resampled(*columns, times) == pytest.approx(np.array(expected), nan_ok=True)
    assert np.isfinite(expected[:20]).all() and math.isnan(expected[20])


def test_a_replicate_is_averaged_over_patients_like_the_mean_of_all():
    frame = pd.DataFrame({"patient_id": ["a", "a", "a", "b"] * 2, "replicate": [0] * 4 + [1] * 4})
    frame["dice"] = [0.9, 0.9, 0.9, 0.5, 0.8, 0.8, 0.8, 0.4]
    assert pooled.of_replicates(frame, "dice") == pytest.approx([0.7, 0.6])
    assert np.mean(pooled.of_replicates(frame, "dice")) == pytest.approx(statistics.interval(frame).mean)


def test_gap_and_worst_group_leave_out_the_unknown():
    value, group = np.array([1.0, 0.8, 0.5, 0.7, 0.0]), np.array(["a", "a", "b", "b", ""])
    assert pooled.gap(value, group) == pytest.approx(0.3)
    assert pooled.worst_group(value, group) == pytest.approx(0.6)
    assert math.isnan(pooled.gap(value[:2], group[:2]))


def test_interval_of_an_auc_agrees_with_delong():
    frame = scored(patients=200)
    found = statistics.interval(frame, "auc")
    positive, negative = (frame.score[frame.outcome == k].to_numpy() for k in (1, 0))
    wins = positive[:, None] > negative
    error = math.sqrt(wins.mean(1).var(ddof=1) / len(positive) + wins.mean(0).var(ddof=1) / len(negative))
    assert found.low < found.mean < found.high
    assert found.half_width == pytest.approx(1.96 * error, rel=0.1)


def test_difference_pairs_patients_and_counts_every_replicate():
    better = pd.concat([scored(seed, shift=3, replicate=seed) for seed in range(3)])
    worse = pd.concat([scored(seed, shift=0.5, replicate=seed) for seed in range(3)])
    found = statistics.difference(better, worse, "auc")
    assert found.low > 0 and found.same_sign and len(found.per_replicate) == 3 and found.design == "crossed"
    assert found.p < 0.01
    expected = [
        pooled.measure(scored(s, shift=3), "auc") - pooled.measure(scored(s, shift=0.5), "auc") for s in range(3)
    ]
    assert found.per_replicate == pytest.approx(expected)
    assert found.effect == pytest.approx(np.mean(expected))


def test_the_same_frame_twice_differs_by_nothing():
    frame = scored()
    found = statistics.difference(frame, frame, "auc")
    assert (found.low, found.mean, found.high, found.p) == (0, 0, 0, 1)


def test_folds_are_put_together_before_a_group_measure():
    folds = scored(patients=60).assign(replicate=np.arange(60) % 3, dice=np.linspace(0, 1, 60))
    found = statistics.interval(folds, "dice_gap")
    assert found.design == "nested" and found.n_patients == 60 and found.n_replicates == 3
    assert found.mean == pytest.approx(pooled.measure(folds, "dice_gap"))


def test_scores_of_different_networks_are_never_ranked_together():
    folds = scored(patients=60).assign(replicate=np.arange(60) % 3)
    moved = folds.assign(score=folds["score"] + 100 * folds["replicate"])
    found, mean = statistics.interval(moved, "auc"), np.mean(pooled.of_replicates(folds, "auc"))
    assert found.mean == pytest.approx(mean) and pooled.value(moved, "auc") == pytest.approx(mean)
    assert (found.low, found.high) == (statistics.interval(folds, "auc").low, statistics.interval(folds, "auc").high)
    assert pooled.measure(moved, "auc") < mean - 0.05, "put together, a fold's scale would decide"
    assert found.design == "nested" and found.low < mean < found.high


def test_other_patients_cannot_be_compared():
    with pytest.raises(MedcookError, match="Only one of the two arms"):
        statistics.difference(scored(patients=10), scored(patients=12), "auc")


def test_what_nobody_defines_is_said():
    with pytest.raises(MedcookError, match="auc is not defined"):
        statistics.interval(scored().assign(outcome=1), "auc")
