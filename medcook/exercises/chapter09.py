"""Checks of chapter 09's exercises."""

import numpy as np

from medcook.exercises import exercise, expect, expect_close


@exercise("09/slabs")
def check_slabs(slabs):
    found = list(slabs(12, 4, 4))
    expect(found != [0, 4], "the slab that ends with the last slice is missing: here it begins at 8")
    expect_close(found, [0, 4, 8], "twelve slices in slabs of four, four apart: 0, 4, 8")
    found = list(slabs(10, 4, 3))
    expect(max(found) + 4 <= 10, "no slab may reach beyond the last slice: move the last one back")
    expect_close(found, [0, 3, 6], "ten slices in slabs of four, three apart: 0, 3, 6")
    found = list(slabs(10, 4, 4))
    expect(max(found) + 4 <= 10, "no slab may reach beyond the last slice: move the last one back")
    expect(max(found) + 4 == 10, "the last slices are in no slab: add one that ends with the last slice")
    expect_close(found, [0, 4, 6], "ten slices in slabs of four, four apart: 0, 4, and 6 to the end")
    expect_close(slabs(4, 4, 2), [0], "a volume as deep as a slab is one slab, and that only once")
    expect_close(slabs(33, 8, 6), [0, 6, 12, 18, 24, 25], "33 slices in slabs of eight, six apart, to the end")


@exercise("09/stitch")
def check_stitch(stitch):
    rng = np.random.default_rng(0)
    whole = rng.random((7, 2, 3))
    parts = [whole[start : start + 3].copy() for start in (0, 2, 4)]
    kept = [part.copy() for part in parts]
    found = stitch(parts, [0, 2, 4], 7)
    expect(all(np.array_equal(a, b) for a, b in zip(parts, kept, strict=True)), "your function writes into the slabs")
    expect(found is not None, "your function returns nothing yet.")
    expect(np.shape(found) == (7, 2, 3), f"(depth, H, W): here (7, 2, 3), yours has shape {np.shape(found)}")
    twice = np.array(found)[2] / whole[2]
    expect(not np.allclose(twice, 2), "slices in two slabs are counted twice: divide by how many slabs there are")
    expect_close(found, whole, "slabs cut from a volume, put together again, are the volume")
    ones, threes = np.ones((2, 1, 1)), np.full((2, 1, 1), 3.0)
    last = np.ravel(stitch([ones, threes], [0, 1], 3))
    expect(not np.allclose(last, [1, 3, 3]), "the later slab has overwritten the earlier one: take their mean")
    expect(not np.allclose(last, [1, 1, 3]), "the earlier slab hides the later one: take their mean")
    expect_close(last, [1, 2, 3], "where slabs of ones and threes overlap, the mean is 2")
    fives = np.full((2, 1, 1), 5.0)
    found = np.ravel(stitch([ones, threes, fives], [0, 0, 0], 2))
    expect(not np.allclose(found, 3.5), "a mean of the mean so far and the next slab gives late slabs more weight")
    expect_close(found, [3, 3], "three slabs over the same slices count alike")


@exercise("09/shifted")
def check_shifted(shifted):
    peak = np.array([0.0, 1, 0, 0, 0])
    found = shifted(peak, 1)
    expect(found is not None, "your function returns nothing yet.")
    expect(not np.allclose(found, np.roll(peak, -1)), "it went to the left: the sign of the phase")
    expect(not np.iscomplexobj(found), "the result is real up to rounding: return its real part")
    expect_close(found, np.roll(peak, 1), "moved by one sample, the peak is at place 2")
    expect_close(shifted(peak, 5), peak, "moved by its whole length, a periodic signal is itself")
    points = np.arange(9)
    wave = np.cos(2 * np.pi * 2 * points / 9 + 0.3)
    half = np.cos(2 * np.pi * 2 * (points - 0.5) / 9 + 0.3)
    expect(
        not np.allclose(shifted(wave, 0.5), wave) and not np.allclose(shifted(wave, 0.5), np.roll(wave, 1)),
        "half a sample is no whole one: do not round, turn the phase of each frequency",
    )
    expect_close(shifted(wave, 0.5), half, "a cosine moved by half a sample; high frequencies are the negative ones")
    rough = np.random.default_rng(0).normal(size=7)
    expect_close(shifted(shifted(rough, 0.3), -0.3), rough, "there and back again must be where it began")
