"""Checks of chapter 17's exercises."""

import numpy as np

from medcook.exercises import exercise, expect, expect_close


@exercise("17/panoptic")
def check_panoptic(panoptic):
    truth = np.zeros((6, 12), int)
    truth[1:5, 1:5], truth[1:5, 5:9], truth[0, 10:] = 4, 2, 7
    found = truth.copy()
    found[1:5, 4], found[0, 10:], found[5, :2] = 2, 0, 9
    value = panoptic(found, truth)
    expect(value is not None, "your function returns nothing yet.")
    expect(np.ndim(value) == 0, f"one number for both maps, yours has shape {np.shape(value)}")
    expect(not np.isclose(value, (0.75 + 0.8) / 2), "found ones without a match and missed ones count, each one half")
    expect(not np.isclose(value, 2 / 3), "detection times segmentation: a match counts by its intersection over union")
    expect(not np.isclose(value, (0.75 + 0.8) / 4), "one that is missed, or found for nothing, counts one half")
    expect_close(value, (0.75 + 0.8) / 3, "the sum of the matches' IoU, over matches and half of all others")
    expect_close(panoptic(truth * 3, truth), 1.0, "what an instance is called does not count")
    expect_close(panoptic((truth > 0) * 1, truth), 0.0, "one that covers two has an IoU of at most one half with each")
    half = np.where(truth == 4, 4, 0)
    half[1:3] = 0
    expect_close(panoptic(half, np.where(truth == 4, 4, 0)), 0.0, "an IoU of exactly one half is no match")
    nothing = panoptic(0 * truth, 0 * truth)
    expect(np.isfinite(nothing), "two empty maps agree: what is 0 / 0 here?")
    expect_close(nothing, 1.0, "two empty maps agree")


@exercise("17/distances")
def check_distances(distances):
    sections = np.zeros((5, 9), int)
    sections[1:4, 1:3], sections[1:4, 5:7], sections[4, 8] = 3, 3, 1
    kept = sections.copy()
    found = distances(sections)
    expect(found is not None, "your function returns nothing yet.")
    expect(np.array_equal(sections, kept), "your function writes into its argument")
    expect(np.shape(found) == (2, 5, 9), f"two maps (2, H, W): here (2, 5, 9), yours has shape {np.shape(found)}")
    rows, columns = np.indices((5, 9))
    wanted = np.stack([rows - 2.0, columns - 3.5]) * (sections == 3)
    expect(not np.any(np.asarray(found)[:, sections == 0]), "beside tissue both maps are 0")
    expect(not np.allclose(found, -wanted), "the other way round: below and right of the centroid is positive")
    expect(not np.allclose(found, wanted[::-1]), "rows come first")
    expect_close(found, wanted, "both fragments of a section have one centroid, which may lie between them")


@exercise("17/elect")
def check_elect(elect):
    beyond = [[-1, 4]] * 9 + [[4, 10]] * 9
    votes = np.array([[2, 2]] * 5 + [[2, 3]] * 4 + [[7, 7]] * 3 + [[0, 9]] * 3 + [[5, 0]] + beyond)
    found = elect(votes, (10, 10), 3)
    expect(found is not None, "your function returns nothing yet.")
    expect(np.ndim(found) == 0, f"one number, yours has shape {np.shape(found)}")
    expect(found != 4, "a bin that is lower than a neighbour is no peak; `least` or more votes make one")
    expect(found != 5, "only bins with `least` or more votes count, and votes beyond the histogram are lost")
    expect(found != 2, "a peak may lie at the border, where a bin has fewer neighbours, and hold `least` votes exactly")
    expect(found == 3, "bins higher than all their neighbours and with `least` or more votes: here three")
    expect(elect(votes, (10, 10), 1) == 4, "with `least` 1, the single vote is a peak, too")
    expect(elect(np.array([[3, 3], [3, 4]]), (6, 6), 1) == 0, "two equal neighbours: neither is higher than the other")
    expect(elect(np.zeros((0, 2), int), (6, 6), 1) == 0, "without votes there are no sections")
