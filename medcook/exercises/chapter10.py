"""Checks of chapter 10's exercises."""

import numpy as np

from medcook.exercises import exercise, expect, expect_close


@exercise("10/dots")
def check_dots(dots):
    found = dots((5, 7), [(2, 3)], 1.5)
    expect(found is not None, "your function returns nothing yet.")
    expect(np.shape(found) == (5, 7), f"a map of the given shape: here (5, 7), yours has shape {np.shape(found)}")
    rows, columns = np.indices((5, 7))
    squared = (rows - 2) ** 2 + (columns - 3) ** 2
    expect(not np.allclose(found, np.exp(-squared / 1.5**2)), "divide by 2 sigma^2, not by sigma^2")
    expect(not np.allclose(found, np.exp(-np.sqrt(squared) / (2 * 1.5**2))), "square the distance")
    swapped = np.exp(-((rows - 3) ** 2 + (columns - 2) ** 2) / (2 * 1.5**2))
    expect(not np.allclose(found, swapped), "a click is (row, column), in this order")
    expect_close(found, np.exp(-squared / (2 * 1.5**2)), "one click: 1 where it is, and a Gaussian around it")
    two = dots((5, 7), [(2, 3), (2, 4)], 1.5)
    beside = np.exp(-((rows - 2) ** 2 + (columns - 4) ** 2) / (2 * 1.5**2))
    single = np.exp(-squared / (2 * 1.5**2))
    expect(not np.allclose(two, single + beside), "where dots overlap take the larger one, not their sum")
    expect(not np.allclose(two, beside), "only the last click is in your map")
    expect_close(two, np.maximum(single, beside), "with two clicks each pixel goes by the nearer one")
    expect_close(dots((3, 3), [], 1.0), np.zeros((3, 3)), "without a click the map is zero everywhere")


@exercise("10/next_click")
def check_next_click(next_click):
    truth, answer = np.zeros((9, 15), bool), np.zeros((9, 15), bool)
    truth[1:8, 1:8] = True
    found = next_click(answer, truth)
    expect(found is not None, "your function returns nothing yet.")
    expect(len(found) == 3, "return three things: row, column, and whether the click belongs to the object")
    expect(truth[found[0], found[1]], "nothing is answered yet: click on the object")
    expect(bool(found[2]), "what is missing belongs to the object: True")
    expect(tuple(found[:2]) == (4, 4), "the deepest pixel, which is farthest from the border of the error: here (4, 4)")
    answer[1:8, 1:8] = True
    answer[3:6, 10:13] = True
    row, column, meant = next_click(answer, truth)
    expect(not truth[row, column], "all that is left is too much on the right: click there")
    expect(not meant, "what is too much does not belong to the object: False")
    expect((row, column) == (4, 11), "the deepest pixel of what is too much: here (4, 11)")
    answer[1:8, 5:8] = False
    row, column, meant = next_click(answer, truth)
    expect(bool(meant), "21 pixels are missing and 9 too many: correct the larger error first")
    expect(column == 6, "the missing strip has three columns, 5 to 7: its middle is column 6")
    expect(next_click(truth, truth) is None, "where nothing is wrong there is nothing to click on: return None")


@exercise("10/clicks_needed")
def check_clicks_needed(clicks_needed):
    curves = np.array([[0.5, 0.9, 0.95], [0.92, 0.93, 0.94]])  # Dice of two images after 1, 2 and 3 clicks
    found = clicks_needed(curves, 0.9)
    expect(found is not None, "your function returns nothing yet.")
    expect(not np.isclose(found, 0.5), "clicks are counted from 1: the first column is after one click")
    expect(not np.isclose(found, 2.0), "a Dice of exactly the goal has reached it")
    expect_close(found, 1.5, "two clicks for the first image, one for the second")
    failed = np.array([[0.2, 0.3, 0.4], [0.9, 0.9, 0.9]])
    expect(
        np.isfinite(clicks_needed(failed, 0.8)), "an image that never gets there counts as all the clicks there were"
    )
    expect(
        not np.isclose(clicks_needed(failed, 0.8), 1.0),
        "an image that never gets there must not be dropped, nor count as one click: it counts as all there were",
    )
    expect_close(clicks_needed(failed, 0.8), 2.0, "three for the image that never gets there, one for the other")
    back = np.array([[0.9, 0.5, 0.9]])
    expect_close(clicks_needed(back, 0.8), 1.0, "the first click that reaches the goal counts, whatever comes after")
