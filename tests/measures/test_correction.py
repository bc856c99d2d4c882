"""Human correction effort: masks whose clicks can be counted by hand."""

import numpy as np
import pytest
from skimage.morphology import skeletonize

from medcook.measures.correction import Effort, correction_effort, relaxed_errors


def blank(side: int = 64) -> np.ndarray:
    return np.zeros((side, side), dtype=bool)


def square(*corners: tuple[int, int], side: int = 8, size: int = 64) -> np.ndarray:
    """Squares with their upper left corners there."""
    mask = blank(size)
    for row, column in corners:
        mask[row : row + side, column : column + side] = True
    return mask


def disc(radius: float, size: int = 64) -> np.ndarray:
    rows, columns = np.mgrid[:size, :size] - size // 2
    return rows**2 + columns**2 < radius**2


APART = [(4, 4), (4, 30), (30, 4), (40, 40)]


@pytest.mark.parametrize("truth", [blank(), ~blank(), square(*APART), disc(20)], ids=["none", "all", "squares", "disc"])
@pytest.mark.parametrize("relax", [0, 5])
def test_a_perfect_mask_costs_nothing(truth, relax):
    assert correction_effort(truth, truth, relax) == Effort(0, 0, 0, 0)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_missing_squares_cost_their_corners(count):
    assert correction_effort(square(*APART[:count]), blank(), relax=0) == Effort(0, 0, 4 * count, 0)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_false_islands_are_deleted_by_a_click_each(count):
    assert correction_effort(blank(), square(*APART[:count]), relax=0) == Effort(0, count, 0, 0)


@pytest.mark.parametrize("relax", [0, 5])
def test_holes_are_filled_by_a_click_each(relax):
    truth = square((4, 4), side=56)
    holes = square((20, 20), (20, 40), (40, 30), side=3)
    assert correction_effort(truth, truth & ~holes, relax) == Effort(0, 0, 0, 3)


def test_a_hole_that_is_filled_falsely_is_cut_out_again():
    whole, hole = square((4, 4), side=56), square((24, 24), side=12)
    assert correction_effort(whole & ~hole, whole, relax=0) == Effort(4, 0, 0, 0)


def test_a_bump_costs_the_border_that_has_to_be_drawn():
    """A false one is cut off along a line; a missing one is drawn with both its corners."""
    body, bump = square((30, 10), side=30), square((20, 20), side=10)
    assert correction_effort(body, body | bump, relax=0) == Effort(2, 0, 0, 0)
    assert correction_effort(body | bump, body, relax=0) == Effort(0, 0, 4, 0)


def test_a_false_square_beside_a_missing_one_shares_its_border():
    """It is cut off along the shared side; the other three sides of the missing one are drawn."""
    truth, guess = square((20, 20), side=10), square((20, 30), side=10)
    assert correction_effort(truth, guess, relax=0) == Effort(2, 0, 4, 0)


def test_the_edge_of_the_image_need_not_be_drawn():
    assert correction_effort(square((0, 0), side=20), blank(), relax=0) == Effort(0, 0, 3, 0)
    assert correction_effort(~blank(), blank(), relax=0) == Effort(0, 0, 0, 1)


def test_diagonal_neighbours_are_one_part():
    assert correction_effort(blank(), square((10, 10), (18, 18)), relax=0) == Effort(0, 1, 0, 0)


def test_a_rim_within_the_tolerance_costs_nothing():
    truth, wider = square((20, 20), side=24), square((17, 17), side=30)
    assert correction_effort(truth, wider, relax=0).false_points == 4
    assert correction_effort(truth, wider, relax=3).clicks == 0
    assert correction_effort(truth, wider, relax=2).clicks > 0
    assert correction_effort(disc(20), disc(18), relax=0).clicks > 4
    assert correction_effort(disc(20), disc(18), relax=5).clicks == 0


def test_a_thin_structure_is_missed_however_relaxed():
    """No pixel of a line survives erosion; its skeleton does. A false line is forgiven."""
    line = blank()
    line[32, 8:56] = True
    assert correction_effort(line, blank()) == Effort(0, 0, 2, 0)
    assert correction_effort(blank(), line).clicks == 0


def test_a_finer_polygon_needs_more_points():
    counts = [correction_effort(disc(20), blank(), 0, tolerance).missing_points for tolerance in (0.5, 1, 2, 4)]
    assert counts == sorted(counts, reverse=True) and counts[0] > counts[-1] >= 4


def test_relaxation_against_loops():
    """Dilation and erosion with the four neighbours, pixel by pixel."""
    rng = np.random.default_rng(0)
    truth, guess = (np.kron(rng.random((6, 6)) < 0.5, np.ones((5, 5))).astype(bool) for _ in range(2))
    guess ^= rng.random(guess.shape) < 0.05

    def neighbours(row: int, column: int) -> list[tuple[int, int]]:
        near = [(row, column), (row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)]
        return [place for place in near if min(place) >= 0 and max(place) < len(truth)]

    def each(mask: np.ndarray, rule) -> np.ndarray:
        new = [[rule(mask[place] for place in neighbours(row, column)) for column in range(30)] for row in range(30)]
        return np.array(new)

    core = each(each(truth | guess, all), all)
    for found, mine, other in zip(relaxed_errors(truth, guess, 2), (guess, truth), (truth, guess), strict=True):
        wanted = mine & ~other & core
        for _ in range(2):
            wanted = each(wanted, any) & ~other
        wanted &= mine
        if mine is truth:
            wanted |= skeletonize(truth) & ~guess
        assert np.array_equal(found, wanted)
