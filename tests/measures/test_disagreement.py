"""Disagreement against scipy, numerical integration, scikit-learn and sets small enough for pencil and paper."""

import numpy as np
import pytest
from scipy import integrate, stats
from sklearn.metrics import jaccard_score

from medcook.data.case import IGNORE
from medcook.measures.disagreement import consensus, crps, energy_distance, entropy, gaussian_crps, jaccard_distances

SAMPLES, RATERS = np.array([3.0, 4.0, 4.5, 9.0]), np.array([2.0, 5.0, 6.0])


def step(values, x):
    return np.mean(values[:, None] <= x, axis=0)


def integrated(f, low=-20.0, high=40.0):
    x = np.linspace(low, high, 600_001)
    return integrate.trapezoid(f(x), x)


@pytest.mark.parametrize("observations", [RATERS, RATERS[:1]])
def test_crps_integrates_the_squared_difference_of_the_distributions(observations):
    expected = integrated(lambda x: (step(SAMPLES, x) - step(observations, x)) ** 2)
    assert crps(SAMPLES, observations) == pytest.approx(expected, abs=1e-3)
    assert crps(SAMPLES, observations) == pytest.approx(stats.energy_distance(SAMPLES, observations) ** 2 / 2)


def test_crps_of_one_sample_is_the_absolute_error():
    assert crps([3.0], [5.5]) == pytest.approx(2.5) and crps(RATERS, RATERS) == pytest.approx(0)


def test_the_mean_of_the_raters_own_crps_is_larger_by_their_spread():
    single = np.mean([crps(SAMPLES, [y]) for y in RATERS])
    spread = np.abs(RATERS[:, None] - RATERS).mean() / 2
    assert crps(SAMPLES, RATERS) == pytest.approx(single - spread)


@pytest.mark.parametrize("value", [-1.0, 5.0, 12.0])
def test_crps_of_a_normal_distribution(value):
    found = gaussian_crps(5.0, 2.0, value)
    expected = integrated(lambda x: (stats.norm.cdf(x, 5, 2) - (x >= value)) ** 2)
    assert found == pytest.approx(expected, abs=1e-3)
    many = stats.norm(5, 2).ppf((np.arange(2000) + 0.5) / 2000)
    assert found == pytest.approx(crps(many, [value]), abs=0.01)


def test_crps_of_raters_who_agree_is_the_absolute_error():
    assert gaussian_crps(5.0, 0.0, 7.5) == 2.5


def maps(count, classes=3, seed=0):
    return np.random.default_rng(seed).integers(0, classes, (count, 6, 7)).astype(np.uint8)


def test_jaccard_distances_agree_with_scikit_learn():
    one, other = maps(3), maps(4, seed=1)
    found = jaccard_distances(one, other)
    for i, a in enumerate(one):
        for k, b in enumerate(other):
            expected = 1 - jaccard_score(b.ravel(), a.ravel(), labels=[1, 2], average="macro")
            assert found[i, k] == pytest.approx(expected, abs=1e-6)


def test_only_structures_that_one_of_the_two_holds_count():
    one = np.array([[[1, 1, 0, 0]], [[0, 0, 0, 0]]])
    other = np.array([[[1, 0, 0, 0]], [[0, 0, 2, 0]], [[0, 0, 0, 0]]])
    assert np.allclose(jaccard_distances(one, other), [[0.5, 1, 1], [1, 1, 0]])


def test_unlabelled_voxels_do_not_count():
    one, other = np.array([[1, 1, 0, 0]]), np.array([[1, IGNORE, 1, 0]])
    assert jaccard_distances(one, other) == pytest.approx(0.5) == jaccard_distances(other, one)


def test_energy_distance_by_hand():
    """d = 1/2 between {0, 1} and {0}; with S = {a, b} and Y = {a}: 2 (1/4) - (1/4) - 0 = 1/4."""
    a, b = np.array([1, 1, 0]), np.array([1, 0, 0])
    assert energy_distance([a, b], [a]) == pytest.approx(0.25)
    assert energy_distance([b], [a]) == pytest.approx(1.0)


def test_equal_sets_are_at_distance_zero_and_others_are_not():
    assert energy_distance(maps(4), maps(4)[::-1]) == pytest.approx(0, abs=1e-6)
    assert energy_distance(maps(4), maps(4, seed=5)) > 0.01


def test_any_distance_will_do():
    off_by = lambda one, other: np.abs(np.mean(one, 1)[:, None] - np.mean(other, 1)[None])  # noqa: E731
    assert energy_distance(SAMPLES[:, None], RATERS[:, None], off_by) == pytest.approx(2 * crps(SAMPLES, RATERS))


def test_consensus_is_the_majority_and_a_tie_is_background():
    raters = np.array([[1, 1, 2, 0, 1], [1, 2, 2, 0, 2], [2, 0, 2, 1, IGNORE], [1, 0, 2, 2, IGNORE]])
    assert consensus(raters).tolist() == [1, 0, 2, 0, 0]
    assert consensus(raters, unanimous=True).tolist() == [IGNORE, IGNORE, 2, IGNORE, IGNORE]
    assert consensus(np.full((2, 1), IGNORE)).tolist() == [IGNORE]
    assert consensus(np.array([[1], [IGNORE]]), unanimous=True).tolist() == [1]


def test_entropy_agrees_with_scipy():
    probabilities = np.random.default_rng(0).dirichlet(np.ones(3), (4, 5)).transpose(2, 0, 1)
    assert np.allclose(entropy(probabilities), stats.entropy(probabilities, axis=0))
    assert np.allclose(entropy(np.array([[1.0], [0.0]])), 0)
