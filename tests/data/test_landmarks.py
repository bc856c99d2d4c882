"""Landmarks: along outlines of known shapes, and back to the mask."""

import numpy as np
import pytest
import torch

from medcook.data import IGNORE
from medcook.data.landmarks import filled, landmarks, ring, sides
from medcook.metrics import dice

SIZE = (96, 128)


def disc(row: float, column: float, radius: float) -> np.ndarray:
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    return (y - row) ** 2 + (x - column) ** 2 < radius**2


def bean() -> np.ndarray:
    """A concave shape: a disc without another one that reaches its middle."""
    return disc(48, 35, 28) & ~disc(48, 65, 28)


def as_labels(*masks: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.stack(masks)).byte()


def pixels(points: np.ndarray) -> np.ndarray:
    """(x, y) in -1 to 1 as pixels."""
    return ((points + 1) * np.array(SIZE[::-1]) - 1) / 2


def test_points_of_a_disc_lie_on_its_circle_at_equal_distances_clockwise_from_the_top():
    places = pixels(ring(disc(40, 60, 20), 40))
    assert np.abs(np.hypot(*(places - [60, 40]).T) - 20).max() < 1
    steps = np.hypot(*(np.roll(places, -1, 0) - places).T)
    assert steps.std() < 0.1 * steps.mean()
    assert places[0, 1] == pytest.approx(20, abs=1)
    assert places[10, 0] == pytest.approx(80, abs=2), "a quarter of the way round, on the right"


def test_the_left_structure_comes_first_wherever_the_larger_one_is():
    for big, small in [(30, 95), (95, 30)]:
        points, known = landmarks(as_labels(disc(48, big, 25) | disc(48, small, 15)), 20)
        first, second = pixels(points[0].numpy().reshape(2, 20, 2)).mean(1)[:, 0]
        assert known.all() and first == pytest.approx(30, abs=1) and second == pytest.approx(95, abs=1)


def test_the_inside_of_the_landmarks_is_the_mask_also_of_a_concave_one():
    mask = bean() | disc(48, 100, 20)
    points, _ = landmarks(as_labels(mask, mask), 40)
    back = filled(points, SIZE)
    assert back.shape == (2, *SIZE) and dice(back[0].numpy(), mask) > 0.97


def test_structures_that_touch_are_cut_in_the_middle_and_a_single_one_is_not_known():
    left, right = sides(disc(48, 48, 25) | disc(48, 80, 25))
    assert np.nonzero(left)[1].max() < np.nonzero(right)[1].min() and left.sum() == pytest.approx(right.sum(), rel=0.1)
    points, known = landmarks(as_labels(disc(48, 25, 20), disc(48, 25, 20) | disc(48, 90, 20), disc(0, 0, 0)), 10)
    assert known.tolist() == [False, True, False] and (points[0] == 0).all()


def test_specks_are_no_structures():
    mask = disc(48, 30, 20) | disc(48, 95, 20)
    mask[0, ::7] = True
    points, known = landmarks(as_labels(mask), 10)
    assert known.all() and pixels(points[0].numpy())[:, 1].min() > 20


def test_a_structure_at_the_border_and_random_noise_and_unlabelled_voxels_do_no_harm():
    torch.manual_seed(0)
    noise = torch.randint(0, 4, (4, 32, 32)).byte()
    points, known = landmarks(torch.cat([noise, torch.full_like(noise[:1], IGNORE)]), 12)
    assert points.shape == (5, 24, 2) and torch.isfinite(points).all() and not known[-1]
    column = torch.zeros(1, 40, 41).byte()
    column[:, :, 20] = 1
    assert not landmarks(column, 8)[1].any(), "one column cannot be cut"
    edge, known = landmarks(as_labels(disc(0, 20, 20) | disc(95, 100, 20)), 20)
    assert known.all() and edge.abs().max() < 1.05
