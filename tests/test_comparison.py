"""Many methods, few labels: every number of the table against the function that defines it."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from medcook import statistics
from medcook.comparison import (
    by_method,
    compare_methods,
    comparison_figure,
    every_arm,
    forest,
    gain_label,
    readable,
    tally,
    told_apart,
)
from medcook.evidence import load_summary

GAIN = {"supervised": 0.0, "mean teacher": 0.02, "clever": 0.1}


@pytest.fixture(scope="module")
def frame() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    rows = [
        {
            "arm": f"{method}, {count}",
            "replicate": draw,
            "case_id": f"p{patient}-1",
            "patient_id": f"p{patient}",
            "structure": "heart",
            "dice": 0.6 + gain + 0.01 * count + 0.02 * draw + 0.02 * rng.normal(),
            "hd95": 10 - 20 * gain,
            "missed": method == "supervised" and patient == 0,
        }
        for method, gain in GAIN.items()
        for count in (3, 7)
        for draw in range(3)
        for patient in range(8)
    ]
    return pd.DataFrame([*rows, {**rows[0], "arm": "all labels"}])


def test_arms_are_read_as_method_and_count(frame):
    rows = by_method(frame)
    assert set(rows["method"]) == set(GAIN) and set(rows["labelled"]) == {3, 7}
    assert len(rows) == len(frame) - 1


def test_the_table_holds_paired_differences_and_adjusted_p(frame):
    table = compare_methods(frame)
    assert len(table) == 6
    part, reference = (frame[frame["arm"] == name] for name in ("clever, 3", "supervised, 3"))
    found, row = statistics.difference(part, reference), table.loc[(3, "clever")]
    assert row["against supervised"] == pytest.approx(found.effect) and row["p supervised"] == found.p
    assert (row["low supervised"], row["high supervised"]) == (found.low, found.high)
    assert row["mean"] == pytest.approx(part["dice"].mean())
    assert row["draws"] == 3 and row["patients"] == 8 and table.loc[(7, "supervised"), "missed"] == 3
    ps = table[["p supervised", "p mean teacher"]].to_numpy().ravel()
    adjusted = table[["Holm p supervised", "Holm p mean teacher"]].to_numpy().ravel()
    np.testing.assert_allclose(adjusted, statistics.holm(ps))


def test_a_method_is_not_compared_with_itself(frame):
    table = compare_methods(frame)
    assert np.isnan(table.loc[(3, "supervised"), "p supervised"])
    assert np.isnan(table.loc[(3, "mean teacher"), "p mean teacher"])


def test_methods_are_told_apart_by_their_intervals():
    index = pd.MultiIndex.from_product([[3, 7], ["supervised", "a", "b", "c"]], names=["labelled", "method"])
    table = pd.DataFrame(
        {
            "against supervised": [np.nan, 0.1, 0.2, -0.1, np.nan, 0.0, -0.2, -0.3],
            "low supervised": [np.nan, 0.05, 0.1, -0.2, np.nan, -0.1, -0.3, -0.4],
            "high supervised": [np.nan, 0.2, 0.3, -0.05, np.nan, 0.1, 0.1, -0.2],
        },
        index,
    )
    found = told_apart(table)
    assert found.loc[3].tolist() == ["b +0.200, a +0.100", "–", "c -0.100"], "largest gain first"
    assert found.loc[7].tolist() == ["–", "a +0.000, b -0.200", "c -0.300"]


def test_the_committed_comparison_can_be_read_and_drawn():
    from medcook.evidence import evidence_frame

    summary = load_summary("few-labels", "full")
    committed = evidence_frame("few-labels", "full")
    shown = readable(compare_methods(committed), summary)
    assert {"Dice", "− supervised", "p, mean teacher", "HD95, pixels", "missed", "seconds"} <= set(shown.columns)
    titles = {axes.get_title() for axes in comparison_figure(committed, summary, "all labels").axes}
    assert set(by_method(committed)["method"]) - {"supervised"} <= titles


def test_gains_are_counted_by_their_intervals():
    part = lambda low, high: SimpleNamespace(low=low, high=high)  # noqa: E731
    summaries = [
        SimpleNamespace(metric="dice", comparison=part(0.01, 0.02), ablation=part(-0.01, 0.02)),
        SimpleNamespace(metric="hd95", comparison=part(-2.0, -1.0), ablation=part(0.5, 1.0)),  # less is better
        SimpleNamespace(metric="dice", comparison=part(None, None), ablation=None),
    ]
    assert "2 of 2 over the comparator, 0 of 2 over itself" in tally(summaries)


def test_every_arm_has_its_mean_and_what_it_missed():
    summary = load_summary("mis-fm", "full")
    table = every_arm([summary])
    assert list(table.index.get_level_values("arm")) == list(summary.arms)
    one = table.loc["mis-fm", "dice", "volume fusion"]
    arm = summary.arms["volume fusion"]
    assert one["mean"] == round(arm.mean, 3) and (one["missed"], one["of"]) == (arm.missed, arm.rows) and one["of"] > 0


def test_in_the_forest_better_is_on_the_right():
    papers = [load_summary(name, "full") for name in ("bcp", "c3s3")]
    figure = forest(papers)
    for summary, axes in zip(papers, figure.axes, strict=True):
        markers = [line for line in axes.get_lines() if line.get_marker() == "s"]
        sign = 1 if summary.metric == "dice" else -1
        assert markers[0].get_xdata()[0] == pytest.approx(sign * summary.comparison.effect)


@pytest.mark.parametrize(
    ("metric", "unit", "label"),
    [
        ("dice", None, "gain, Dice"),
        ("dice_5", None, "gain, Dice after 5 clicks"),
        ("frame_error", None, "gain, frame error saved"),
        ("hd95", "mm", "gain, mm of distance saved"),
        ("worst_group_dice", None, "gain, worst group dice"),
    ],
)
def test_a_gain_is_named_after_its_metric(metric, unit, label):
    assert gain_label(SimpleNamespace(metric=metric, unit=unit)) == label
