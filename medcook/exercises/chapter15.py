"""Checks of chapter 15's exercises."""

import numpy as np

from medcook.exercises import exercise, expect, expect_close


@exercise("15/noised")
def check_noised(noised):
    image, noise = np.array([[2.0, -1.0], [0.0, 4.0]]), np.array([[1.0, 1.0], [-1.0, 0.5]])
    kept = image.copy(), noise.copy()
    found = noised(image, noise, 0.64)
    expect(found is not None, "your function returns nothing yet.")
    unchanged = all(np.array_equal(a, b) for a, b in zip(kept, (image, noise), strict=True))
    expect(unchanged, "your function writes into its arguments")
    expect(np.shape(found) == (2, 2), f"an image of the same shape: here (2, 2), yours has shape {np.shape(found)}")
    expect(not np.allclose(found, 0.64 * image + 0.36 * noise), "shares of the variance: take their roots")
    expect(not np.allclose(found, 0.6 * image + 0.8 * noise), "the other way round: `signal` is the image's share")
    expect(not np.allclose(found, 0.8 * image + noise), "the noise, too, is scaled: the variance stays 1")
    expect_close(found, 0.8 * image + 0.6 * noise, "sqrt(0.64) of the image and sqrt(0.36) of the noise")
    expect_close(noised(image, noise, 1.0), image, "where the signal is all, there is no noise")


@exercise("15/back")
def check_back(back):
    image, noise = np.array([2.0, -1.0, 0.5]), np.array([1.0, -2.0, 0.0])
    noisy = 0.6 * image + 0.8 * noise
    found = back(noisy, noise, 0.36, 0.64)
    expect(found is not None, "your function returns nothing yet.")
    expect(np.shape(found) == (3,), f"a value for each of the three pixels, yours has shape {np.shape(found)}")
    expect(not np.allclose(found, image), "not all the way: some noise stays until the signal is 1")
    expect(not np.allclose(found, 0.8 * noisy + 0.6 * noise), "first the clean image: (noisy - its noise) / its share")
    expect(not np.allclose(found, 0.8 * image), "put the same noise back, as much as there is at the new time")
    expect(not np.allclose(found, 0.6 * image + 0.8 * noise), "the new mixture has the new shares, not the old ones")
    expect_close(found, 0.8 * image + 0.6 * noise, "0.8 of the clean image and 0.6 of the noise")
    expect_close(back(noisy, noise, 0.36, 1.0), image, "with all signal the clean image is left")
    expect_close(back(noisy, noise, 0.36, 0.36), noisy, "without a step nothing changes")


@exercise("15/xray")
def check_xray(xray):
    volume = np.zeros((2, 3, 4))
    volume[0, 0] = 1.0
    volume[0, 1, :2] = 2.0
    volume[1, 2, 0] = 0.5
    lengths = np.array([[8.0, 8.0, 0.0], [0.0, 0.0, 1.0]])
    found = xray(volume, 2.0, 10.0)
    expect(found is not None, "your function returns nothing yet.")
    expect(np.shape(found) == (2, 3), f"one pixel a ray: here (2, 3), yours has shape {np.shape(found)}")
    expect(not np.allclose(found, np.exp(-lengths / 10)), "dense is bright: 1 minus what is left of the ray")
    expect(not np.allclose(found, 1 - np.exp(-lengths / 20)), "a voxel is `voxel` millimetres long")
    expect(not np.allclose(found, 1 - np.exp(-lengths * 10)), "divided by `depth`, not multiplied")
    expect(not np.allclose(found, lengths / 10), "the sum is an exponent: intensity falls by a share in each voxel")
    expect(not np.allclose(found, 1 - np.exp(-lengths / 40)), "the sum along the ray, not the mean")
    expect_close(found, 1 - np.exp(-lengths / 10), "1 - exp(-sum of the attenuation along the ray times 2 mm / 10 mm)")
