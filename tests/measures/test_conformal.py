"""Conformal risk control: the rule on a table, and that it keeps its promise."""

import numpy as np
import pytest

from medcook.errors import MedcookError
from medcook.measures.conformal import choose_lambda


def test_the_smallest_lambda_that_is_safe():
    """n = 4: (sum + 1) / 5 <= 0.5 needs a sum of at most 1.5."""
    losses = np.array([[1, 0.6, 0.4, 0], [1, 0.6, 0.4, 0], [0, 0, 0, 0], [1, 0.5, 0.4, 0]])
    assert choose_lambda(losses, 0.5) == 2
    assert choose_lambda(losses, 0.2) == 3
    assert choose_lambda(losses, 0.9) == 0
    assert choose_lambda(losses, 0.1) == 3  # no lambda will do: the most careful one


def test_a_loss_must_not_rise():
    with pytest.raises(MedcookError, match="rises"):
        choose_lambda([[0.1, 0.2]], 0.5)


@pytest.mark.parametrize("alpha", [0.1, 0.3])
def test_the_expected_risk_is_controlled_and_not_wasted(alpha):
    """Miss rate of a threshold on noisy scores; the mean over many calibration sets and fresh cases is below alpha."""
    rng = np.random.default_rng(0)
    lambdas = np.linspace(-4, 6, 101)

    def losses(cases):
        scores = rng.standard_normal((cases, 8)) + rng.standard_normal((cases, 1))
        return (scores[:, :, None] > lambdas).mean(1)

    found = []
    for _ in range(1500):
        position = choose_lambda(losses(30), alpha)
        found.append(losses(20)[:, position].mean())
    error = np.std(found) / np.sqrt(len(found))
    assert np.mean(found) <= alpha + 2 * error
    assert np.mean(found) >= alpha - 2 / 31 - 2 * error
