"""The hints of chapter 16's exercises: each typical mistake is told what is wrong with it."""

import numpy as np
import pytest
from scipy.spatial import ConvexHull
from solved import solver

from medcook.exercises import check, exercise_names

solution = solver("16_anatomy_and_shape")
NAMES = ["area", "neighbours", "chamfer", "degree"]


@pytest.mark.parametrize("name", NAMES)
def test_the_solution_passes(name):
    verdict = check(f"16/{name}", solution(name))
    assert verdict.solved, verdict.hint


def test_no_exercise_is_without_a_solution():
    assert exercise_names("16") == [f"16/{name}" for name in NAMES]


def crossed(points, closed=True):
    after = np.roll(points, -1, axis=0)
    crosses = points[:, 0] * after[:, 1] - points[:, 1] * after[:, 0]
    return crosses.sum() if closed else crosses[:-1].sum()


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda points: None, "returns nothing yet"),
        (lambda points: points, "one number"),
        (lambda points: crossed(points), "half of the sum"),
        (lambda points: crossed(points) / 2, "an area is positive"),
        (lambda points: abs(crossed(points[:3])) / 2, "the last point is followed by the first"),
        (lambda points: np.prod(np.ptp(points, axis=0)), "a dent"),
        (lambda points: ConvexHull(points).volume, "a dent"),
        (lambda points: abs(crossed(points, closed=False)) / 2, "somewhere else"),
    ],
)
def test_area(answer, hint):
    assert hint in check("16/area", answer).hint


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda x, a: None, "returns nothing yet"),
        (lambda x, a: x.fill(3) or x, "writes into"),
        (lambda x, a: x.mean(), "a row for each node"),
        (lambda x, a: a @ x, "not their sum"),
        (lambda x, a: (a + np.eye(len(a))) @ x / (a.sum(1, keepdims=True) + 1), "without the node itself"),
        (lambda x, a: a @ x / 2, "own number of neighbours"),
        (lambda x, a: a @ x / np.float64(a.sum(1, keepdims=True)), "gives nan"),
    ],
)
def test_neighbours(answer, hint):
    with np.errstate(all="ignore"):
        assert hint in check("16/neighbours", answer).hint


def apart(a, b):
    return np.linalg.norm(a[:, None] - b[None], axis=2)


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda a, b: None, "returns nothing yet"),
        (lambda a, b: apart(a, b).mean(), "and itself"),
        (lambda a, b: apart(a, b).min(1).mean() + apart(a, b).min(0).mean(), "half of the sum"),
        (lambda a, b: ((apart(a, b) ** 2).min(1).mean() + (apart(a, b) ** 2).min(0).mean()) / 2, "their squares"),
        (lambda a, b: apart(a, b).min(1).mean(), "both directions"),
        (lambda a, b: max(apart(a, b).min(1).mean(), apart(a, b).min(0).mean()), "a third point"),
    ],
)
def test_chamfer(answer, hint):
    assert hint in check("16/chamfer", answer).hint


def tops(radii):
    at = radii.argmin()
    return radii[: at + 1].max(), radii[at:].max()


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda r: None, "returns nothing yet"),
        (lambda r: r.sort() or 0.5, "writes into"),
        (lambda r: 1 - r / r.max(), "one number"),
        (lambda r: 2 * r.min() / sum(tops(r)), "not what is left"),
        (lambda r: 1 - (2 * r.min() / sum(tops(r))) ** 2, "not of the area"),
        (lambda r: 1 - r.min() / r.max(), "the largest radius of all"),
        (lambda r: 1 - r.min() / r.mean(), "not the mean of all"),
        (lambda r: 1 - 2 * r.min() / (r[0] + r[-1]), "need not be the ends"),
        (lambda r: 1 - 2 * r.min() / 6, "in pixels and in mm"),
        (lambda r: 0.1, "a radius of 1"),
        (lambda r: 2 / 3, "as wide everywhere"),
    ],
)
def test_degree(answer, hint):
    assert hint in check("16/degree", answer).hint
