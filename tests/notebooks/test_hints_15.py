"""The hints of chapter 15's exercises: each typical mistake is told what is wrong with it."""

import numpy as np
import pytest
from solved import solver

from medcook.exercises import check, exercise_names

solution = solver("15_synthesis")
NAMES = ["noised", "back", "xray"]


@pytest.mark.parametrize("name", NAMES)
def test_the_solution_passes(name):
    verdict = check(f"15/{name}", solution(name))
    assert verdict.solved, verdict.hint


def test_no_exercise_is_without_a_solution():
    assert exercise_names("15") == [f"15/{name}" for name in NAMES]


def written_over(image, noise, signal):
    image *= signal**0.5
    return image + (1 - signal) ** 0.5 * noise


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda x, e, s: None, "returns nothing yet"),
        (written_over, "writes into"),
        (lambda x, e, s: (s**0.5 * x + (1 - s) ** 0.5 * e).ravel(), "same shape"),
        (lambda x, e, s: s * x + (1 - s) * e, "take their roots"),
        (lambda x, e, s: (1 - s) ** 0.5 * x + s**0.5 * e, "the other way round"),
        (lambda x, e, s: s**0.5 * x + e, "the variance stays 1"),
        (lambda x, e, s: x + e, "of the noise"),
        (lambda x, e, s: 0.8 * x + 0.6 * e, "there is no noise"),
    ],
)
def test_noised(answer, hint):
    assert hint in check("15/noised", answer).hint


def clean(x, e, s):
    return (x - (1 - s) ** 0.5 * e) / s**0.5


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda x, e, s, r: None, "returns nothing yet"),
        (lambda x, e, s, r: 1.0, "a value for each"),
        (lambda x, e, s, r: clean(x, e, s), "not all the way"),
        (lambda x, e, s, r: r**0.5 * x + (1 - r) ** 0.5 * e, "first the clean image"),
        (lambda x, e, s, r: r**0.5 * clean(x, e, s), "the same noise back"),
        (lambda x, e, s, r: x, "the new shares"),
        (lambda x, e, s, r: x - e, "0.8 of the clean image"),
        (lambda x, e, s, r: 0.8 * clean(x, e, s) + 0.6 * e, "the clean image is left"),
        (lambda x, e, s, r: clean(x, e, s) * (1 if r == 1 else 0.8) + (0 if r == 1 else 0.6) * e, "nothing changes"),
    ],
)
def test_back(answer, hint):
    assert hint in check("15/back", answer).hint


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda v, mm, d: None, "returns nothing yet"),
        (lambda v, mm, d: 1 - np.exp(-v.sum(0) * mm / d), "one pixel a ray"),
        (lambda v, mm, d: np.exp(-v.sum(2) * mm / d), "dense is bright"),
        (lambda v, mm, d: 1 - np.exp(-v.sum(2) / d), "millimetres long"),
        (lambda v, mm, d: 1 - np.exp(-v.sum(2) * mm * d), "divided by"),
        (lambda v, mm, d: v.sum(2) * mm / d, "an exponent"),
        (lambda v, mm, d: 1 - np.exp(-v.mean(2) * mm / d), "not the mean"),
        (lambda v, mm, d: v.sum(2), "10 mm"),
    ],
)
def test_xray(answer, hint):
    assert hint in check("15/xray", answer).hint
