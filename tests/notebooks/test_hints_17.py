"""The hints of chapter 17's exercises: each typical mistake is told what is wrong with it."""

import numpy as np
import pytest
from solved import solver

from medcook.exercises import check, exercise_names

solution = solver("17_instances")
NAMES = ["panoptic", "distances", "elect"]


@pytest.mark.parametrize("name", NAMES)
def test_the_solution_passes(name):
    verdict = check(f"17/{name}", solution(name))
    assert verdict.solved, verdict.hint


def test_no_exercise_is_without_a_solution():
    assert exercise_names("17") == [f"17/{name}" for name in NAMES]


def ious(found, truth, least=0.5):
    pairs = [(a, b) for a in np.setdiff1d(found, 0) for b in np.setdiff1d(truth, 0)]
    each = [((found == a) & (truth == b)).sum() / ((found == a) | (truth == b)).sum() for a, b in pairs]
    return [iou for iou in each if iou > least]


def many(*maps):
    return sum(len(np.setdiff1d(part, 0)) for part in maps)


def same_names(found, truth):
    each = [((found == a) & (truth == a)).sum() / ((found == a) | (truth == a)).sum() for a in np.setdiff1d(truth, 0)]
    return sum(iou for iou in each if iou > 0.5) / (many(found, truth) / 2)


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda f, t: None, "returns nothing yet"),
        (lambda f, t: ious(f, t), "one number"),
        (lambda f, t: np.mean(ious(f, t)), "each one half"),
        (lambda f, t: len(ious(f, t)) / (many(f, t) / 2), "detection times segmentation"),
        (lambda f, t: sum(ious(f, t)) / (many(f, t) - len(ious(f, t))), "counts one half"),
        (lambda f, t: ((f > 0) & (t > 0)).sum() / ((f > 0) | (t > 0)).sum(), "sum of the matches"),
        (same_names, "is called"),
        (lambda f, t: sum(ious(f, t, 0.3)) / (many(f, t) / 2), "covers two"),
        (lambda f, t: sum(ious(f, t, 0.499)) / (many(f, t) / 2), "no match"),
        (lambda f, t: sum(ious(f, t)) / (many(f, t) / 2) if many(f, t) else np.nan, "what is 0 / 0"),
        (lambda f, t: sum(ious(f, t)) / (max(many(f, t), 1) / 2), "two empty maps agree"),
    ],
)
def test_mistakes_in_panoptic_quality(answer, hint):
    assert_hint("panoptic", answer, hint)


def written_over(sections):
    found = solution("distances")(sections)
    sections[:] = 0
    return found


def to_the_middle(sections):
    rows, columns = np.indices(sections.shape)
    return np.stack([rows - 2.0, columns - 4.0])


def of_fragments(sections):
    """With the fragments as if they were sections."""
    apart = sections.copy()
    apart[:, 4:][apart[:, 4:] > 0] += 1
    return solution("distances")(apart)


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda s: None, "returns nothing yet"),
        (written_over, "writes into"),
        (lambda s: np.moveaxis(solution("distances")(s), 0, -1), "two maps"),
        (to_the_middle, "beside tissue"),
        (lambda s: -solution("distances")(s), "the other way round"),
        (lambda s: solution("distances")(s)[::-1], "rows come first"),
        (of_fragments, "both fragments"),
    ],
)
def test_mistakes_in_distances(answer, hint):
    assert_hint("distances", answer, hint)


def binned(votes, size, wrap=False):
    counts = np.zeros(size, int)
    for row, column in votes:
        if wrap or (0 <= row < size[0] and 0 <= column < size[1]):
            counts[row % size[0], column % size[1]] += 1
    return counts


def highest(counts, strict=True, border=True):
    framed = np.pad(counts, 1, constant_values=-1 if border else 99)
    windows = np.lib.stride_tricks.sliding_window_view(framed, (3, 3)).reshape(*counts.shape, 9)
    around = np.delete(windows, 4, axis=2).max(2)
    return counts > around if strict else (counts >= around) & (counts > 0)


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda v, s, n: None, "returns nothing yet"),
        (lambda v, s, n: np.argwhere(binned(v, s) >= n), "one number"),
        (lambda v, s, n: (binned(v, s) >= n).sum(), "lower than a neighbour"),
        (lambda v, s, n: highest(binned(v, s)).sum(), "lower than a neighbour"),
        (lambda v, s, n: (highest(binned(v, s, True)) & (binned(v, s, True) >= n)).sum(), "beyond the histogram"),
        (lambda v, s, n: (highest(binned(v, s), border=False) & (binned(v, s) >= n)).sum(), "at the border"),
        (lambda v, s, n: (highest(binned(v, s)) & (binned(v, s) > n)).sum(), "three"),
        (lambda v, s, n: (highest(binned(v, s)) & (binned(v, s) >= 3)).sum(), "single vote"),
        (lambda v, s, n: (highest(binned(v, s), strict=False) & (binned(v, s) >= n)).sum(), "two equal neighbours"),
        (lambda v, s, n: solution("elect")(v, s, n) if len(v) else 1, "without votes"),
    ],
)
def test_mistakes_in_elections(answer, hint):
    assert_hint("elect", answer, hint)


def assert_hint(name, answer, hint):
    verdict = check(f"17/{name}", answer)
    assert not verdict.solved and hint in verdict.hint, verdict.hint
