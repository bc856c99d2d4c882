"""Checks of chapter 04's exercises."""

import math

import numpy as np

from medcook.exercises import exercise, expect, expect_close


@exercise("04/ema_after")
def check_ema_after(ema_after):
    expect_close(ema_after(0.9, 0, False), 1.0, "before the first step the teacher is its start: the share is 1")
    expect_close(ema_after(0.9, 1, False), 0.9, "a step keeps `decay` of the teacher and takes the rest of the student")
    expect_close(ema_after(0.9, 2, False), 0.81, "a step takes its part of what is still left: shares multiply")
    expect_close(ema_after(0.99, 320, False), 0.99**320, "after 320 steps the shares have multiplied 320 times")
    expect_close(
        ema_after(0.9, 1, True), 0.1, "warming up, the first step is k = 0 and keeps the smaller share: 1 / 10"
    )
    expect_close(ema_after(0.9, 2, True), 0.1 * 2 / 11, "warming up, every step has a decay of its own: multiply them")
    wanted = math.prod((k + 1) / (k + 10) for k in range(3)) * 0.25**5
    expect_close(
        ema_after(0.25, 8, True), wanted, "the warm-up ends where it reaches `decay`: the smaller of the two", 1e-9
    )


@exercise("04/copy_paste")
def check_copy_paste(copy_paste):
    rng = np.random.default_rng(0)
    labelled, unlabelled = rng.normal(size=(2, 6, 8))
    labels = rng.integers(0, 4, (6, 8))
    pseudo = (labels + 1) % 4
    box = np.zeros((6, 8), bool)
    box[1:4, 2:7] = True
    given = labelled, labels, unlabelled, pseudo, box
    kept = [part.copy() for part in given]

    mixed = copy_paste(*given)
    expect(isinstance(mixed, tuple | list) and len(mixed) == 3, "return three arrays: image, labels, weights")
    untouched = all(np.array_equal(part, before) for part, before in zip(given, kept, strict=True))
    expect(untouched, "your function writes into the arrays it was given: the next epoch needs them as they were")
    image, target, weight = (np.asarray(part) for part in mixed)
    labelled, labels, unlabelled, pseudo, box = kept
    expect_close(image, np.where(box, labelled, unlabelled), "inside the box the labelled image shows, not outside")
    expect_close(target, np.where(box, labels, pseudo), "a label goes where its pixel goes: mix both with the same box")
    expect(np.issubdtype(target.dtype, np.integer), "labels are classes: keep them whole numbers")
    expect(weight.shape == box.shape, f"one weight a pixel: the shape is {box.shape}, and yours {weight.shape}")
    expect(np.ptp(weight) > 0, "a drawn label and a guessed one should not count the same")
    expect_close(
        weight, np.where(box, 1.0, 0.5), "the box is labelled: 1 inside; pseudo-labels count half: 0.5 outside"
    )


@exercise("04/pseudo_gain")
def check_pseudo_gain(pseudo_gain):
    confidence = np.array([[0.99, 0.95, 0.90], [0.60, 0.97, 0.85]])
    pseudo, truth = np.array([[0, 1, 2], [1, 3, 2]]), np.array([[0, 1, 1], [1, 2, 0]])
    found = pseudo_gain(pseudo, confidence, truth, 0.93)
    expect(isinstance(found, tuple | list) and len(found) == 2, "return two numbers: coverage, precision")
    expect_close(found[0], 3 / 6, "coverage comes first: the share of all pixels that are confident")
    expect_close(found[1], 2 / 3, "precision: how many of the confident pixels, not of all, are right")
    expect_close(
        pseudo_gain(pseudo, confidence, truth, 0.95)[0], 3 / 6, "a confidence equal to the threshold reaches it"
    )
    expect_close(pseudo_gain(pseudo, confidence, truth, 0.0), [1, 3 / 6], "threshold 0 takes every pixel")
    coverage, precision = pseudo_gain(pseudo, confidence, truth, 1.0)
    expect_close(coverage, 0.0, "no pixel reaches 1 here: the coverage is 0")
    expect(precision is None, "no confident pixel: the precision is not known, neither 0 nor 1 nor nan: return None")
