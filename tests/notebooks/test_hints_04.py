"""The hints of chapter 04's exercises: each typical mistake is told what is wrong with it."""

import numpy as np
import pytest
from solved import solver

from medcook.exercises import check, exercise_names

solution = solver("04_semi_supervised")


@pytest.mark.parametrize("name", ["ema_after", "copy_paste", "pseudo_gain"])
def test_the_solution_passes(name):
    verdict = check(f"04/{name}", solution(name))
    assert verdict.solved, verdict.hint


def test_no_exercise_is_without_a_solution():
    assert exercise_names("04") == ["04/ema_after", "04/copy_paste", "04/pseudo_gain"]


def warm(decay, first, of=min):
    """The decays of a warm-up that counts from `first`."""
    return lambda k: of(decay, (k + first) / (k + first + 9))


def product(of, steps):
    return float(np.prod([of(k) for k in range(steps)]))


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda d, n, w: None, "returns nothing yet"),
        (lambda d, n, w: 1 - d**n, "before the first step"),
        (lambda d, n, w: (1 - d) ** n, "a step keeps `decay`"),
        (lambda d, n, w: 1 - n * (1 - d), "shares multiply"),
        (lambda d, n, w: np.exp(-n * (1 - d)), "a step keeps `decay`"),
        (lambda d, n, w: d**n, "k = 0"),
        (lambda d, n, w: product(warm(d, 2), n) if w else d**n, "k = 0"),
        (lambda d, n, w: product(warm(d, 1, max), n) if w else d**n, "the smaller share"),
        (lambda d, n, w: warm(d, 1)(n - 1) ** n if w else d**n, "a decay of its own"),
        (lambda d, n, w: product(warm(1, 1), n) if w else d**n, "the smaller of the two"),
    ],
)
def test_ema_after(answer, hint):
    assert hint in check("04/ema_after", answer).hint


def in_place(labelled, labels, unlabelled, pseudo, box):
    labelled[~box], labels[~box] = unlabelled[~box], pseudo[~box]
    return labelled, labels, np.where(box, 1.0, 0.5)


def mixed(a, la, b, lb, box):
    return np.where(box, a, b), np.where(box, la, lb), np.where(box, 1.0, 0.5)


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda *given: None, "return three arrays"),
        (lambda *given: mixed(*given)[:2], "return three arrays"),
        (in_place, "writes into the arrays"),
        (lambda a, la, b, lb, box: mixed(b, lb, a, la, box), "inside the box the labelled image"),
        (lambda a, la, b, lb, box: (a * box, la * box, box), "inside the box the labelled image"),
        (lambda a, la, b, lb, box: mixed(a, la, b, la, box), "goes where its pixel goes"),
        (lambda a, la, b, lb, box: mixed(a, lb, b, la, box), "goes where its pixel goes"),
        (lambda a, la, b, lb, box: mixed(a, la * 1.0, b, lb, box), "whole numbers"),
        (lambda *given: (*mixed(*given)[:2], 0.5), "one weight a pixel"),
        (lambda *given: (*mixed(*given)[:2], np.ones((6, 8))), "count the same"),
        (lambda *given: (*mixed(*given)[:2], np.where(given[-1], 0.5, 1.0)), "1 inside"),
    ],
)
def test_copy_paste(answer, hint):
    assert hint in check("04/copy_paste", answer).hint


def gain(pseudo, sure, truth, empty=None):
    return sure.mean(), (pseudo == truth)[sure].mean() if sure.any() else empty


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda p, c, t, limit: None, "return two numbers"),
        (lambda p, c, t, limit: gain(p, c >= limit, t)[::-1], "coverage comes first"),
        (lambda p, c, t, limit: ((c >= limit).sum(), 0), "the share of all pixels"),
        (lambda p, c, t, limit: gain(p, c < limit, t), "how many of the confident"),
        (lambda p, c, t, limit: ((c >= limit).mean(), ((p == t) & (c >= limit)).mean()), "not of all"),
        (lambda p, c, t, limit: ((c >= limit).mean(), (p == t).mean()), "not of all"),
        (lambda p, c, t, limit: gain(p, c > limit, t), "reaches it"),
        (lambda p, c, t, limit: gain(p, c >= limit, t, 0.0), "not known"),
        (lambda p, c, t, limit: gain(p, c >= limit, t, float("nan")), "not known"),
    ],
)
def test_pseudo_gain(answer, hint):
    assert hint in check("04/pseudo_gain", answer).hint
