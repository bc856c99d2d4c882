"""The hints of chapter 12's exercises: each typical mistake is told what is wrong with it."""

import numpy as np
import pytest
from scipy import ndimage
from solved import solver

from medcook.exercises import check, exercise_names

solution = solver("12_imperfect_labels")
NAMES = ["partial", "merged", "impurity"]


@pytest.mark.parametrize("name", NAMES)
def test_the_solution_passes(name):
    verdict = check(f"12/{name}", solution(name))
    assert verdict.solved, verdict.hint


def test_no_exercise_is_without_a_solution():
    assert exercise_names("12") == [f"12/{name}" for name in NAMES]


def of_drawn(probabilities, scribble):
    drawn = np.minimum(scribble, len(probabilities) - 1)
    return np.log(np.take_along_axis(probabilities, drawn[None], 0)[0]) * (scribble != 255)


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda p, s: None, "returns nothing yet"),
        (lambda p, s: -of_drawn(p, s).mean(), "not of all pixels"),
        (lambda p, s: of_drawn(p, s).sum() / (s != 255).sum(), "the sign"),
        (lambda p, s: -of_drawn(p, s).sum(), "not their sum"),
        (lambda p, s: s.fill(0), "writes into"),
        (lambda p, s: -of_drawn(p, s).sum() / np.float64((s != 255).sum()), "gives nan"),
    ],
)
def test_partial(answer, hint):
    with np.errstate(all="ignore"):
        assert hint in check("12/partial", answer).hint


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda masks, weights: None, "returns nothing yet"),
        (lambda masks, weights: masks.any(0), "anyone drew"),
        (lambda masks, weights: masks.all(0), "all drew"),
        (lambda masks, weights: masks.mean(0), "return a mask"),
        (lambda masks, weights: masks.mean(0) > 0.5, "weights change nothing"),
        (lambda masks, weights: np.tensordot(weights, masks, 1) >= weights.sum() / 2, "is not more than half"),
        (lambda masks, weights: np.tensordot(weights, masks, 1) > len(masks) / 2, "weight 1 against two"),
        (lambda masks, weights: masks[:, 0] > 0, "one mask (H, W)"),
    ],
)
def test_merged(answer, hint):
    assert hint in check("12/merged", answer).hint


def entropy(labels, classes, radius, *, mode="nearest", base=np.e, sign=-1, safe=True):
    size = 2 * radius + 1
    share = np.stack([ndimage.uniform_filter((labels == c) * 1.0, size, mode=mode) for c in range(classes)])
    return sign * np.sum(share * np.log(np.maximum(share, 1e-300) if safe else share), 0) / np.log(base)


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda labels, classes, radius: None, "returns nothing yet"),
        (lambda labels, classes, radius: 0.0, "a value for each pixel"),
        (lambda *a: entropy(*a, safe=False), "0 log 0"),
        (lambda *a: entropy(*a, sign=1), "the sign"),
        (lambda *a: entropy(*a, base=2), "base 2"),
        (lambda *a: entropy(*a, mode="constant"), "one class everywhere"),
        (lambda *a: entropy(*a), "pixels that are there"),
        (lambda labels, classes, radius: solution("impurity")(labels, classes, 1), "radius 2"),
    ],
)
def test_impurity(answer, hint):
    with np.errstate(all="ignore"):
        assert hint in check("12/impurity", answer).hint
