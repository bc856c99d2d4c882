"""Checks of chapter 11's exercises."""

import numpy as np

from medcook.exercises import exercise, expect, expect_close


@exercise("11/modulate")
def check_modulate(modulate):
    maps = np.arange(12.0).reshape(2, 2, 3)
    kept, scale, shift = maps.copy(), np.array([0.5, -1.0]), np.array([1.0, 2.0])
    found = modulate(maps, scale, shift)
    expect(found is not None, "your function returns nothing yet.")
    expect(np.array_equal(maps, kept), "your function writes into its arguments")
    expect(np.shape(found) == (2, 2, 3), f"maps of the same shape: here (2, 2, 3), yours has shape {np.shape(found)}")
    wide = scale[:, None, None], shift[:, None, None]
    expect(not np.allclose(found, maps * wide[0] + wide[1]), "(1 + scale): with a scale of 0 nothing changes")
    expect(not np.allclose(found, (maps + wide[1]) * (1 + wide[0])), "first scaled, then shifted")
    expect_close(found, maps * (1 + wide[0]) + wide[1], "channel c is maps[c] * (1 + scale[c]) + shift[c]")
    expect_close(modulate(maps, 0 * scale, 0 * shift), maps, "a sentence that says nothing changes nothing")


@exercise("11/contrast")
def check_contrast(contrast):
    similarity = np.array([[2.0, 0.0, 1.0], [0.0, 3.0, 0.0], [1.0, -1.0, 1.0]])
    rows = -np.mean(np.diag(similarity) - np.log(np.exp(similarity).sum(1)))
    columns = -np.mean(np.diag(similarity) - np.log(np.exp(similarity).sum(0)))
    found = contrast(similarity)
    expect(found is not None, "your function returns nothing yet.")
    expect(np.ndim(found) == 0, f"one number for the whole batch, yours has shape {np.shape(found)}")
    expect(not np.isclose(found, -(rows + columns) / 2), "a loss is small where pairs are probable: mind the sign")
    expect(not np.isclose(found, 3 * (rows + columns) / 2), "the mean over the batch, not the sum")
    expect(not np.isclose(found, rows + columns), "the mean of both directions, not their sum")
    expect(not np.isclose(found, rows), "this is images to reports; reports to images count as much")
    expect(not np.isclose(found, columns), "this is reports to images; images to reports count as much")
    expect_close(found, (rows + columns) / 2, "cross-entropy along rows and along columns, averaged")
    expect_close(contrast(np.zeros((4, 4))), np.log(4), "where nothing is known, it is the logarithm of the batch")
    expect_close(contrast(1000 * np.eye(2)), 0.0, "where all is known, it is 0, also with large similarities")


@exercise("11/hit")
def check_hit(hit):
    one = (0, 0, 4, 4)
    expect(hit(one, one) is not None, "your function returns nothing yet.")
    expect(bool(hit(one, one)), "a box hits itself")
    expect(not hit(one, (4, 4, 8, 8)), "boxes that only touch share nothing: the last row and column are exclusive")
    expect(not hit(one, (6, 0, 9, 4)), "boxes apart share nothing: a negative height is none")
    expect(not hit(one, (5, 5, 9, 9)), "apart in both axes: two negative sides do not make an area")
    expect(not hit(one, (0, 2, 4, 6)), "they share 8 of 24 pixels: of the union, not of one box")
    expect(bool(hit(one, (0, 1, 4, 4))), "they share 12 of 16 pixels")
    expect(bool(hit(one, (0, 0, 2, 4))), "exactly one half is enough")
