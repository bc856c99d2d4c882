"""Handing over and promising: curves against their definition, tables that add up, promises that hold and break."""

import numpy as np
import pandas as pd
import pytest
import torch

from medcook import handover, pooled, statistics
from medcook.handover import SHARES, THRESHOLDS, marked_shares, mean_curve, missed_shares, promises, rest_error


def cases(arm: str = "net", replicates: int = 2, count: int = 20, useful: bool = True) -> pd.DataFrame:
    """Errors 0.00 to 0.19, in another order in every replicate; uncertainty ranks them or says nothing."""
    rng, parts = np.random.default_rng(0), []
    for replicate in range(replicates):
        error = rng.permutation(count) / 100
        uncertainty = error * 3 + 1 if useful else np.ones(count)
        table = pd.DataFrame({"error": error, "uncertainty": uncertainty, "replicate": replicate, "arm": arm})
        parts.append(table.assign(patient_id=[f"p{number}" for number in range(count)]))
    return pd.concat(parts, ignore_index=True)


def test_the_rest_is_what_stays_when_the_most_uncertain_leave():
    error, uncertainty = [0.1, 0.5, 0.2, 0.4], [1, 4, 2, 3]
    assert rest_error(uncertainty, error, [0, 0.25, 0.5]).tolist() == pytest.approx([0.3, 0.7 / 3, 0.15])
    assert np.isnan(rest_error(uncertainty, error, [0.9])).all(), "nobody is left"


def test_replicates_are_averaged_and_folds_put_together():
    frame = cases()
    first, second = (frame[frame["replicate"] == number] for number in range(2))
    halves = [rest_error(part["uncertainty"], part["error"]) for part in (first, second)]
    np.testing.assert_allclose(mean_curve(frame), np.mean(halves, axis=0))
    folds = frame.assign(patient_id=[f"p{number}" for number in range(len(frame))])
    np.testing.assert_allclose(mean_curve(folds), rest_error(frame["uncertainty"], frame["error"]))


def test_an_uncertainty_that_ranks_is_as_good_as_knowing_and_a_constant_one_gains_nothing():
    np.testing.assert_allclose(mean_curve(cases()), mean_curve(cases(), "error"))
    flat = mean_curve(cases(useful=False))
    assert flat[~np.isnan(flat)] == pytest.approx(0.095)


def test_the_table_says_what_the_measures_say():
    frame = pd.concat([cases("good"), cases("bad").assign(uncertainty=lambda rows: -rows["error"])])
    table = handover.handover_table(frame)
    good = frame[frame["arm"] == "good"]
    gain = statistics.interval(good, "handover_gain")
    assert gain.mean == pytest.approx(0.01) and table.loc["good"].iloc[1].startswith("+0.010")
    assert table.loc["good", "best possible gain"] == table.loc["bad", "best possible gain"] == "+0.010"
    assert table.loc["bad"].iloc[1].startswith("-0.010")
    assert table.loc["good", "area under the curve"] == f"{pooled.value(good, 'aurc'):.3f}"
    assert set(table["patients"]) == {20}


def test_figures_show_the_curve_and_who_is_handed_over():
    frame = pd.concat([cases("good"), cases("flat", useful=False)])
    axes = handover.handover_figure(frame, "embedded", ["good", "flat"]).axes[0]
    np.testing.assert_allclose(axes.lines[0].get_ydata(), mean_curve(frame[frame["arm"] == "good"]))
    left, right = handover.handover_view(frame, "good", 0.25, "embedded").axes
    kept, handed = left.lines[:2]
    assert (len(kept.get_xdata()), len(handed.get_xdata())) == (15, 5)
    assert min(handed.get_ydata()) > max(kept.get_ydata())
    assert "error of all 0.095, of the rest 0.070" in right.get_title()


def test_missed_and_marked_shares():
    probability = torch.tensor([[[0.9, 0.6], [0.3, 0.1]]])
    truth = torch.tensor([[[True, True], [True, False]]])
    np.testing.assert_allclose(missed_shares(probability, truth, [0.95, 0.5, 0.2, 0]), [[1, 1 / 3, 0, 0]], atol=1e-6)
    np.testing.assert_allclose(
        marked_shares(probability, truth, [0.95, 0.5, 0.2, 0]), [[0, 2 / 3, 1, 4 / 3]], atol=1e-6
    )
    assert missed_shares(probability, truth & False, [0.95]).tolist() == [[0]]
    assert (np.diff(THRESHOLDS) < 0).all() and (np.diff(missed_shares(probability, truth)) <= 0).all()


def test_a_promise_holds_for_exchangeable_cases_and_not_elsewhere():
    rng = np.random.default_rng(1)
    levels = np.linspace(0, 1, 40)
    here, elsewhere = (np.clip(rng.uniform(0, top, (400, 1)) - levels, 0, None) for top in (1.0, 2.0))
    table = promises(here, 0.1, 40, elsewhere, draws=200)
    assert table["here"].mean() <= 0.1 + 0.003 and table["here"].mean() > 0.06
    assert table["elsewhere"].mean() > 0.2
    figure = handover.promise_figure(table, 0.1, ("here", "there"), "embedded")
    assert any("at most 0.1" in text.get_text() for text in figure.legends[0].get_texts())


def test_without_enough_cases_the_most_careful_answer_is_given():
    here = np.linspace(1, 0, 5)[None].repeat(6, 0)
    assert set(promises(here, 0.1, 3, draws=5)["chosen"]) == {4}


def test_the_shares_begin_with_nobody():
    assert SHARES[0] == 0 and SHARES[-1] < 1


def test_slices_of_a_case_are_one_case():
    values = torch.arange(24.0).reshape(4, 2, 3)
    found = handover.as_cases(values, torch.tensor([0, 0, 1, 1]))
    assert found.shape == (2, 4, 3) and found[1, 2, 0] == values[3, 0, 0]
