"""The hints of chapter 03's exercises: each typical mistake is told what is wrong with it."""

import numpy as np
import pytest
from scipy import ndimage
from solved import solver

from medcook.exercises import check, exercise_names
from medcook.sam.prompts import Prompt
from medcook.sam.prompts import next_click as book_click

solution = solver("03_sam_adaptation")
NAMES = ["low_rank", "next_click", "rescaled"]


@pytest.mark.parametrize("name", NAMES)
def test_the_solution_passes(name):
    verdict = check(f"03/{name}", solution(name))
    assert verdict.solved, verdict.hint


def test_no_exercise_is_without_a_solution():
    assert exercise_names("03") == [f"03/{name}" for name in NAMES]


def test_the_solution_clicks_where_the_book_clicks():
    rng = np.random.default_rng(0)
    truth, answer = (ndimage.gaussian_filter(rng.normal(size=(40, 50)), 4) > 0.03 for _ in range(2))
    row, column, on_object = solution("next_click")(answer, truth)
    prompt = book_click(Prompt(), answer, truth)
    assert (prompt.foreground or prompt.background) == ((column + 0.5, row + 0.5),)
    assert bool(prompt.foreground) == on_object


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda x, w, d, u, a: None, "returns nothing yet"),
        (lambda x, w, d, u, a: (x @ w.T).T, "(N, outputs)"),
        (lambda x, w, d, u, a: a / 2 * x @ d.T @ u.T, "still answers"),
        (lambda x, w, d, u, a: x @ w.T + a * x @ d.T @ u.T, "divide alpha"),
        (lambda x, w, d, u, a: x @ w.T + x @ d.T @ u.T, "scaled by alpha / rank"),
        (lambda x, w, d, u, a: x @ w.T + a / 4 * x @ d.T @ u.T, "x @ weight.T + alpha"),
        (lambda x, w, d, u, a: x @ np.add(w, a / 2 * u @ d, out=w).T, "stay frozen"),
    ],
)
def test_low_rank(answer, hint):
    assert hint in check("03/low_rank", answer).hint


def clicked(answer, truth, *, both=True, pieces=True, deepest=True, padded=True, pick=max, swap=False, flip=False):
    errors = []
    for error, on_object in ((truth & ~answer, True), (answer & ~truth, False)):
        labelled = ndimage.label(error)[0] if pieces else error.astype(int)
        errors += [(labelled == n, on_object) for n in range(1, labelled.max() + 1) if both or on_object]
    if not errors:
        return None
    piece, on_object = pick(errors, key=lambda found: found[0].sum())
    depth = ndimage.distance_transform_edt(np.pad(piece, 1))[1:-1, 1:-1] if padded else None
    depth = ndimage.distance_transform_edt(piece) if depth is None else depth
    row, column = np.unravel_index((depth if deepest else piece).argmax(), piece.shape)
    return (column, row, on_object) if swap else (row, column, on_object ^ flip)


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda answer, truth: (0, 0), "return three things"),
        (lambda answer, truth: (0, 0, True), "where the answer is wrong"),
        (lambda answer, truth: clicked(answer, truth, both=False), "the largest error"),
        (lambda answer, truth: clicked(answer, truth, pick=min), "the largest error"),
        (lambda answer, truth: clicked(answer, truth, swap=True), "row first"),
        (lambda answer, truth: clicked(answer, truth, flip=True), "lies beside the object"),
        (lambda answer, truth: clicked(answer, truth, deepest=False), "deepest inside"),
        (lambda answer, truth: clicked(answer, truth, padded=False), "pad it"),
        (lambda answer, truth: clicked(answer, truth, pieces=False), "connected piece"),
        (lambda answer, truth: clicked(answer, truth) or (0, 0, True), "nothing is wrong"),
    ],
)
def test_next_click(answer, hint):
    assert hint in check("03/next_click", answer).hint


def changed(weight, new):
    left, values, right = np.linalg.svd(weight, full_matrices=False)
    return (left * new(values)) @ right


def on_top(values, top):
    return np.concatenate([top, values[len(top) :]])


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda w, a, b: None, "returns nothing yet"),
        (lambda w, a, b: np.linalg.svd(w)[1], "a weight like the one given"),
        (lambda w, a, b: changed(w, lambda v: np.append(a * v[:2] + b, [0, 0])), "yours are gone"),
        (lambda w, a, b: changed(w, lambda v: np.append(v[:2], a * v[2:] + b)), "the first ones"),
        (lambda w, a, b: changed(w, lambda v: on_top(v, a * v[:2])), "the shift is added"),
        (lambda w, a, b: changed(w, lambda v: on_top(v, a * (v[:2] + b))), "first scale, then shift"),
        (lambda w, a, b: changed(w, lambda v: on_top(v, a * v[:2] - b)), "the first len(scale)"),
    ],
)
def test_rescaled(answer, hint):
    assert hint in check("03/rescaled", answer).hint
