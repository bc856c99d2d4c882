"""From masks back to trees, and stenoses along them: discs, tubes, forks and rings of known size."""

import numpy as np
import pytest

from medcook.recipes.anatomy import _centrelines, _stenoses, _trees
from medcook.recipes.anatomy._centrelines import finer_grid, ordered, parsed, split
from medcook.recipes.anatomy._stenoses import Found, agreement, dips, stenoses_of, turning_points
from medcook.recipes.anatomy._trees import Branch, Growth

SIZE = (64, 64)


def tube(start, end, radius: float, parent: int = -1) -> Branch:
    """A straight tube between two places."""
    start, end = np.asarray(start, float), np.asarray(end, float)
    steps = np.linspace(0, 1, int(2 * np.linalg.norm(end - start)) + 1)[:, None]
    return Branch(start + steps * (end - start), np.full(len(steps), radius), parent)


def soft(*branches: Branch, size=SIZE) -> np.ndarray:
    """What of each pixel is in a tree."""
    return np.clip(0.5 - _trees.rendered(branches, size).edge, 0, 1)


@pytest.mark.parametrize("radius", [1.5, 2.5, 4.0])
@pytest.mark.parametrize("end", [(32.0, 54.0), (50.0, 47.0)])
def test_a_tube_has_its_diameter_and_length(radius, end):
    truth = tube((32, 10), end, radius)
    (found,) = parsed(soft(truth))
    middle = slice(len(found.radius) // 4, -len(found.radius) // 4)
    assert found.radius[middle].mean() == pytest.approx(radius, abs=0.25)
    assert np.ptp(found.radius[middle]) < 0.45
    assert truth.length - 3 * radius < found.length < truth.length + 2 * radius + 1
    assert found.chord == pytest.approx(found.length, rel=0.03), "a straight tube is straight"
    away = np.linalg.norm(found.points[:, None] - truth.points, axis=-1).min(1)
    assert away[middle].max() < 0.6


def test_a_disc_is_as_deep_as_its_radius():
    rows, columns = np.indices(SIZE)
    found = parsed(np.clip(7.5 - np.hypot(rows - 30, columns - 31), 0, 1))
    assert len(found) <= 1 and all(branch.radius.max() == pytest.approx(7.0, abs=0.5) for branch in found)


def test_a_finer_grid_puts_pixels_where_they_were():
    ramp = np.tile(np.arange(8.0), (8, 1))
    fine = finer_grid(ramp, 4)
    assert fine.shape == (32, 32) and fine[10, 2:30] == pytest.approx((np.arange(2, 30) + 0.5) / 4 - 0.5)
    assert (finer_grid(ramp, 1) == ramp).all()
    assert _centrelines.onto(np.array([1.5, 5.5]), 4) == pytest.approx([0.0, 1.0])


def test_a_tree_comes_back_with_its_forks_and_generations():
    tree = (
        tube((5, 32), (25, 32), 3.5),
        tube((25, 32), (42, 18), 2.5, 0),
        tube((25, 32), (42, 46), 2.5, 0),
        tube((42, 46), (58, 40), 1.5, 2),
        tube((42, 46), (58, 57), 1.5, 2),
    )
    found = parsed(soft(*tree), root=(5, 32))
    assert [branch.generation for branch in found] == [0, 1, 1, 2, 2]
    assert [branch.parent for branch in found] == [-1, 0, 0, found[3].parent, found[3].parent]
    assert found[0].points[0, 0] < 10 and found[0].points[-1] == pytest.approx([25, 32], abs=2.5)
    left, right = sorted((found[1], found[2]), key=lambda branch: branch.points[-1, 1])
    assert left.points[-1, 1] < 22 and right.points[-1] == pytest.approx([42, 46], abs=2)
    assert found[3].parent == next(k for k in (1, 2) if found[k] is right)
    upside = parsed(soft(*tree), root=(58, 57))
    assert upside[0].points[0] == pytest.approx([58, 57], abs=3) and max(one.generation for one in upside) == 2
    by_width = parsed(soft(*tree))
    assert by_width[0].points[0, 0] < 10, "without a root the thickest end is one"


@pytest.mark.parametrize("seed", range(3))
def test_a_grown_tree_comes_back_as_a_whole(seed):
    field = np.zeros((128, 128), bool)
    field[5:-5, 5:-5] = True
    plan = Growth(4.0, 34.0, generations=3, gap=5.0)
    tree = _trees.grow([((10, 64), np.pi / 2)], field, plan, np.random.default_rng(seed))
    found = parsed(soft(*tree, size=field.shape), root=(10, 64))
    assert abs(len(found) - len(tree)) <= 1 and {one.generation for one in found} >= {0, 1, 2}
    assert sum(one.length for one in found) == pytest.approx(sum(one.length for one in tree), rel=0.12)


def test_parts_have_trunks_of_their_own_and_rings_are_cut_open():
    two = soft(tube((10, 5), (10, 55), 2), tube((40, 5), (40, 55), 3))
    found = parsed(two, root=(10, 5))
    assert [branch.parent for branch in found] == [-1, -1] and found[0].points[0] == pytest.approx([10, 5], abs=2.5)
    rows, columns = np.indices(SIZE)
    ring = np.abs(np.hypot(rows - 32, columns - 32) - 18) < 3
    (round_,) = parsed(ring)
    assert round_.length == pytest.approx(2 * np.pi * 18, rel=0.06) and round_.parent == -1
    lasso = ring | (soft(tube((51, 32), (62, 32), 2)) > 0.5)
    found = parsed(lasso, root=(62, 32))
    assert found[0].points[0, 0] > 55 and sum(branch.length for branch in found) > 100
    assert parsed(np.zeros(SIZE)) == ()


def test_an_uneven_surface_grows_no_branches():
    rng = np.random.default_rng(0)
    mask = soft(tube((32, 6), (32, 58), 4)) > 0.5
    mask |= np.roll(mask, 1, 0) & (rng.random(SIZE) < 0.3)
    assert len(parsed(mask)) == 1
    bump = soft(tube((32, 6), (32, 58), 4), tube((32, 30), (35.5, 30), 1.0))
    assert len(parsed(bump)) == 1 and len(parsed(soft(tube((32, 6), (32, 58), 4), tube((32, 30), (50, 30), 1.5)))) == 3


def test_pieces_are_ordered_and_meet_at_knots():
    line = np.zeros((9, 9), bool)
    line[4, 1:8] = line[1:5, 4] = True
    pieces = split(line)
    knots = np.bincount([knot for piece in pieces for knot in piece.knots])
    assert len(pieces) == 3 and sorted(knots[knots > 0]) == [1, 1, 1, 3]
    for piece in pieces:
        assert np.linalg.norm(np.diff(piece.path, axis=0), axis=1).max() < 2.5
    cells = np.array([[0, 0], [1, 1], [1, 2], [2, 3], [3, 3]])
    path = ordered(cells[[3, 0, 2, 4, 1]])
    assert (path == cells).all() or (path[::-1] == cells).all()


def test_two_pieces_that_meet_are_one_branch_and_three_are_three():
    rows = lambda a, b: np.stack([np.arange(a, b), np.full(b - a, 3)], 1)  # noqa: E731
    depth = np.full((40, 20), 2.0)
    pieces = [_centrelines.Piece(rows(0, 12), (0, 1)), _centrelines.Piece(rows(12, 30), (1, 2))]
    (one,) = _centrelines.rooted(pieces, depth, (0, 3), 1)
    assert one.length == pytest.approx(29, abs=0.2) and (one.radius == 2).all()
    third = _centrelines.Piece(np.stack([np.full(9, 12), np.arange(4, 13)], 1), (1, 3))
    assert [each.parent for each in _centrelines.rooted([*pieces, third], depth, (0, 3), 1)] == [-1, 0, 0]


def test_parts_are_bridged_one_after_the_other():
    chain = np.zeros((20, 60))
    for column in (2, 12, 22, 45):
        chain[8:12, column : column + 7] = 0.8
    whole = _centrelines.bridged(chain, 5.0)
    assert (whole[9, 2:29] >= 0.8).all() and not whole[:, 40:].any(), "what is farther is left out"
    assert len(parsed(whole)) == 1 and len(parsed(chain)) == 4


def test_radii_turn_at_tops_and_bottoms():
    values = np.array([4.0, 4.0, 3.0, 2.0, 2.0, 2.0, 5.0, 6.0, 3.0])
    assert turning_points(values) == [0, 4, 7, 8]
    assert dips(values) == [(4, pytest.approx(1 - 2 * 2 / (4 + 6)))]
    assert dips(np.array([3.0, 2.0, 1.0])) == [] and dips(np.array([1.0, 3.0, 1.0])) == []
    assert dips(np.array([2.0, 1.0, 2.0, 1.0, 4.0])) == [(1, pytest.approx(0.5)), (3, pytest.approx(1 - 2 / 6))]


@pytest.mark.parametrize("degree", [0.4, 0.55, 0.7])
def test_a_stenosis_of_known_degree_is_found_where_it_is(degree):
    branch = _trees.narrowed(tube((32, 6), (32, 58), 4.0), 50, degree, width=4.0)
    (found,) = stenoses_of(parsed(soft(branch)))
    assert found.place == pytest.approx(branch.points[50], abs=1.5)
    assert found.degree == pytest.approx(degree, abs=0.08)
    assert stenoses_of((branch,))[0].degree == pytest.approx(degree, abs=0.01), "of the tube as it was drawn"
    assert stenoses_of((branch,), least=degree + 0.05) == []


def test_forks_thin_vessels_and_neighbours_are_no_stenoses():
    tree = (tube((5, 32), (28, 32), 4.0), tube((28, 32), (55, 15), 3.0, 0), tube((28, 32), (55, 49), 3.0, 0))
    assert stenoses_of(parsed(soft(*tree))) == []
    thin = _trees.narrowed(tube((32, 6), (32, 58), 0.9), 50, 0.6, width=3.0)
    assert stenoses_of((thin,)) == []
    wide = tube((32, 6), (32, 58), 4.0)
    twice = _trees.narrowed(_trees.narrowed(wide, 40, 0.6, 1.0), 46, 0.4, 1.0)
    assert len(stenoses_of((twice,))) == 1, "of two that are 3 pixels apart the deeper one"
    apart = _trees.narrowed(_trees.narrowed(wide, 30, 0.4, 2.0), 70, 0.6, 2.0)
    assert [round(one.degree, 1) for one in stenoses_of((apart,))] == [0.6, 0.4]
    shape = wide.radius.copy()
    shape[2] = 1.0
    end = Branch(wide.points, shape, parent=0)
    assert stenoses_of((end,)) == [] and len(stenoses_of((Branch(wide.points, shape),))) == 1, "within a fork's disc"


def test_each_stenosis_found_is_one_true_ones():
    at = lambda column, degree: Found(np.array([10.0, column]), degree)  # noqa: E731
    truth = [at(10, 0.5), at(30, 0.4)]
    found = [at(12, 0.6), at(9, 0.45), at(50, 0.3)]
    assert agreement(found, truth) == {
        "tpr": 0.5,
        "ppv": pytest.approx(1 / 3),
        "degree_error": pytest.approx(0.05),
        "extra": 2.0,
    }
    nothing = agreement([], truth)
    assert nothing["tpr"] == 0 and np.isnan(nothing["ppv"]) and np.isnan(nothing["degree_error"])
    healthy = agreement(found[:1], [])
    assert np.isnan(healthy["tpr"]) and healthy["ppv"] == 0 and healthy["extra"] == 1
    branch = _trees.narrowed(tube((32, 6), (32, 58), 4.0), 50, 0.5, width=4.0)
    (true,) = _stenoses.true_stenoses((branch,))
    assert (true.place == branch.points[50]).all() and true.degree == 0.5
