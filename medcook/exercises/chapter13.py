"""Checks of chapter 13's exercises."""

import numpy as np

from medcook.exercises import exercise, expect, expect_close


@exercise("13/contrast")
def check_contrast(contrast):
    first = np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    second = np.array([[0.0, 1.0], [1.0, 0.0], [0.0, -1.0]])
    found = contrast(first, second, 0.5)
    expect(found is not None, "your function returns nothing yet.")
    expect(np.ndim(found) == 0, "one number for the whole batch: the mean over its images")
    scores = first @ second.T / 0.5
    own = np.diag(scores)
    logs = np.log(np.exp(scores).sum(1))
    right, without_own = (logs - own).mean(), (np.log(np.exp(scores).sum(1) - np.exp(own)) - own).mean()
    expect(not np.isclose(found, -right), "the sign: the loss is small where partners are alike")
    expect(not np.isclose(found, 3 * right), "the mean over the images, not their sum")
    expect(not np.isclose(found, without_own), "the partner itself is one of those that the sum runs over")
    expect(
        not np.isclose(found, (np.log(np.exp(0.5 * first @ second.T).sum(1)) - 0.5 * np.diag(first @ second.T)).mean()),
        "similarities are divided by the temperature, not multiplied",
    )
    expect_close(found, right, "three unit vectors each: -log of exp(s_bb / T) over the sum of exp(s_bj / T) over j")
    expect_close(contrast(3 * first, second, 0.5), right, "the length of a vector has no say: make them unit vectors")
    expect(np.isfinite(contrast(first, second, 1e-3)), "exp of a large number: subtract the largest score first")
    expect_close(contrast(first, first, 1e-3), 0.0, "every image is most like its own other view")


@exercise("13/fused")
def check_fused(fused):
    front, back = np.full((2, 3), 8.0), np.zeros((2, 3))
    levels = np.array([[0, 1, 2], [4, 3, 0]])
    kept = front.copy(), back.copy()
    found = fused(front, back, levels, 4)
    expect(found is not None, "your function returns nothing yet.")
    unchanged = all(np.array_equal(a, b) for a, b in zip(kept, (front, back), strict=True))
    expect(unchanged, "your function writes into its arguments")
    expect(np.shape(found) == (2, 3), f"an image of the same shape: here (2, 3), yours has shape {np.shape(found)}")
    expect(not np.allclose(found, [[8, 6, 4], [0, 2, 8]]), "the other way round: level 0 is the background alone")
    expect(not np.allclose(found, np.where(levels > 0, 8, 0)), "levels between 0 and the highest mix the two images")
    expect(not np.allclose(found, 8 * levels / 5), "the highest level is the foreground alone: divide by K")
    expect_close(
        found, [[0, 2, 4], [8, 6, 0]], "level k of 4 takes k / 4 of the foreground and the rest of the background"
    )
    expect_close(
        fused(back, front, levels, 4), [[8, 6, 4], [0, 2, 8]], "the background's share is what the foreground leaves"
    )


@exercise("13/overlap")
def check_overlap(overlap):
    corners = np.array([[0, 0], [0, 4], [4, 0], [4, 4]])
    found = overlap((1, 2), corners, 4)
    expect(found is not None, "your function returns nothing yet.")
    expect(np.shape(found) == (4,), f"one share for each of the four squares, yours has shape {np.shape(found)}")
    expect(not np.allclose(found, np.array([6, 6, 2, 2])), "a share of the square's area, not a number of pixels")
    intersection = np.array([6, 6, 2, 2])
    expect(not np.allclose(found, intersection / (32 - intersection)), "over the square's own area, not over the union")
    expect_close(found, [6 / 16, 6 / 16, 2 / 16, 2 / 16], "a square of side 4 at (1, 2), over four that tile the image")
    expect_close(overlap((0, 0), corners, 4), [1, 0, 0, 0], "the first square itself")
    away = overlap((20, 20), corners, 4)
    expect_close(away, [0, 0, 0, 0], "far from all of them: two negative sides must not make an area")
