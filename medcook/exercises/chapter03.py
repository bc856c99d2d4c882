"""Checks of chapter 03's exercises."""

import numpy as np

from medcook.exercises import exercise, expect, expect_close


@exercise("03/low_rank")
def check_low_rank(low_rank):
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(5, 4)), rng.normal(size=(3, 4))
    down, up = rng.normal(size=(2, 4)), rng.normal(size=(3, 2))
    untouched = [part.copy() for part in (x, weight, down, up)]
    found = low_rank(x, weight, down, up, 8.0)
    expect(found is not None, "your function returns nothing yet.")
    expect(np.shape(found) == (5, 3), f"the answer is (N, outputs), here (5, 3), not {np.shape(found)}")
    same = all(np.array_equal(a, b) for a, b in zip(untouched, (x, weight, down, up), strict=True))
    expect(same, "your function changes the arrays it was given: the frozen weight must stay frozen")
    update = x @ down.T @ up.T
    expect(not np.allclose(found, 4 * update), "the frozen layer still answers: add the update to x @ weight.T")
    expect(not np.allclose(found, x @ weight.T + 8 * update), "divide alpha by the rank: the rows of `down`")
    expect(not np.allclose(found, x @ weight.T + update), "the update is scaled by alpha / rank")
    expect_close(found, x @ weight.T + 4 * update, "x @ weight.T + alpha / rank * (x @ down.T) @ up.T")
    start = low_rank(x, weight, down, np.zeros((3, 2)), 8.0)
    expect_close(start, x @ weight.T, "with `up` at zero, where LoRA starts, nothing changes")


@exercise("03/next_click")
def check_next_click(next_click):
    truth, answer = np.zeros((20, 30), bool), np.zeros((20, 30), bool)
    truth[2:13, 2:13] = answer[2:13, 2:13] = True
    answer[15:19, 20:29] = True  # 36 pixels too many
    truth[3:8, 20:25] = True  # 25 missing
    found = next_click(answer.copy(), truth.copy())
    expect(found is not None, "your function returns nothing yet.")
    expect(
        isinstance(found, tuple | list) and len(found) == 3, "return three things: row, column, on the object or not"
    )
    row, column, on_object = found
    expect(not (15 <= column <= 29 and row < 10), "the largest error is wanted, here the piece that is too much")
    expect(0 <= row < 20 and 0 <= column < 30, "row first, then column")
    expect(answer[int(row), int(column)] != truth[int(row), int(column)], "click where the answer is wrong")
    expect(15 <= row < 19 and 20 <= column < 29, "the largest error is wanted, here the piece that is too much")
    expect(not bool(on_object), "what the answer has too much lies beside the object: the click says so")
    expect(row in (16, 17), "click where a careful person does: deepest inside the error, not at its border")
    single, nothing = np.zeros((9, 9), bool), np.zeros((9, 9), bool)
    single[:5, :5] = True
    row, column, on_object = next_click(nothing, single)
    expect(bool(on_object), "what is missing belongs to the object: the click says so")
    expect((int(row), int(column)) == (2, 2), "the border of the image is a border of the error, too: pad it")
    pieces = np.zeros((9, 30), bool)
    pieces[4, ::2] = True  # fifteen errors of one pixel
    block = np.zeros((9, 30), bool)
    block[0:3, 0:3] = True
    row, column, _ = next_click(block, pieces)
    expect((int(row), int(column)) == (1, 1), "an error is one connected piece: label the pieces, take the largest")
    expect(
        next_click(single, single.copy()) is None, "where nothing is wrong there is nothing to click on: return None"
    )


@exercise("03/rescaled")
def check_rescaled(rescaled):
    rng = np.random.default_rng(0)
    left, _ = np.linalg.qr(rng.normal(size=(4, 4)))
    right, _ = np.linalg.qr(rng.normal(size=(6, 6)))
    values = np.array([8.0, 4.0, 2.0, 1.0])
    weight = (left * values) @ right[:4]
    make = lambda new: (left * np.array(new)) @ right[:4]  # noqa: E731
    scale, shift = np.array([1.5, 0.5]), np.array([1.0, -1.0])
    found = rescaled(weight.copy(), scale, shift)
    expect(found is not None, "your function returns nothing yet.")
    expect(np.shape(found) == (4, 6), f"the answer is a weight like the one given, (4, 6), not {np.shape(found)}")
    expect(not np.allclose(found, make([13, 1, 0, 0])), "the small singular values stay as they are; yours are gone")
    expect(not np.allclose(found, make([8, 4, 4, -0.5])), "the largest singular values change: the first ones")
    expect(not np.allclose(found, make([12, 2, 2, 1])), "the shift is added after the scale")
    expect(not np.allclose(found, make([13.5, 1.5, 2, 1])), "first scale, then shift: scale * value + shift")
    expect_close(found, make([13, 1, 2, 1]), "the first len(scale) singular values become scale * value + shift")
    same = rescaled(weight.copy(), np.ones(2), np.zeros(2))
    expect_close(
        same, weight, "scaled by one and shifted by zero, the weight is what it was: this is where SALT starts"
    )
