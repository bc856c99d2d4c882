"""The hints of chapter 13's exercises: each typical mistake is told what is wrong with it."""

import numpy as np
import pytest
from solved import solver

from medcook.exercises import check, exercise_names

solution = solver("13_pretraining")
NAMES = ["contrast", "fused", "overlap"]


@pytest.mark.parametrize("name", NAMES)
def test_the_solution_passes(name):
    verdict = check(f"13/{name}", solution(name))
    assert verdict.solved, verdict.hint


def test_no_exercise_is_without_a_solution():
    assert exercise_names("13") == [f"13/{name}" for name in NAMES]


def losses(first, second, heat):
    scores = first @ second.T / heat
    return np.log(np.exp(scores).sum(1)) - np.diag(scores)


def without_partner(first, second, heat):
    scores = first @ second.T / heat
    return (np.log((np.exp(scores) * (1 - np.eye(len(scores)))).sum(1)) - np.diag(scores)).mean()


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda a, b, t: None, "returns nothing yet"),
        (losses, "one number"),
        (lambda a, b, t: -losses(a, b, t).mean(), "the sign"),
        (lambda a, b, t: losses(a, b, t).sum(), "not their sum"),
        (without_partner, "the partner itself"),
        (lambda a, b, t: losses(a, b, 1 / t).mean(), "divided by the temperature"),
        (lambda a, b, t: losses(a, b, t).max(), "three unit vectors"),
        (lambda a, b, t: losses(a, b, t).mean(), "unit vectors"),
        (lambda a, b, t: losses(*(v / np.linalg.norm(v, axis=1)[:, None] for v in (a, b)), t).mean(), "subtract"),
    ],
)
def test_contrast(answer, hint):
    with np.errstate(all="ignore"):
        assert hint in check("13/contrast", answer).hint


def written_over(front, back, levels, highest):
    back += levels / highest * (front - back)
    return back


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda f, b, k, top: None, "returns nothing yet"),
        (written_over, "writes into"),
        (lambda f, b, k, top: (k / top * f + (1 - k / top) * b).ravel(), "same shape"),
        (lambda f, b, k, top: k / top * b + (1 - k / top) * f, "the other way round"),
        (lambda f, b, k, top: np.where(k > 0, f, b), "mix the two images"),
        (lambda f, b, k, top: k / (top + 1) * f + (1 - k / (top + 1)) * b, "divide by K"),
        (lambda f, b, k, top: (f + b) / 2, "level k of 4"),
        (lambda f, b, k, top: k / top * f + b * (k == 0), "what the foreground leaves"),
    ],
)
def test_fused(answer, hint):
    assert hint in check("13/fused", answer).hint


def pixels(corner, corners, side):
    return np.clip(side - np.abs(np.asarray(corners) - np.asarray(corner)), 0, None).prod(1)


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda c, others, s: None, "returns nothing yet"),
        (lambda c, others, s: pixels(c, others, s).sum(), "one share for each"),
        (pixels, "not a number of pixels"),
        (lambda c, others, s: pixels(c, others, s) / (2 * s**2 - pixels(c, others, s)), "not over the union"),
        (lambda c, others, s: np.ones(len(others)) / 4, "four that tile"),
        (lambda c, others, s: (s - np.abs(others - np.asarray(c))).prod(1) / s**2, "two negative sides"),
    ],
)
def test_overlap(answer, hint):
    assert hint in check("13/overlap", answer).hint
