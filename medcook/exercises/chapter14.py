"""Checks of chapter 14's exercises."""

import numpy as np

from medcook.exercises import exercise, expect, expect_close


@exercise("14/ratio")
def check_ratio(ratio):
    prior = np.array([0.5, 0.5])
    even = np.full((2, 3, 4), 0.5)  # (classes, H, W)
    found = ratio(even, prior)
    expect(found is not None, "your function returns nothing yet.")
    expect(np.ndim(found) == 0, "one number for the whole image")
    expect_close(found, 0.0, "the image's mean ratios are the prior's: nothing is to be paid")
    half = np.zeros((2, 2, 2))
    half[0, :, 0] = half[1, :, 1] = 1
    expect_close(ratio(half, prior), 0.0, "half of the pixels surely of either class: the mean ratio is what counts")
    uneven = np.stack([np.full((3, 4), 0.8), np.full((3, 4), 0.2)])
    forward = 0.5 * np.log(0.5 / 0.8) + 0.5 * np.log(0.5 / 0.2)
    backward = 0.8 * np.log(0.8 / 0.5) + 0.2 * np.log(0.2 / 0.5)
    found = ratio(uneven, prior)
    expect(not np.isclose(found, -backward) and not np.isclose(found, -forward), "the sign: a divergence is positive")
    expect(not np.isclose(found, forward), "the other way round: sum of q log(q / prior), q the image's mean ratios")
    expect(not np.isclose(found, backward * 12), "the mean over pixels comes first, then one divergence")
    expect_close(found, backward, "mean ratios 0.8 and 0.2 against a prior of a half each")
    empty = np.stack([np.ones((2, 2)), np.zeros((2, 2))])
    expect(np.isfinite(ratio(empty, prior)), "0 log 0 is 0: a class that is nowhere predicted gives nan")
    expect_close(ratio(empty, prior), np.log(2), "one class everywhere, against a half each")


@exercise("14/frechet")
def check_frechet(frechet):
    rng = np.random.default_rng(0)
    a = rng.normal(size=(400, 3))
    found = frechet(a, a)
    expect(found is not None, "your function returns nothing yet.")
    expect_close(found, 0.0, "a set and itself", tolerance=1e-6)
    expect_close(frechet(a, a + [3, 0, 4]), 25.0, "the same set moved by (3, 0, 4): the squared distance of the means")
    stretched = a.mean(0) + 2 * (a - a.mean(0))
    spread = np.trace(np.cov(a.T))
    found = frechet(a, stretched)
    expect(not np.isclose(found, 0), "the means are the same, but one set is twice as wide: covariances count")
    expect(
        not np.isclose(found, np.linalg.norm(3 * np.cov(a.T)) ** 2),
        "covariances are compared by tr(A + B - 2 sqrt(AB))",
    )
    expect_close(found, spread, "a set twice as wide: tr(A + 4A - 2 sqrt(4AA)) = tr(A)")
    mixed = a @ np.array([[2.0, 1.0, 0.0], [0.0, 1.0, 0.5], [0.3, 0.0, 1.0]])
    expect(np.isrealobj(frechet(a, mixed)), "a root of a matrix may come out complex by rounding: keep the real part")
    root = np.sqrt(np.clip(np.linalg.eigvals(np.cov(a.T) @ np.cov(mixed.T)).real, 0, None)).sum()
    right = np.sum((a.mean(0) - mixed.mean(0)) ** 2) + spread + np.trace(np.cov(mixed.T)) - 2 * root
    expect_close(
        frechet(a, mixed), right, "the root of a product of matrices (scipy.linalg.sqrtm) is not the root of each entry"
    )


@exercise("14/matched")
def check_matched(matched):
    image = np.array([[0.0, 10.0], [20.0, 30.0]])
    reference = np.array([1.0, 5.0, 2.0, 3.0])
    kept = image.copy(), reference.copy()
    found = matched(image, reference)
    expect(found is not None, "your function returns nothing yet.")
    unchanged = all(np.array_equal(a, b) for a, b in zip(kept, (image, reference), strict=True))
    expect(unchanged, "your function writes into its arguments")
    expect(np.shape(found) == (2, 2), f"an image of the same shape: here (2, 2), yours has shape {np.shape(found)}")
    expect(
        not np.allclose(found, reference.reshape(2, 2)), "sort the reference first: the darkest pixel gets its least"
    )
    expect_close(found, [[1.0, 2.0], [3.0, 5.0]], "four pixels from dark to bright get 1, 2, 3, 5")
    turned = matched(image[::-1], reference)
    expect_close(turned, [[3.0, 5.0], [1.0, 2.0]], "the order of the pixels stays: bright ones stay bright")
    more = matched(image, np.arange(101.0))
    expect(np.shape(more) == (2, 2), "the reference may have more pixels than the image")
    expect_close(
        more, [[0.0, 100 / 3], [200 / 3, 100.0]], "quantiles: the darkest gets the least, the brightest the most"
    )
