"""Scenes: the same for the same seed, targets of a sensible size, nothing but finite numbers."""

import numpy as np
import pytest
from scipy import ndimage

from medcook.sam.scenes import (
    KINDS,
    LARGEST,
    SIZE,
    SMALLEST,
    Painter,
    appearance,
    displaced,
    in_one_piece,
    intruders,
    scene,
    warped_grid,
)

SEEDS = range(6)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_seed_is_a_scene(seed):
    one, two = scene(seed), scene(seed)
    assert np.array_equal(one.regions, two.regions) and one.targets == two.targets
    assert not np.array_equal(one.regions, scene(seed + 100).regions)


@pytest.mark.parametrize("seed", SEEDS)
def test_targets_are_neither_specks_nor_everything(seed):
    found = scene(seed)
    assert found.targets
    for number in range(len(found.targets)):
        assert SMALLEST <= found.mask(number).sum() <= LARGEST * SIZE**2


@pytest.mark.parametrize("seed", SEEDS)
def test_an_appearance_is_normalised_and_drawn_anew(seed):
    regions = scene(seed).regions
    image = appearance(regions, np.random.default_rng(seed))
    assert image.shape == (SIZE, SIZE) and image.dtype == np.float32 and np.isfinite(image).all()
    assert abs(image.mean()) < 1e-3 and abs(image.std() - 1) < 1e-3
    assert not np.array_equal(image, appearance(regions, np.random.default_rng(seed + 1)))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_kind_of_object_gives_targets(kind):
    asked = 0
    for seed in range(4):
        rng = np.random.default_rng(seed)
        painter = Painter(np.zeros((SIZE, SIZE), np.uint8))
        kind(painter, *warped_grid(rng), rng)
        asked += len(painter.targets) - 1
        assert all(0 < number < painter.count for target in painter.targets[1:] for number in target)
    assert asked >= 4


def test_a_ring_has_a_cavity_inside_its_wall():
    x, y = np.meshgrid(*[np.linspace(-1, 1, SIZE, dtype=np.float32)] * 2)
    for seed in range(20):
        painter = Painter(np.zeros((SIZE, SIZE), np.uint8))
        KINDS[3](painter, x, y, np.random.default_rng(seed))
        together = max(painter.targets, key=len)
        if len(together) == 2:
            break
    wall, cavity = (painter.regions == number for number in together)
    outside = ~(wall | cavity)
    touching = cavity[1:-1, 1:-1] & (outside[:-2, 1:-1] | outside[2:, 1:-1] | outside[1:-1, :-2] | outside[1:-1, 2:])
    assert wall.any() and touching.sum() < 0.1 * cavity.sum()


def test_tissue_in_pieces_is_no_target():
    mask = np.zeros((20, 20), bool)
    mask[2:8, 2:8] = True
    assert in_one_piece(mask)
    mask[12:18, 12:18] = True
    assert not in_one_piece(mask)


def test_a_scene_in_which_nothing_is_left_gets_a_disc():
    found = Painter(np.zeros((SIZE, SIZE), np.uint8)).finish()
    assert len(found.targets) == 1 and found.mask(0)[SIZE // 2, SIZE // 2]


def test_displaced_borders_lie_near_the_true_ones():
    regions = np.zeros((SIZE, SIZE), np.uint8)
    regions[40:120, 40:120] = 1
    seen = displaced(regions, np.random.default_rng(0), 2.0)
    near = ndimage.binary_dilation(regions, iterations=10) & ~ndimage.binary_erosion(regions, iterations=10)
    assert (seen != regions).sum() > 100 and not ((seen != regions) & ~near).any()
    assert np.array_equal(displaced(regions, np.random.default_rng(0), 0.0), regions)


def test_intruders_lie_at_the_border_of_the_cavity_and_count_as_cavity():
    x, y = np.meshgrid(*[np.linspace(-1, 1, SIZE, dtype=np.float32)] * 2)
    painter = Painter((np.hypot(x, y) < 0.5).astype(np.uint8))
    cavity = painter.regions == 1
    numbers = intruders(painter, x, y, np.random.default_rng(0), cavity)
    small = np.isin(painter.regions, numbers)
    assert numbers and small.any() and not (small & ~cavity).any()
    assert np.hypot(x, y)[small].max() > 0.45
