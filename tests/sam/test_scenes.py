"""Scenes: the same for the same seed, targets of a sensible size, nothing but finite numbers."""

import numpy as np
import pytest
from scipy import ndimage

from medcook.sam.appearance import appearance, close_up, cut_off, displaced
from medcook.sam.scenes import (
    KINDS,
    LARGEST,
    SIZE,
    SMALLEST,
    Painter,
    bites,
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
    regions = scene(seed).seen
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
        if len(together) == 2 and together[:1] in painter.targets:  # and not a cavity with what is ragged in it
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


def test_what_looks_like_another_region_is_drawn_like_it():
    painter = Painter(np.zeros((SIZE, SIZE), np.uint8))
    square = lambda at: np.pad(np.ones((30, 30), bool), ((at, SIZE - 30 - at), (at, SIZE - 30 - at)))  # noqa: E731
    wall = painter.paint(square(10))
    muscle = painter.paint(square(60), like=wall)
    again = painter.paint(square(100), like=muscle)
    painter.target(muscle)
    found = painter.finish()
    assert found.regions.max() == again and set(np.unique(found.seen)) == {0, wall}
    assert found.mask(len(found.targets) - 1).sum() == 30 * 30


def test_bites_are_taken_from_the_border_inwards():
    level = np.hypot(*np.meshgrid(*[np.linspace(-1, 1, SIZE)] * 2)) / 0.6
    for seed in range(6):
        taken = bites(np.random.default_rng(seed), level) & (level < 1)
        assert taken.any() and level[taken].mean() > 0.6


def blobs() -> tuple[np.ndarray, np.ndarray]:
    rows, columns = np.indices((SIZE, SIZE))
    masks = np.stack([np.hypot(rows - 50, columns - 60) < 12, np.hypot(rows - 140, columns - 140) < 10])
    return (masks[0] * 3.0 + masks[1]).astype(np.float32), masks


def test_a_close_up_shows_a_target_larger_and_leaves_out_what_is_cut_off():
    image, masks = blobs()
    for seed in range(8):
        seen, kept = close_up(image, masks, np.random.default_rng(seed))
        assert seen.shape == (SIZE, SIZE) and abs(seen.mean()) < 1e-3 and len(kept) == 1
        share = kept[0].any(0).sum() / SIZE
        assert 0.3 < share < 0.72, "the box takes up about half of the window"
        assert seen[kept[0]].min() > seen[~kept[0]].mean()


def test_what_is_cut_off_is_filled_with_the_edge_and_belongs_to_no_target():
    image, masks = blobs()
    image += np.random.default_rng(0).normal(size=image.shape).astype(np.float32)
    sides = set()
    for seed in range(20):
        seen, kept = cut_off(image, masks, np.random.default_rng(seed))
        repeated = [(seen == seen.take([-1], axis)).all(1 - axis)[::-1].argmin() for axis in (0, 1)]
        axis = int(np.argmax(repeated))
        sides.add(axis)
        beyond = kept.swapaxes(1, 1 + axis)[:, SIZE - repeated[axis] + 1 :]
        assert repeated[axis] > 0 and not beyond.any() and kept.any()
    assert sides == {0, 1}
