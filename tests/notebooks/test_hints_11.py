"""The hints of chapter 11's exercises: each typical mistake is told what is wrong with it."""

import numpy as np
import pytest
from solved import solver

from medcook.exercises import check, exercise_names

solution = solver("11_language")
NAMES = ["modulate", "contrast", "hit"]


@pytest.mark.parametrize("name", NAMES)
def test_the_solution_passes(name):
    verdict = check(f"11/{name}", solution(name))
    assert verdict.solved, verdict.hint


def test_no_exercise_is_without_a_solution():
    assert exercise_names("11") == [f"11/{name}" for name in NAMES]


def written_over(maps, scale, shift):
    maps *= 1 + scale[:, None, None]
    return maps + shift[:, None, None]


def wide(numbers):
    return numbers[:, None, None]


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda m, a, b: None, "returns nothing yet"),
        (written_over, "writes into"),
        (lambda m, a, b: (m * (1 + wide(a)) + wide(b)).ravel(), "same shape"),
        (lambda m, a, b: m * wide(a) + wide(b), "with a scale of 0 nothing changes"),
        (lambda m, a, b: (m + wide(b)) * (1 + wide(a)), "first scaled"),
        (lambda m, a, b: m * (1 + wide(a)), "channel c"),
        (lambda m, a, b: m * (1 + wide(a)) + wide(b) + (not a.any()), "changes nothing"),
    ],
)
def test_mistakes_in_modulating(answer, hint):
    assert_hint("modulate", answer, hint)


def logs(table):
    return np.diag(table) - np.log(np.exp(table - table.max()).sum(1)) - table.max()


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda s: None, "returns nothing yet"),
        (lambda s: -logs(s), "one number"),
        (lambda s: (logs(s).mean() + logs(s.T).mean()) / 2, "mind the sign"),
        (lambda s: -(logs(s).sum() + logs(s.T).sum()) / 2, "not the sum"),
        (lambda s: -(logs(s).mean() + logs(s.T).mean()), "not their sum"),
        (lambda s: -logs(s).mean(), "reports to images count"),
        (lambda s: -logs(s.T).mean(), "images to reports count"),
        (lambda s: -np.log(np.exp(np.diag(s)) / np.exp(s).sum()).mean(), "along rows and along columns"),
        (lambda s: -(naive(s) + naive(s.T)) / 2, "large similarities"),
    ],
)
def test_mistakes_in_contrast(answer, hint):
    assert_hint("contrast", answer, hint)


def naive(table):
    with np.errstate(over="ignore", invalid="ignore"):
        return np.log(np.diag(np.exp(table)) / np.exp(table).sum(1)).mean()


def sides(one, other):
    return [min(one[k + 2], other[k + 2]) - max(one[k], other[k]) for k in (0, 1)]


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda a, b: None, "returns nothing yet"),
        (lambda a, b: False, "hits itself"),
        (lambda a, b: all(side >= 0 for side in sides(a, b)), "only touch"),
        (lambda a, b: abs(sides(a, b)[0]) * max(0, sides(a, b)[1]) >= 8, "negative height"),
        (lambda a, b: sides(a, b)[0] * sides(a, b)[1] >= 1, "do not make an area"),
        (lambda a, b: np.prod(np.maximum(sides(a, b), 0)) >= 8, "of the union"),
        (lambda a, b: a == b, "12 of 16"),
        (lambda a, b: np.prod(np.maximum(sides(a, b), 0)) > 8, "one half is enough"),
    ],
)
def test_mistakes_in_hitting(answer, hint):
    assert_hint("hit", answer, hint)


def assert_hint(name, answer, hint):
    verdict = check(f"11/{name}", answer)
    assert not verdict.solved and hint in verdict.hint, verdict.hint
