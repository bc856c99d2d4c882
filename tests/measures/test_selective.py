"""Selective prediction on risks whose curve is known, and through the pooled measures."""

import math

import numpy as np
import pandas as pd
import pytest

from medcook import pooled
from medcook.measures.selective import aurc, handed_over, risk_coverage


def test_the_least_uncertain_come_first():
    coverage, risk = risk_coverage([0.3, 0.1, 0.2, 0.4], [3.0, 1.0, 2.0, 10.0])
    assert np.allclose(coverage, [0.25, 0.5, 0.75, 1]) and np.allclose(risk, [1, 1.5, 2, 4])


def test_a_tie_costs_what_a_random_order_costs():
    rng = np.random.default_rng(0)
    uncertainty, risk = np.array([0, 0, 0, 1, 1, 2.0]), rng.random(6)
    shuffled = []
    for _ in range(4000):
        order = np.lexsort([rng.random(6), uncertainty])
        shuffled.append(np.cumsum(risk[order]) / np.arange(1, 7))
    assert np.allclose(risk_coverage(uncertainty, risk)[1], np.mean(shuffled, 0), atol=0.01)


def test_aurc_is_lowest_for_the_perfect_order_and_the_mean_where_uncertainty_says_nothing():
    risk = np.random.default_rng(1).random(50)
    assert aurc(risk, risk) < aurc(np.zeros(50), risk) < aurc(-risk, risk)
    assert aurc(np.zeros(50), risk) == pytest.approx(risk.mean())


def test_the_most_uncertain_tenth_is_handed_over():
    everything, rest = handed_over(np.arange(20), np.arange(20.0))
    assert (everything, rest) == (9.5, 8.5)
    assert handed_over(np.arange(25), np.arange(25.0))[1] == pytest.approx(np.arange(22).mean())  # 2.5 rounds up
    assert handed_over(np.arange(30), np.arange(30.0))[1] == pytest.approx(np.arange(27).mean())  # 3.0000000000000004


def test_of_nothing_there_is_no_curve():
    assert math.isnan(aurc([], [])) and math.isnan(handed_over([1.0], [1.0])[1])


def test_they_are_measures_of_a_group_of_patients():
    frame = pd.DataFrame({"uncertainty": np.arange(20.0), "error": np.arange(20.0) / 20})
    assert pooled.measure(frame, "handover_gain") == pytest.approx(1 / 20)
    assert pooled.measure(frame, "aurc") == pytest.approx(aurc(frame.uncertainty, frame.error))
