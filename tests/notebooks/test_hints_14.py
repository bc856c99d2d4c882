"""The hints of chapter 14's exercises: each typical mistake is told what is wrong with it."""

import numpy as np
import pytest
from scipy import linalg
from solved import solver

from medcook.exercises import check, exercise_names

solution = solver("14_domain_shift")
NAMES = ["ratio", "frechet", "matched"]


@pytest.mark.parametrize("name", NAMES)
def test_the_solution_passes(name):
    verdict = check(f"14/{name}", solution(name))
    assert verdict.solved, verdict.hint


def test_no_exercise_is_without_a_solution():
    assert exercise_names("14") == [f"14/{name}" for name in NAMES]


def divergence(p, q):
    return float(np.sum(p * np.log(p / q)))


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda p, prior: None, "returns nothing yet"),
        (lambda p, prior: p.mean(0), "one number"),
        (lambda p, prior: divergence(p, prior[:, None, None]) / p[0].size, "the mean ratio is what counts"),
        (lambda p, prior: divergence(p, prior[:, None, None]), "the mean ratio is what counts"),
        (lambda p, prior: -divergence(p.mean((1, 2)), prior), "the sign"),
        (lambda p, prior: divergence(prior, p.mean((1, 2))), "the other way round"),
        (lambda p, prior: p[0].size * divergence(p.mean((1, 2)), prior), "then one divergence"),
        (lambda p, prior: divergence(p.mean((1, 2)), prior), "0 log 0"),
    ],
)
def test_ratio(answer, hint):
    with np.errstate(all="ignore"):
        assert hint in check("14/ratio", answer).hint


def distance(a, b, root=lambda x, y: linalg.sqrtm(x @ y).real):
    first, second = np.cov(a.T), np.cov(b.T)
    return np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(first + second - 2 * root(first, second))


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda a, b: None, "returns nothing yet"),
        (lambda a, b: np.sum(np.cov(a.T)), "a set and itself"),
        (lambda a, b: np.sqrt(abs(distance(a, b))), "squared distance"),
        (lambda a, b: np.sum((a.mean(0) - b.mean(0)) ** 2), "covariances count"),
        (
            lambda a, b: np.sum((a.mean(0) - b.mean(0)) ** 2) + np.sum((np.cov(a.T) - np.cov(b.T)) ** 2),
            "compared by",
        ),
        (lambda a, b: distance(a, b, lambda x, y: np.sqrt(np.abs(x * y))), "root of each entry"),
        (lambda a, b: distance(a, b) + 0j, "complex"),
    ],
)
def test_frechet(answer, hint):
    assert hint in check("14/frechet", answer).hint


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda image, reference: None, "returns nothing yet"),
        (lambda image, reference: reference.sort() or image, "writes into"),
        (lambda image, reference: np.sort(reference), "same shape"),
        (lambda image, reference: np.resize(reference, image.shape), "sort the reference"),
        (lambda image, reference: (image - image.mean()) / image.std(), "get 1, 2, 3, 5"),
        (lambda image, reference: np.resize(np.sort(reference), image.shape), "the order of the pixels stays"),
        (
            lambda image, reference: np.sort(reference)[image.ravel().argsort().argsort()].reshape(image.shape),
            "quantiles",
        ),
    ],
)
def test_matched(answer, hint):
    assert hint in check("14/matched", answer).hint
