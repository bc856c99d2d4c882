"""The hints of chapter 19's exercises: each typical mistake is told what is wrong with it."""

import numpy as np
import pytest
from solved import solver

from medcook.exercises import check, exercise_names

solution = solver("19_findings")
NAMES = ["auc", "activation", "suppress"]


@pytest.mark.parametrize("name", NAMES)
def test_the_solution_passes(name):
    verdict = check(f"19/{name}", solution(name))
    assert verdict.solved, verdict.hint


def test_no_exercise_is_without_a_solution():
    assert exercise_names("19") == [f"19/{name}" for name in NAMES]


def pairs(scores, outcomes):
    return scores[outcomes == 1][:, None], scores[outcomes == 0][None]


def count(compare):
    return lambda scores, outcomes: compare(*pairs(scores, outcomes)).mean()


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda s, o: None, "returns nothing yet"),
        (lambda s, o: s[o == 1] > 0.5, "one number"),
        (count(np.less), "the other way round"),
        (lambda s, o: (pairs(s, o)[0] > pairs(s, o)[1]).sum(), "not their number"),
        (lambda s, o: (pairs(s, o)[0] > pairs(s, o)[1]).sum() / len(s) ** 2, "only pairs of a sick and a healthy"),
        (lambda s, o: ((s > 0.5) == o).mean(), "six pairs"),
        (count(np.greater_equal), "is not below"),
        (count(np.greater), "half a point"),
    ],
)
def test_mistakes_in_ranking(answer, hint):
    assert_hint("auc", answer, hint)


def weighted(maps, weights):
    return (weights[:, None, None] * maps).sum(0)


def written_over(maps, weights):
    maps *= weights[:, None, None]
    return np.maximum(maps.sum(0), 0) / 2


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda m, w: None, "returns nothing yet"),
        (written_over, "writes into"),
        (lambda m, w: m * w[:, None, None], "a map (H, W)"),
        (lambda m, w: weighted(m, w) / 2, "against the class"),
        (lambda m, w: np.maximum(weighted(m, w), 0), "largest value"),
        (lambda m, w: np.maximum(m.mean(0), 0), "weight times map"),
        (lambda m, w: quiet(np.maximum(weighted(m, w), 0)), "not 0 / 0"),
        (lambda m, w: np.maximum(weighted(m, w), 1e-9) / np.maximum(weighted(m, w), 1e-9).max(), "the map is 0"),
    ],
)
def test_mistakes_in_activations(answer, hint):
    assert_hint("activation", answer, hint)


def quiet(found):
    with np.errstate(invalid="ignore"):
        return found / found.max()


def overlaps(boxes, limit, order):
    """Greedy suppression in some order, against everything before, kept or not."""
    right = solution("suppress")
    return [n for k, n in enumerate(order) if all(len(right(boxes[[n, m]], np.ones(2), limit)) == 2 for m in order[:k])]


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda b, s, t: None, "returns nothing yet"),
        (lambda b, s, t: [1, 1], "at most once"),
        (lambda b, s, t: solution("suppress")(b, -np.arange(len(s)), t), "not the first of the list"),
        (lambda b, s, t: np.argsort(-s), "left out"),
        (lambda b, s, t: [1, 2, 4], "of two equal boxes"),
        (lambda b, s, t: sorted(solution("suppress")(b, s, t), reverse=True), "best first"),
        (lambda b, s, t: solution("suppress")(b, s, 0.2)[:1], "kept are boxes 1 and 2"),
        (lambda b, s, t: overlaps(b, t, list(np.argsort(-s))), "suppresses nobody"),
        (lambda b, s, t: solution("suppress")(b, s, t) or [0], "nothing to keep"),
    ],
)
def test_mistakes_in_suppression(answer, hint):
    assert_hint("suppress", answer, hint)


def assert_hint(name, answer, hint):
    verdict = check(f"19/{name}", answer)
    assert not verdict.solved and hint in verdict.hint, verdict.hint
