"""The hints of chapter 06's exercises: each typical mistake is told what is wrong with it."""

import numpy as np
import pytest
from solved import solver

from medcook.exercises import check, exercise_names
from medcook.measures.calibration import expected_calibration_error
from medcook.measures.conformal import choose_lambda
from medcook.measures.disagreement import energy_distance

solution = solver("06_uncertainty")


@pytest.mark.parametrize("name", ["calibration_error", "sets_apart", "promise"])
def test_the_solution_passes(name):
    verdict = check(f"06/{name}", solution(name))
    assert verdict.solved, verdict.hint


def test_no_exercise_is_without_a_solution():
    assert exercise_names("06") == ["06/calibration_error", "06/sets_apart", "06/promise"]


def test_solutions_are_what_the_book_measures_with():
    rng = np.random.default_rng(0)
    probability, truth = rng.random(500), rng.integers(0, 2, 500)
    both = np.stack([1 - probability, probability])
    mine = solution("calibration_error")(both.max(0), both.argmax(0) == truth, 15)
    assert mine == pytest.approx(expected_calibration_error(both, truth, 15))
    one, other = rng.random(7), rng.random(4)
    wanted = energy_distance(one, other, lambda a, b: np.abs(a[:, None] - b[None]))
    assert solution("sets_apart")(one, other) == pytest.approx(wanted)
    losses = np.sort(rng.random((30, 8)), axis=1)[:, ::-1]
    assert solution("promise")(losses, 0.4) == choose_lambda(losses, 0.4)


def binned(confidence, right, bins, gap=lambda c, r: abs(c.mean() - r.mean()), edge=None):
    place = np.minimum((confidence * bins).astype(int), bins - 1) if edge is None else edge(confidence, bins)
    return sum((place == k).mean() * gap(confidence[place == k], right[place == k]) for k in np.unique(place))


def unweighted(confidence, right, bins):
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    return np.mean([abs(confidence[place == k].mean() - right[place == k].mean()) for k in np.unique(place)])


def with_nan(confidence, right, bins):
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    return sum((place == k).mean() * abs(confidence[place == k].mean() - right[place == k].mean()) for k in range(bins))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda c, r, bins: None, "returns nothing yet"),
        (lambda c, r, bins: c.mean() - r.mean(), "absolute value"),
        (lambda c, r, bins: r.mean() - c.mean(), "however it is signed"),
        (lambda c, r, bins: abs(c.mean() - r.mean()), "must not cancel"),
        (lambda c, r, bins: np.abs(c - r).mean(), "said 0.75"),
        (lambda c, r, bins: binned(c, r, bins, gap=lambda a, b: np.abs(a - b).mean()), "said 0.75"),
        (lambda c, r, bins: max(0.0, binned(c, r, bins, gap=lambda a, b: a.mean() - b.mean())), "too modest"),
        (unweighted, "as many pixels as it holds"),
        (with_nan, "gap is 0.5|no nan"),
        (lambda c, r, bins: binned(c, r, bins, edge=lambda a, n: (a * n).astype(int)), "solved"),
        (
            lambda c, r, bins: binned(c, r, bins, edge=lambda a, n: np.where(a == 1, -1, np.ceil(a * n) - 1)),
            "begins with",
        ),
    ],
)
def test_calibration_error(answer, hint):
    verdict = check("06/calibration_error", answer)
    if hint == "solved":  # a bin of its own for confidence 1 gives the same sum
        assert verdict.solved
    else:
        assert any(part in verdict.hint for part in hint.split("|"))


def apart(a, b):
    return np.abs(a[:, None] - b[None]).mean()


def others(a):
    """Mean distance of two different members."""
    return apart(a, a) * len(a) / max(1, len(a) - 1)


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda s, y: None, "returns nothing yet"),
        (lambda s, y: apart(s, y) - apart(s, s) / 2 - apart(y, y) / 2, "counts twice"),
        (lambda s, y: 2 * apart(s, y), "what each is apart in itself"),
        (lambda s, y: 2 * apart(s, y) - others(s) - others(y), "pairs with itself included"),
        (lambda s, y: 2 * abs(s.mean() - y.mean()), "samples that never differ"),
        (lambda s, y: 2 * np.abs(s - y).mean(), "no order"),
        (lambda s, y: 2 * np.abs(np.sort(s) - np.sort(y)).mean(), "2 * 2 - 0 - 2"),
        (lambda s, y: 2 * apart(s, y) - 2 * apart(y, y), "2 * 2 - 0 - 2"),
        (lambda s, y: 2 * apart(s, y) - apart(y, y) - apart(s, s) * (len(s) == len(y)), "three samples"),
    ],
)
def test_sets_apart(answer, hint):
    assert hint in check("06/sets_apart", answer).hint


def first(enough):
    return int(np.argmax(enough)) if enough.any() else None


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda losses, alpha: 0.5, "position of lambda"),
        (lambda losses, alpha: losses.shape[1] - 1, "first that is careful enough"),
        (lambda losses, alpha: 0, "at position 1"),
        (lambda losses, alpha: first(losses.mean(0) <= alpha), "count one more case"),
        (lambda losses, alpha: first(losses.max(0) <= alpha), "at position 1"),
        (lambda losses, alpha: first(losses.sum(0) / (len(losses) + 1) <= alpha), "count one more case"),
        (lambda losses, alpha: first((losses.sum(0) + 1) / (len(losses) + 1) < alpha - 1e-9), "exactly met"),
        (lambda losses, alpha: choose_lambda(losses, alpha), "cannot promise 0.1"),
        (lambda losses, alpha: first((losses.sum(0) + 1) / len(losses) <= alpha), "(0.1 + 1) / 5"),
    ],
)
def test_promise(answer, hint):
    assert hint in check("06/promise", answer).hint
