"""Checks of chapter 02's exercises."""

import math

import numpy as np

from medcook.exercises import exercise, expect, expect_close


@exercise("02/soft_dice")
def check_soft_dice(soft_dice_of):
    p, g = np.array([0.9, 0.5, 0.0, 0.2]), np.array([1.0, 1.0, 0.0, 0.0])
    expect_close(soft_dice_of(p, g), 2 * 1.4 / (1.6 + 2.0), "twice the overlap, divided by the sum of both sums")
    expect_close(soft_dice_of(g, g), 1.0, "a perfect prediction scores 1")
    expect_close(soft_dice_of(1 - g, g), 0.0, "no overlap scores 0")
    expect_close(soft_dice_of(g * 0, g * 0), 1.0, "two empty masks agree: what is 0 / 0 here?")
    expect_close(soft_dice_of(p[:, None], g[:, None]), 2 * 1.4 / 3.6, "sum over all axes, whatever the shape")


@exercise("02/mean_distance")
def check_mean_distance(mean_distance):
    nan = float("nan")
    found = mean_distance([2.0, 4.0, 3.0, nan], [False, False, False, True], 91.0)
    expect(found is not None and not math.isnan(found), "the missed case's distance is nan: replace it before the mean")
    expect_close(found, 25.0, "a miss counts as the diagonal, and is divided by as well: four cases, not three")
    expect_close(mean_distance([5.0], [False], 10.0), 5.0, "a case that was found keeps its distance")
    expect_close(mean_distance([nan, nan], [True, True], 8.0), 8.0, "all missed: the diagonal")


@exercise("02/receptive_field")
def check_receptive_field(receptive_field):
    expect_close(receptive_field(1), 5, "two 3 x 3 convolutions see 2 pixels to either side")
    expect_close(receptive_field(2), 14, "pooling adds the stride so far (1), and each convolution then adds twice 2")
    for level in (3, 4, 5):
        wanted, stride = 5, 1
        for _ in range(level - 1):
            wanted, stride = wanted + stride + 8 * stride, 2 * stride
        expect_close(receptive_field(level), wanted, f"level {level}: the stride doubles with every pooling")
