"""Checks of chapter 18's exercises."""

import numpy as np

from medcook.exercises import exercise, expect, expect_close


@exercise("18/overlooked")
def check_overlooked(overlooked):
    found = overlooked(3, [1])
    expect(found is not None, "your function returns nothing yet.")
    expect(np.ndim(found) == 0, f"one number of frames, yours has shape {np.shape(found)}")
    expect(found != 2, "the frame itself is one of them")
    expect_close(found, 3, "one convolution of kernel 3 sees a frame and one to either side")
    expect_close(overlooked(7, [1]), 7, "a convolution of kernel 7 sees seven frames")
    expect_close(overlooked(3, [4]), 9, "with dilation 4 the outer ones are 4 frames away, to either side")
    twice = overlooked(3, [1, 1])
    expect(twice != 6 and twice != 9, "the second one sees what the first has seen of its neighbours: reaches add up")
    expect_close(twice, 5, "the second one adds as many frames to either side as it reaches itself")
    expect_close(
        overlooked(5, [1, 2, 4, 8]), 61, "every layer adds its own reach, which is the longer the larger its dilation"
    )
    expect_close(overlooked(1, [1, 2, 4]), 1, "a kernel of 1 never sees a neighbour")


@exercise("18/credible")
def check_credible(credible):
    good = np.array([0.2, 0.9, 0.3, 0.8, 0.7, 0.9, 0.6, 0.95, 0.99])
    found = credible(good, 0.5, 3)
    expect(found is not ..., "your function returns nothing yet.")
    expect(found is not None, "frames 3, 4 and 5 are three good neighbours: the first window is there")
    expect(found != 1, "one good frame alone is not credible: its neighbours must be good too")
    expect(found not in (7, 8), "the first window counts, not the best frame of the flight: nobody can see the future")
    expect(found != 3, "of the window, the best frame, not its first one")
    expect(found != 4, "of the window, the best frame, not its middle")
    expect_close(found, 5, "the number of the best frame of the first window of neighbours that are all good")
    expect(credible(np.array([0.9, 0.9, 0.1, 0.9, 0.9]), 0.5, 3) is None, "None where there is no such window")
    expect(credible(np.array([0.9, 0.9]), 0.5, 3) is None, "None where there are fewer frames than a window has")
    level = credible(np.array([0.5, 0.5, 0.6]), 0.5, 3)
    expect(level is None, "above the level, not at it")
    expect_close(credible(np.array([0.1, 0.6]), 0.5, 1), 1, "a window of one is the first good frame")


@exercise("18/followed")
def check_followed(followed):
    truth = np.zeros((4, 4, 4), bool)
    truth[1, 1:3, 1:3] = truth[2, 1:3, 1:3] = True
    kept = truth.copy()
    found = followed(truth, truth)
    expect(found is not None, "your function returns nothing yet.")
    expect(np.ndim(found) == 0, f"one number for the flight, yours has shape {np.shape(found)}")
    expect(np.isfinite(found), "where nothing is there and nothing was found, 0 / 0 shall be 1: that frame is right")
    expect(not np.isclose(found, 0.5), "a frame in which rightly nothing was found counts 1")
    expect_close(found, 1.0, "all of it was found: 1")
    half = truth.copy()
    half[1, 1], half[3, 0, :3] = False, True
    value = followed(half, truth)
    expect(np.array_equal(truth, kept), "your function writes into its arguments")
    expect(not np.isclose(value, 12 / 17) and not np.isclose(value, 6 / 11), "each frame for itself, then the mean")
    expect(not np.isclose(value, (1 + 2 / 3 + 1 + 0) / 4), "the Jaccard index, not Dice: divide by the union")
    expect(not np.isclose(value, 0.75), "all frames count, also those in which it is not there")
    expect(not np.isclose(value, (1 + 0.5 + 1 + 1) / 4), "something found where nothing is counts 0")
    expect_close(value, (1 + 0.5 + 1 + 0) / 4, "the mean over all frames of intersection over union")
    expect_close(followed(truth & False, truth), 0.5, "missed frames count 0, empty ones that were left empty 1")
