"""The hints of chapter 10's exercises: each typical mistake is told what is wrong with it."""

import numpy as np
import pytest
from scipy import ndimage
from solved import solver

from medcook.exercises import check, exercise_names

solution = solver("10_interactive")
NAMES = ["dots", "next_click", "clicks_needed"]


@pytest.mark.parametrize("name", NAMES)
def test_the_solution_passes(name):
    verdict = check(f"10/{name}", solution(name))
    assert verdict.solved, verdict.hint


def test_no_exercise_is_without_a_solution():
    assert exercise_names("10") == [f"10/{name}" for name in NAMES]


def drawn(shape, clicks, sigma, *, factor=2, power=1, join=np.maximum, swap=False):
    rows, columns = np.indices(shape)
    found = np.zeros(shape)
    for click in clicks:
        row, column = click[::-1] if swap else click
        squared = ((rows - row) ** 2 + (columns - column) ** 2) ** power
        found = join(found, np.exp(-squared / (factor * sigma**2)))
    return found


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda *a: None, "returns nothing yet"),
        (lambda shape, clicks, sigma: np.zeros(3), "a map of the given shape"),
        (lambda *a: drawn(*a, factor=1), "not by sigma^2"),
        (lambda *a: drawn(*a, power=0.5), "square the distance"),
        (lambda *a: drawn(*a, swap=True), "(row, column)"),
        (lambda *a: drawn(*a, join=np.add), "not their sum"),
        (lambda *a: drawn(*a, join=lambda a, b: b), "only the last click"),
        (lambda shape, clicks, sigma: drawn(shape, clicks or [(0, 0)], sigma), "zero everywhere"),
    ],
)
def test_dots(answer, hint):
    assert hint in check("10/dots", answer).hint


def clicked(answer, truth, *, larger=True, meant=None, first=False, nothing=None):
    missing, extra = truth & ~answer, answer & ~truth
    if not (missing | extra).any():
        return nothing
    belongs = missing.sum() >= extra.sum() if larger else not extra.any()
    error = missing if belongs else extra
    depth = error if first else ndimage.distance_transform_edt(np.pad(error, 1))[1:-1, 1:-1]
    row, column = np.unravel_index(depth.argmax(), depth.shape)
    return row, column, belongs if meant is None else meant


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda *a: None, "returns nothing yet"),
        (lambda *a: (1, 2), "three things"),
        (lambda *a: (0, 0, True), "click on the object"),
        (lambda *a: clicked(*a, meant=False), "belongs to the object: True"),
        (lambda *a: clicked(*a, first=True), "deepest pixel"),
        (lambda *a: clicked(*a, meant=True), "too much does not belong"),
        (lambda *a: clicked(*a, larger=False), "larger error first"),
        (lambda *a: clicked(*a, nothing=(0, 0, True)), "return None"),
    ],
)
def test_next_click(answer, hint):
    assert hint in check("10/next_click", answer).hint


def counted(curves, goal, *, begin=1, strict=False, never=None):
    reached = curves > goal if strict else curves >= goal
    last = curves.shape[1] if never is None else never
    return np.nanmean(np.where(reached.any(1), reached.argmax(1) + begin, last))


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda *a: None, "returns nothing yet"),
        (lambda *a: counted(*a, begin=0), "counted from 1"),
        (lambda *a: counted(*a, strict=True), "exactly the goal"),
        (lambda *a: counted(*a, never=np.inf), "counts as all the clicks"),
        (lambda *a: counted(*a, never=np.nan), "must not be dropped"),
        (lambda *a: counted(*a, never=1), "must not be dropped"),
        (lambda curves, goal: (curves < goal).sum(1).clip(max=curves.shape[1] - 1).mean() + 1, "whatever comes after"),
    ],
)
def test_clicks_needed(answer, hint):
    assert hint in check("10/clicks_needed", answer).hint
