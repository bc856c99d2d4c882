"""Checks of chapter 16's exercises."""

import numpy as np

from medcook.exercises import exercise, expect, expect_close

SQUARE = np.array([[0.0, 0.0], [0.0, 2.0], [2.0, 2.0], [2.0, 0.0]])


@exercise("16/area")
def check_area(area):
    found = area(SQUARE)
    expect(found is not None, "your function returns nothing yet.")
    expect(np.ndim(found) == 0, "one number for the whole contour")
    expect(not np.isclose(found, 8.0) and not np.isclose(found, -8.0), "half of the sum of cross products")
    expect(found > 0, "an area is positive, whichever way round the contour goes")
    expect(not np.isclose(found, 2.0), "the contour is closed: the last point is followed by the first")
    expect_close(found, 4.0, "a square of side 2")
    expect_close(area(SQUARE[::-1]), 4.0, "the same square, the other way round")
    expect_close(area(SQUARE + [100.0, -50.0]), 4.0, "the same square somewhere else")
    arrow = np.array([[0.0, 0.0], [4.0, 2.0], [0.0, 4.0], [1.0, 2.0]])
    expect_close(area(arrow), 6.0, "a contour with a dent: a bounding box or a convex hull is too large")
    angles = np.linspace(0, 2 * np.pi, 400, endpoint=False)
    circle = np.stack([5 * np.cos(angles), 3 * np.sin(angles)], axis=1)
    expect_close(area(circle), 15 * np.pi, "an ellipse with half axes 5 and 3", tolerance=0.01)


@exercise("16/neighbours")
def check_neighbours(neighbours):
    features = np.array([[0.0], [3.0], [6.0], [3.0]])
    ring = np.array([[0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 1, 0]])
    kept = features.copy(), ring.copy()
    found = neighbours(features, ring)
    expect(found is not None, "your function returns nothing yet.")
    unchanged = all(np.array_equal(a, b) for a, b in zip(kept, (features, ring), strict=True))
    expect(unchanged, "your function writes into its arguments")
    expect(np.shape(found) == (4, 1), f"a row for each node: here (4, 1), yours has shape {np.shape(found)}")
    expect(not np.allclose(found, ring @ features), "the mean over the neighbours, not their sum")
    alone = (ring + np.eye(4)) @ features / 3
    expect(not np.allclose(found, alone), "the mean over the neighbours without the node itself")
    expect_close(found, [[3.0], [3.0], [3.0], [3.0]], "every node of the ring has two neighbours, whose mean is 3")
    star = np.zeros((4, 4))
    star[0, 1:] = star[1:, 0] = 1
    expect_close(
        neighbours(features, star),
        [[4.0], [0.0], [0.0], [0.0]],
        "a star: divide by each node's own number of neighbours",
    )
    lonely = np.zeros((2, 2))
    found = neighbours(np.array([[1.0, 2.0], [3.0, 4.0]]), lonely)
    expect(np.isfinite(found).all(), "a node without neighbours gives nan: it gets zeros")
    expect_close(found, np.zeros((2, 2)), "a node without neighbours gets zeros")


@exercise("16/chamfer")
def check_chamfer(chamfer):
    a = np.array([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    found = chamfer(a, a)
    expect(found is not None, "your function returns nothing yet.")
    expect_close(found, 0.0, "a set of points and itself")
    b = np.array([[0.0, 0.0, 3.0], [1.0, 0.0, 3.0]])
    found = chamfer(a, b)
    expect(not np.isclose(found, 6.0), "half of the sum of both directions")
    expect(not np.isclose(found, 9.0), "distances, not their squares")
    expect_close(found, 3.0, "the same two points, 3 mm away")
    more = np.vstack([a, [[5.0, 0.0, 0.0]]])
    expect(not np.isclose(chamfer(a, more), 0.0), "both directions: every point of b must be near a, too")
    expect_close(chamfer(a, more), (0.0 + 4.0 / 3) / 2, "a third point, 4 mm from its nearest")
    expect_close(chamfer(more, a), chamfer(a, more), "the same whichever set comes first")
    expect_close(chamfer(a[:1], more), (0.0 + (0 + 1 + 5) / 3) / 2, "sets of different sizes")


@exercise("16/degree")
def check_degree(degree):
    radii = np.array([3.0, 4.0, 2.0, 1.0, 1.5, 2.0, 1.9])
    kept = radii.copy()
    found = degree(radii)
    expect(found is not None, "your function returns nothing yet.")
    expect(np.array_equal(kept, radii), "your function writes into its argument")
    expect(np.ndim(found) == 0, "one number for the whole vessel")
    expect(not np.isclose(found, 1 / 3), "what is gone, not what is left")
    expect(not np.isclose(found, 8 / 9), "of the diameter, not of the area of the cross-section")
    expect(not np.isclose(found, 0.75), "a vessel gets thinner on its way: the largest radius of all is too large")
    expect(not np.isclose(found, 1 - 1 / kept.mean()), "against the widest places at both sides, not the mean of all")
    expect(not np.isclose(found, 1 - 2 / 4.9), "the widest places before and after, which need not be the ends")
    expect_close(found, 2 / 3, "the tightest place has a radius of 1, the widest before it 4 and after it 2")
    expect_close(degree(2.5 * radii), 2 / 3, "a share is the same in pixels and in mm")
    expect_close(degree(radii[::-1]), 2 / 3, "the same vessel from its other end")
    expect_close(degree(np.full(5, 2.0)), 0.0, "nothing is gone where a vessel is as wide everywhere")
