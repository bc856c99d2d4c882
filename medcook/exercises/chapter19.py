"""Checks of chapter 19's exercises."""

import numpy as np

from medcook.exercises import exercise, expect, expect_close


@exercise("19/auc")
def check_auc(auc):
    scores, outcomes = np.array([0.9, 0.4, 0.7, 0.2, 0.6]), np.array([1, 0, 0, 0, 1])
    found = auc(scores, outcomes)
    expect(found is not None, "your function returns nothing yet.")
    expect(np.ndim(found) == 0, f"one number for all cases, yours has shape {np.shape(found)}")
    expect(not np.isclose(found, 1 / 6), "the other way round: a sick one shall be above a healthy one")
    expect(not np.isclose(found, 5), "the share of the pairs, not their number")
    expect(not np.isclose(found, 5 / 25), "only pairs of a sick and a healthy one count")
    expect_close(found, 5 / 6, "of the six pairs of a sick and a healthy one, count those in which the sick is higher")
    tied = auc(np.array([0.5, 0.5, 0.2, 0.5]), np.array([1, 0, 0, 0]))
    expect(not np.isclose(tied, 1), "one that is equal is not below")
    expect(not np.isclose(tied, 1 / 3), "one that is equal is not above either: half a point")
    expect_close(tied, 2 / 3, "a tie is half a point")
    expect_close(auc(np.exp(scores), outcomes), 5 / 6, "only the order of the scores counts")


@exercise("19/activation")
def check_activation(activation):
    maps = np.array([[[0.0, 1.0], [2.0, 0.0]], [[1.0, 0.0], [0.0, 4.0]], [[0.0, 1.0], [0.0, 1.0]]])
    kept, weights = maps.copy(), np.array([1.0, -0.5, 0.0])
    found = activation(maps, weights)
    expect(found is not None, "your function returns nothing yet.")
    expect(np.array_equal(maps, kept), "your function writes into its arguments")
    expect(np.shape(found) == (2, 2), f"a map (H, W): here (2, 2), yours has shape {np.shape(found)}")
    expect(np.min(found) >= 0, "what speaks against the class is set to 0")
    expect(not np.allclose(found, [[0, 1], [2, 0]]), "divided by its largest value, so that maps can be compared")
    expect_close(
        found, np.array([[0, 0.5], [1, 0]]), "the sum over channels of weight times map, without what is below 0"
    )
    nothing = activation(maps, -np.ones(3))
    expect(np.all(np.isfinite(nothing)), "where nothing speaks for the class, the map is 0, not 0 / 0")
    expect_close(nothing, np.zeros((2, 2)), "where nothing speaks for the class, the map is 0")


@exercise("19/suppress")
def check_suppress(suppress):
    boxes = np.array([[0, 0, 4, 4], [0, 1, 4, 5], [10, 10, 14, 14], [0, 2, 4, 6], [10, 10, 14, 14]], float)
    scores = np.array([0.6, 0.9, 0.5, 0.3, 0.4])
    found = suppress(boxes, scores, 0.5)
    expect(found is not None, "your function returns nothing yet.")
    found = [int(number) for number in found]
    expect(len(found) == len(set(found)), "each box at most once")
    expect(1 in found, "the most probable box is kept first, not the first of the list")
    expect(sorted(found) != list(range(5)), "boxes that overlap a kept one by more than the limit are left out")
    expect(4 not in found, "of two equal boxes only the more probable one is kept")
    expect(found == sorted(found, key=lambda number: -scores[number]), "the numbers of the kept boxes, best first")
    expect(found == [1, 2], "kept are boxes 1 and 2: the others overlap one of them by more than half of the union")
    chain = np.array([[0, 0, 4, 4], [0, 2, 4, 6], [0, 4, 4, 8]], float)
    found = [int(number) for number in suppress(chain, np.array([0.9, 0.8, 0.7]), 0.3)]
    expect(found == [0, 2], "a box that was left out itself suppresses nobody")
    expect(not len(suppress(np.zeros((0, 4)), np.zeros(0), 0.5)), "without boxes there is nothing to keep")
