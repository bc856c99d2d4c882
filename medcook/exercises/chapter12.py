"""Checks of chapter 12's exercises."""

import numpy as np

from medcook.exercises import exercise, expect, expect_close

IGNORE = 255


@exercise("12/partial")
def check_partial(partial):
    probabilities = np.array([[[0.7, 0.2]], [[0.3, 0.8]]])  # (classes, H, W): one row of two pixels
    scribble = np.array([[0, IGNORE]])
    kept = probabilities.copy(), scribble.copy()
    found = partial(probabilities, scribble)
    unchanged = all(np.array_equal(a, b) for a, b in zip(kept, (probabilities, scribble), strict=True))
    expect(unchanged, "your function writes into its arguments")
    expect(found is not None, "your function returns nothing yet.")
    expect(not np.isclose(found, np.log(0.7)), "the sign: a loss falls as the probability rises")
    expect(not np.isclose(found, -np.log(0.7) / 2), "divide by the number of drawn pixels, not of all pixels")
    expect_close(found, -np.log(0.7), "one drawn pixel, of class 0, whose probability is 0.7")
    rng = np.random.default_rng(0)
    odds = rng.dirichlet(np.ones(3), (4, 5)).transpose(2, 0, 1)
    drawn = rng.integers(0, 3, (4, 5))
    drawn[rng.random((4, 5)) < 0.5] = IGNORE
    rows, columns = np.nonzero(drawn != IGNORE)
    right = -np.log(odds[drawn[rows, columns], rows, columns])
    expect(not np.isclose(partial(odds, drawn), right.sum()), "the mean over the drawn pixels, not their sum")
    expect_close(partial(odds, drawn), right.mean(), "the mean of -log of the drawn class's probability")
    nothing = partial(odds, np.full((4, 5), IGNORE))
    expect(np.isfinite(nothing), "an image on which nothing is drawn gives nan: its loss is 0")
    expect_close(nothing, 0.0, "an image on which nothing is drawn has nothing to say: its loss is 0")


@exercise("12/merged")
def check_merged(merged):
    masks = np.array([[[1, 1, 0, 0]], [[1, 0, 0, 1]], [[1, 1, 0, 0]]], bool)  # (annotators, H, W)
    equal = merged(masks, np.ones(3))
    expect(equal is not None, "your function returns nothing yet.")
    expect(np.asarray(equal).dtype == bool, "return a mask: bool, True inside")
    expect(np.shape(equal) == (1, 4), f"one mask (H, W): here (1, 4), yours has shape {np.shape(equal)}")
    expect(not np.array_equal(equal, masks.any(0)), "that is what anyone drew: ask for more than half")
    expect(not np.array_equal(equal, masks.all(0)), "that is what all drew: more than half are enough")
    expect_close(equal, [[1, 1, 0, 0]], "two of three who weigh the same are more than half")
    trusted = merged(masks, np.array([0.2, 1.0, 0.2]))
    expect(not np.array_equal(trusted, equal), "the weights change nothing yet: who is trusted more counts for more")
    expect_close(trusted, [[1, 0, 0, 1]], "one annotator of weight 1 against two of 0.2")
    half = merged(masks[:2], np.ones(2))
    expect_close(half, [[1, 0, 0, 0]], "half of the weight is not more than half")
    expect_close(merged(masks, np.full(3, 10.0)), [[1, 1, 0, 0]], "only the proportions of the weights matter")


@exercise("12/impurity")
def check_impurity(impurity):
    pure = np.zeros((5, 5), int)
    found = impurity(pure, 3, 1)
    expect(found is not None, "your function returns nothing yet.")
    expect(np.shape(found) == (5, 5), f"a value for each pixel: here (5, 5), yours has shape {np.shape(found)}")
    expect(np.isfinite(found).all(), "0 log 0 is 0, not nan: a class that is not there adds nothing")
    expect_close(found, np.zeros((5, 5)), "one class everywhere: nothing is impure")
    labels = np.zeros((5, 5), int)
    labels[:, 3:] = 1
    found = np.asarray(impurity(labels, 2, 1))
    expect(found[2, 2] >= 0, "the sign: an entropy is never negative")
    third, half = (-(p * np.log(p) + (1 - p) * np.log(1 - p)) for p in (1 / 3, 1 / 2))
    expect(not np.isclose(found[2, 2], third / np.log(2)), "the natural logarithm, please: yours is of base 2")
    expect_close(found[2, 2], third, "three of the nine pixels around (2, 2) are of class 1")
    expect_close(found[2, 0], 0.0, "around (2, 0) there is one class alone")
    corner = labels[:2, 1:3].copy()
    expect(
        np.isclose(impurity(np.array([[0, 1], [0, 1]]), 2, 1)[0, 0], half),
        "at the border count only the pixels that are there, and divide by how many these are",
    )
    expect_close(impurity(corner, 2, 1)[0, 0], 0.0, "nothing but class 0 in the corner")
    rng = np.random.default_rng(0)
    patch = rng.integers(0, 3, (5, 5))
    share = np.bincount(patch.ravel(), minlength=3) / 25
    expect_close(impurity(patch, 3, 2)[2, 2], -np.sum(share * np.log(share)), "radius 2: 25 pixels around the middle")
