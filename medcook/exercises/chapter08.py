"""Checks of chapter 08's exercises."""

import numpy as np

from medcook.exercises import exercise, expect, expect_close


@exercise("08/receptive_field")
def check_receptive_field(receptive_field):
    expect_close(receptive_field([]), 1, "no layer at all: a pixel sees itself")
    expect_close(receptive_field([(3, 1)]), 3, "one 3 x 3 convolution: three pixels in a row")
    two = receptive_field([(3, 1), (3, 1)])
    expect(not np.isclose(two, 6), "neighbouring kernels overlap: a layer adds its kernel less one")
    expect_close(two, 5, "two 3 x 3 convolutions see 5 pixels: the second adds one on either side")
    pooled = receptive_field([(2, 2), (3, 1)])
    expect(not np.isclose(pooled, 4), "behind a stride of 2, neighbours are two pixels of the image apart")
    expect_close(pooled, 6, "pooling by 2 (kernel 2, stride 2) sees 2 pixels; the 3 x 3 behind it adds 2 steps of 2")
    late = receptive_field([(3, 1), (2, 2)])
    expect(not np.isclose(late, 5), "a stride widens the steps of the layers behind it, not its own")
    expect_close(late, 4, "a 3 x 3 convolution, then pooling by 2: 3, and 1 more")
    deep = [(3, 1), (3, 1), (2, 2)] * 3 + [(3, 1), (3, 1)]
    expect_close(receptive_field(deep), 68, "strides multiply: after three poolings a step is 8 pixels")


@exercise("08/windows")
def check_windows(windows):
    image = np.arange(2 * 4 * 6).reshape(2, 4, 6)
    kept = image.copy()
    found = np.asarray(windows(image, 2))
    expect(np.array_equal(image, kept), "your function writes into the image it was given")
    expect(
        found.shape == (6, 4, 2),
        f"(windows, pixels of a window, channels): here (6, 4, 2), yours has shape {found.shape}",
    )
    expect(
        sorted(found.ravel()) == sorted(image.ravel()),
        "every value of the image is in exactly one window: none twice, none lost",
    )
    swapped = image.transpose(0, 2, 1).reshape(2, 3, 2, 2, 2).transpose(1, 3, 2, 4, 0).reshape(6, 4, 2)
    expect(not np.array_equal(found, swapped), "row by row: the second window is on the right of the first")
    expect(
        set(found[0, :, 0]) == {0, 1, 6, 7},
        "the first window is the upper left square; a reshape alone cuts stripes: split both axes, then reorder",
    )
    expect(np.array_equal(found[0, :, 0], [0, 1, 6, 7]), "inside a window, too, pixels go row by row")
    expect(np.array_equal(found[1, :, 0], [2, 3, 8, 9]), "row by row: the second window is on the right of the first")
    expect(np.array_equal(found[3, 0], [12, 36]), "channels come last: those of a pixel stand beside each other")
    whole = np.random.default_rng(0).random((3, 6, 9))
    wanted = [whole[:, y : y + 3, x : x + 3].reshape(3, -1).T for y in (0, 3) for x in (0, 3, 6)]
    expect_close(windows(whole, 3), wanted, "squares of three, too")


@exercise("08/combine")
def check_combine(combine):
    found = combine((2.0, 3.0), (5.0, 7.0))
    expect(isinstance(found, tuple | list) and len(found) == 2, "return a pair: decay, gain")
    expect(found[0] is not None and found[1] is not None, "your function returns nothing yet.")
    expect(not np.isclose(found[1], 2 * 7 + 3), "the first step comes first: its gain decays by the second's decay")
    expect(not np.isclose(found[1], 10), "what the first step added decays in the second one")
    expect_close(found[0], 10.0, "both decays, one after the other")
    expect_close(found[1], 5 * 3.0 + 7, "h -> 2 h + 3 -> 5 (2 h + 3) + 7: sort it by h")
    rng = np.random.default_rng(0)
    steps = [(rng.random(4), rng.normal(size=4)) for _ in range(8)]
    state = np.zeros(4)
    for decay, gain in steps:
        state = decay * state + gain
    while len(steps) > 1:  # in pairs, as a parallel scan does
        steps = [combine(*pair) for pair in zip(steps[::2], steps[1::2], strict=True)]
    expect_close(steps[0][1], state, "eight steps, combined in pairs, must end where a loop ends; arrays, too")
