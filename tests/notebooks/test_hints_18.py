"""The hints of chapter 18's exercises: each typical mistake is told what is wrong with it."""

import numpy as np
import pytest
from solved import solver

from medcook.exercises import check, exercise_names

solution = solver("18_video")
NAMES = ["overlooked", "credible", "followed"]


@pytest.mark.parametrize("name", NAMES)
def test_the_solution_passes(name):
    verdict = check(f"18/{name}", solution(name))
    assert verdict.solved, verdict.hint


def test_no_exercise_is_without_a_solution():
    assert exercise_names("18") == [f"18/{name}" for name in NAMES]


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda k, d: None, "returns nothing yet"),
        (lambda k, d: d, "one number"),
        (lambda k, d: (k - 1) * sum(d), "the frame itself"),
        (lambda k, d: 5, "one to either side"),
        (lambda k, d: 3 * max(d), "kernel 7 sees seven"),
        (lambda k, d: k, "dilation 4"),
        (lambda k, d: k**2 if len(d) > 1 else 1 + (k - 1) * d[0], "reaches add up"),
        (lambda k, d: 1 + (k - 1) * max(d), "adds as many frames"),
        (lambda k, d: 1 + (k - 1) * sum(d[:3]), "every layer adds its own"),
        (lambda k, d: 1 + max(2, k - 1) * sum(d), "never sees a neighbour"),
    ],
)
def test_mistakes_in_how_far_it_sees(answer, hint):
    assert_hint("overlooked", answer, hint)


def first(choose, level_too=False):
    """The first window of good neighbours, of which `choose` takes a frame."""

    def credible(good, level, window):
        for start in range(len(good) - window + 1):
            part = good[start : start + window]
            if (part >= level).all() if level_too else (part > level).all():
                return start + choose(part)
        return None

    return credible


def best(part):
    return int(part.argmax())


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda g, level, w: None, "the first window is there"),
        (lambda g, level, w: int(np.argmax(g > level)), "neighbours must be good too"),
        (lambda g, level, w: int(g.argmax()), "see the future"),
        (first(lambda part: 0), "not its first one"),
        (first(lambda part: len(part) // 2), "not its middle"),
        (lambda g, level, w: 6, "the best frame of the first window"),
        (lambda g, level, w: first(best)(g, level, w) or 0, "no such window"),
        (lambda g, level, w: 0 if len(g) < w else first(best)(g, level, w), "fewer frames"),
        (first(best, level_too=True), "not at it"),
        (lambda g, level, w: first(best)(g, level, w) if w > 1 else 0, "a window of one"),
    ],
)
def test_mistakes_in_credible_frames(answer, hint):
    assert_hint("credible", answer, hint)


def shares(found, truth):
    return (found & truth).sum((1, 2)), (found | truth).sum((1, 2))


def jaccard(found, truth, nothing):
    both, either = shares(found, truth)
    return np.where(either > 0, both / np.maximum(either, 1), nothing)


def careless(found, truth):
    both, either = shares(found, truth)
    with np.errstate(invalid="ignore"):
        return (both / either).mean()


def of_all(found, truth):
    return (found & truth).sum() / (found | truth).sum()


def dice(found, truth):
    both, sizes = shares(found, truth)[0], found.sum((1, 2)) + truth.sum((1, 2))
    return np.where(sizes > 0, 2 * both / np.maximum(sizes, 1), 1.0).mean()


def written_over(found, truth):
    value = jaccard(found, truth, 1.0).mean()
    truth &= found
    return value


def shown_alone(found, truth):
    return jaccard(found, truth, 1.0)[truth.any((1, 2))].mean()


def no_alarms(found, truth):
    return np.where(truth.any((1, 2)), jaccard(found, truth, 1.0), 1.0).mean()


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda f, t: None, "returns nothing yet"),
        (lambda f, t: jaccard(f, t, 1.0), "one number"),
        (careless, "0 / 0 shall be 1"),
        (lambda f, t: jaccard(f, t, 0.0).mean(), "rightly nothing was found"),
        (lambda f, t: 0.9, "all of it was found"),
        (written_over, "writes into"),
        (of_all, "each frame for itself"),
        (dice, "divide by the union"),
        (shown_alone, "all frames count"),
        (no_alarms, "counts 0"),
        (lambda f, t: jaccard(f, t, 1.0).max(), "the mean over all frames"),
        (lambda f, t: jaccard(f, t, 1.0).mean() if f.any() else 0.0, "missed frames count 0"),
    ],
)
def test_mistakes_in_following(answer, hint):
    assert_hint("followed", answer, hint)


def assert_hint(name, answer, hint):
    verdict = check(f"18/{name}", answer)
    assert not verdict.solved and hint in verdict.hint, verdict.hint
