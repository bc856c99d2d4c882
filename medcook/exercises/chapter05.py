"""Checks of chapter 05's exercises."""

import numpy as np

from medcook.exercises import exercise, expect, expect_close


@exercise("05/nearest_prototype")
def check_nearest_prototype(nearest_prototype):
    support = np.array([[4.0, 0.0], [2.0, 0.0], [0.0, 1.0], [1.0, 2.0], [0.0, 3.0]])
    mask = np.array([False, False, True, True, True])
    query = np.array([[9.0, 1.0], [0.1, 0.3], [-1.0, 0.2], [0.1, 0.05]])
    kept = support.copy(), query.copy()
    found = np.asarray(nearest_prototype(support, mask, query))
    untouched = np.array_equal(support, kept[0]) and np.array_equal(query, kept[1])
    expect(untouched, "your function writes into the features it was given")
    expect(found.shape == (4,), f"one answer for each of the 4 query features, and yours has the shape {found.shape}")
    expect(found.dtype == bool, "answer True or False: is it the structure?")
    expect(bool(found[1]) and not found[0], "the structure is where the cosine to its own prototype is the larger one")
    expect(bool(found[2]), "cosines keep their sign: what points away from a prototype is not like it")
    expect(not found[3], "compare directions, not distances: a short feature is not another class")
    doubled = np.concatenate([support, [[60.0, 61.0]]]), np.append(mask, True)
    again = np.asarray(nearest_prototype(*doubled, np.array([[1.0, 0.2], [1.0, 0.5]])))
    expect_close(
        again.astype(float), [0.0, 1.0], "average the features first, as they are, and take the cosine to the average"
    )
    lone = np.asarray(nearest_prototype(support[:3], mask[:3], np.array([[0.2, 1.0]])))
    expect(bool(lone[0]), "a prototype may be the mean of a single feature")


@exercise("05/training_slices")
def check_training_slices(training_slices):
    labels = np.zeros((5, 3, 3), int)
    labels[0, 0, 0], labels[1, 1, 1], labels[2, 1, 1], labels[3, :2, 0] = 1, 3, 2, [1, 3]
    given = labels.copy()
    first = training_slices(labels, {3}, 1)
    expect(isinstance(first, tuple | list) and len(first) == 2, "return two things: slice numbers and label maps")
    expect(np.array_equal(labels, given), "your function writes into the labels: the truth is needed for scoring")
    numbers, maps = (np.asarray(part) for part in first)
    expect(numbers.tolist() == [0, 1, 2, 3, 4], "in setting 1 every slice is trained on")
    wanted = np.where(given == 3, 0, given)
    expect(maps.shape == given.shape, f"a label map for each slice that is kept: {given.shape}, not {maps.shape}")
    expect(not (maps == 3).any(), "setting 1 may not name the novel structure: it is background")
    expect_close(maps, wanted, "base structures keep their names")
    second = training_slices(labels, {3}, 2)
    numbers, maps = (np.asarray(part) for part in second)
    expect(3 not in numbers.tolist(), "setting 2 leaves out every slice that shows it, also where a base one shows too")
    expect(4 in numbers.tolist(), "a slice that shows nothing at all may stay")
    expect(numbers.tolist() == [0, 2, 4], "in setting 2 the slices without the novel structure are left, in order")
    expect_close(maps, given[[0, 2, 4]], "maps belong to the slices that are kept")
    numbers, maps = (np.asarray(part) for part in training_slices(labels, {1, 2}, 2))
    expect(numbers.tolist() == [1, 4], "there may be several novel structures: a slice with any of them goes")


@exercise("05/luck")
def check_luck(luck):
    dice = np.array([[0.5, 0.75], [0.75, 0.75], [0.75, 1.0]])
    share = luck(dice, 0.05)
    expect(np.ndim(share) == 0, "return one number: a share of pairs")
    expect(0 <= share <= 1, "a share of the pairs lies between 0 and 1")
    hint = "of three supports one pair differs that much: compare their means over patients, each pair once"
    expect_close(luck(dice, 0.2), 1 / 3, hint)
    expect_close(luck(dice, 0.125), 1.0, "a difference as large as the gain counts", 1e-9)
    crossed = np.array([[0.75, 0.25], [0.25, 0.75]])
    expect_close(luck(crossed, 0.05), 0.0, "equal means differ by nothing, whatever single patients do")
    falling = np.array([[0.75, 0.75], [0.5, 0.5]])
    expect_close(luck(falling, 0.2), 1.0, "either support may be the lucky one: the sign does not matter")
