"""Checks of chapter 06's exercises."""

import numpy as np

from medcook.exercises import exercise, expect, expect_close


@exercise("06/calibration_error")
def check_calibration_error(calibration_error):
    def found(confidence, right, bins):
        return calibration_error(np.array(confidence, float), np.array(right, bool), bins)

    sure = found([0.75, 0.75, 0.75, 0.75], [1, 0, 0, 0], 10)
    expect_close(sure, 0.5, "said 0.75, right in 1 of 4: the gap is 0.5, however it is signed")
    expect_close(found([0.25] * 4, [1, 1, 1, 0], 10), 0.5, "too modest is wrong too: take the gap's absolute value")
    two = found([0.3, 0.3, 0.9, 0.9], [1, 1, 0, 0], 2)
    expect_close(two, 0.8, "gaps of different bins must not cancel: 0.7 too modest in one, 0.9 too sure in the other")
    expect_close(
        found([0.6, 0.9], [0, 1], 2), 0.25, "within a bin means are compared: 0.75 said, 0.5 right, not pixel by pixel"
    )
    heavy = found([0.1, 0.9, 0.9, 0.9], [0, 0, 0, 0], 2)
    expect_close(heavy, 0.7, "a bin weighs as many pixels as it holds: not every bin the same")
    expect_close(found([0.95, 0.95], [1, 0], 10), 0.45, "an empty bin has no mean and adds nothing: no nan")
    expect_close(found([1.0, 1.0], [1, 0], 4), 0.5, "a confidence of exactly 1 belongs to the last bin")
    expect_close(found([0.45, 0.5], [1, 0], 2), 0.525, "bin k begins with k / bins: 0.5 is in the second of two bins")


@exercise("06/sets_apart")
def check_sets_apart(sets_apart):
    def found(samples, raters):
        return sets_apart(np.array(samples, float), np.array(raters, float))

    expect_close(found([3], [5]), 4.0, "one sample, one rater, 2 apart: the distance between the sets counts twice")
    same = found([1, 4], [1, 4])
    expect_close(
        same, 0.0, "equal sets are at distance 0: take off what each is apart in itself, pairs with itself included"
    )
    expect_close(found([1, 4], [4, 1]), 0.0, "sets have no order: compare every sample with every rater")
    expect_close(found([0, 0], [0, 4]), 2.0, "samples that never differ are punished where raters do: 2 * 2 - 0 - 2")
    expect_close(found([0, 4], [0, 0]), 2.0, "so are samples that differ where raters agree: take off both inner means")
    expect_close(
        found([1, 2, 6], [3, 3]), 2 * 2 - 20 / 9, "three samples, two raters: means over all pairs of each kind"
    )


@exercise("06/promise")
def check_promise(promise):
    losses = np.array([[0.5, 0.3, 0.1, 0.0], [0.3, 0.2, 0.0, 0.0], [0.1, 0.0, 0.0, 0.0], [0.1, 0.0, 0.0, 0.0]])
    many = np.repeat(losses, 25, axis=0)
    found = promise(many, 0.2)
    expect(found is not None, "a hundred cases are enough for 0.2: lambda 1 loses 0.125 on average")
    expect(not isinstance(found, float) and np.ndim(found) == 0, "return the position of lambda, a whole number")
    expect(found != 3, "the last lambda is always the most careful; wanted is the first that is careful enough")
    expect(found == 1, "mean losses are 0.25, 0.125, 0.025, 0: the first lambda that keeps 0.2 is at position 1")
    four = promise(losses, 0.25)
    expect(
        four is None or four >= 2,
        "four cases say little of the fifth: count one more case that loses everything, (sum + 1) / (n + 1)",
    )
    expect(four == 2, "(0.1 + 1) / 5 = 0.22 keeps 0.25: lambda 2 is careful enough; one further case, loss 1, is added")
    expect(promise(losses, 0.2) == 3, "a bound that is exactly met is kept: (0 + 1) / 5 = 0.2")
    expect(
        promise(losses, 0.1) is None, "four cases cannot promise 0.1, not even with no loss at all: 1 / 5. Return None"
    )
