"""Groups of patients: against fairlearn, scipy and closed forms."""

import math

import numpy as np
import pandas as pd
import pytest
from fairlearn.metrics import MetricFrame
from scipy import stats

from medcook import pooled, statistics
from medcook.errors import MedcookError
from medcook.measures.equity import equity_scaled, equity_scaled_std
from medcook.measures.fairness import by_group, gap_test


def table(patients=60, shift=0.0, seed=0, groups=("a", "b", "c")):
    rng = np.random.default_rng(seed)
    names = np.array(groups)[np.arange(patients) % len(groups)]
    dice = 0.8 + 0.05 * rng.standard_normal(patients) - shift * (names == groups[0])
    patient = [f"p{k:02d}" for k in range(patients)]
    return pd.DataFrame({"patient_id": patient, "case_id": patient, "structure": "x", "dice": dice, "group": names})


def frame_of_fairlearn(frame):
    """Its mean of a value by group; it insists on predictions, and takes the value for them."""

    def mean(y_true, y_pred):
        return y_pred.mean()

    return MetricFrame(metrics=mean, y_true=frame.dice, y_pred=frame.dice, sensitive_features=frame.group)


class TestEquityScaled:
    def test_both_formulas_by_hand(self):
        groups = [0.9, 0.8, 0.4]
        assert equity_scaled(0.8, groups) == pytest.approx(0.8 / 1.5)
        assert equity_scaled_std(0.8, groups) == pytest.approx(0.8 / (1 + math.sqrt((0.04 + 0.01 + 0.09) / 2)))
        assert equity_scaled(0.8, groups, alpha=2) == pytest.approx(0.8 / 2)
        assert equity_scaled_std(0.8, groups, alpha=0) == 0.8

    def test_equal_groups_cost_nothing(self):
        assert equity_scaled(0.7, [0.7, 0.7]) == equity_scaled_std(0.7, [0.7, 0.7]) == 0.7

    def test_two_equal_groups_differ_by_a_root_of_two(self):
        gap, mean = 0.2, 0.7
        assert equity_scaled(mean, [0.8, 0.6]) == pytest.approx(mean / (1 + gap))
        assert equity_scaled_std(mean, [0.8, 0.6]) == pytest.approx(mean / (1 + gap / math.sqrt(2)))

    def test_pooled_ones_agree_with_fairlearn(self):
        frame = table(shift=0.2)
        found = frame_of_fairlearn(frame)
        assert pooled.measure(frame, "equity_scaled_dice") == pytest.approx(
            found.overall / (1 + (found.by_group - found.overall).abs().sum())
        )
        assert pooled.measure(frame, "equity_scaled_dice_std") == pytest.approx(
            found.overall / (1 + found.by_group.std())
        )
        assert pooled.measure(frame, "worst_group_dice") == pytest.approx(found.group_min())
        assert pooled.measure(frame, "dice_gap") == pytest.approx(found.difference(method="between_groups"))

    def test_the_unknown_count_neither_as_group_nor_overall(self):
        frame = table(shift=0.2)
        stranger = frame.iloc[:1].assign(patient_id="new", dice=0.0, group="")
        for metric in ("equity_scaled_dice", "equity_scaled_dice_std"):
            assert pooled.measure(pd.concat([frame, stranger]), metric) == pooled.measure(frame, metric)

    def test_one_group_has_no_spread(self):
        frame = table(groups=("a",))
        assert math.isnan(pooled.measure(frame, "equity_scaled_dice_std"))
        assert pooled.measure(frame, "equity_scaled_dice") == pytest.approx(frame.dice.mean())

    def test_it_has_an_interval(self):
        found = statistics.interval(table(shift=0.2), "equity_scaled_dice")
        assert found.low < found.mean < found.high


class TestByGroup:
    def test_it_agrees_with_fairlearn_and_the_interval_of_a_mean(self):
        frame = table(shift=0.1)
        found = by_group(frame, "dice")
        assert found["mean"].to_numpy() == pytest.approx(frame_of_fairlearn(frame).by_group.to_numpy())
        assert found["n"].tolist() == [20, 20, 20]
        for name, line in found.iterrows():
            values = frame.dice[frame.group == name]
            assert (line.high - line.low) / 2 == pytest.approx(1.96 * stats.sem(values), rel=0.15)

    def test_rows_of_a_patient_count_once(self):
        twice = pd.concat([table().assign(replicate=0), table().assign(replicate=1)])
        assert by_group(twice, "dice")["n"].tolist() == [20, 20, 20]

    def test_a_pooled_measure_by_group(self):
        frame = table().assign(outcome=np.arange(60) % 2)
        frame["score"] = frame.outcome * (frame.group == "a")
        assert by_group(frame, "auc")["mean"].tolist() == [1, 0.5, 0.5]

    def test_without_any_group_it_says_so(self):
        with pytest.raises(MedcookError, match="No row has a group"):
            by_group(table().assign(group=""), "dice")


class TestGap:
    def test_it_agrees_with_scipy(self):
        frame = table(patients=24, groups=("a", "b"), shift=0.03)
        a, b = (frame.dice[frame.group == name] for name in "ab")
        reference = stats.permutation_test(
            (a, b), lambda x, y: abs(np.mean(x) - np.mean(y)), alternative="greater", n_resamples=20000, rng=0
        )
        found = gap_test(frame, permutations=20000)
        assert found.gap == pytest.approx(reference.statistic)
        assert found.p == pytest.approx(reference.pvalue, abs=0.015)
        assert found.chance == pytest.approx(np.quantile(reference.null_distribution, 0.95), rel=0.05)

    def test_equal_groups_cannot_be_told_from_noise(self):
        found = gap_test(table(shift=0))
        assert found.gap > 0 and found.is_noise and "cannot be told from noise" in str(found)
        assert "a 20, b 20, c 20" in str(found)

    def test_a_group_that_is_far_off_is_found(self):
        found = gap_test(table(shift=0.2))
        assert found.p < 0.001 and found.gap > found.chance and "is more than noise" in str(found)

    def test_p_is_never_nought(self):
        assert gap_test(table(shift=0.9), permutations=99).p == pytest.approx(1 / 100)

    def test_it_is_wrong_as_often_as_it_says(self):
        alarms = [not gap_test(table(patients=30, seed=seed), permutations=200).is_noise for seed in range(1000, 1150)]
        assert 0.01 < np.mean(alarms) < 0.10

    def test_rows_of_a_patient_are_averaged(self):
        frame = table(shift=0.05)
        assert gap_test(pd.concat([frame, frame])) == gap_test(frame)

    def test_one_group_has_no_gap(self):
        with pytest.raises(MedcookError, match="at least two groups"):
            gap_test(table(groups=("a",)))
