"""Trees found: shares of a known tree's centre line and of its branches."""

import math

import numpy as np
import pytest
from scipy import ndimage

from medcook.errors import MedcookError
from medcook.measures.trees import (
    branches_detected,
    branches_of,
    centre_line,
    largest_part,
    tree_found,
    tree_length_detected,
)

FORK = 20
"""Where the trunk of the tree divides; it comes from row 0, and the two arms end in row 40."""


def line() -> np.ndarray:
    """A tree one voxel wide: a trunk of 20 voxels, and two arms of 20, which lead away from each other."""
    found = np.zeros((48, 60, 9), bool)
    found[: FORK + 1, 30, 4] = True
    for step in range(1, 21):
        found[FORK + step, [30 - step, 30 + step], 4] = True
    return found


def tree() -> np.ndarray:
    """The same, three voxels wide."""
    return ndimage.binary_dilation(line(), np.ones((3, 3, 3)))


def test_all_of_a_tree_is_found_and_nothing_of_it():
    assert tree_found(tree(), tree()) == (1, 1, 1, 1)
    nothing = tree_found(tree(), np.zeros_like(tree()))
    assert nothing[:2] == (0, 0) and math.isnan(nothing.precision) and nothing.parts == 0


def test_a_tree_of_three_branches_has_three():
    branches = branches_of(line())
    assert sorted(np.unique(branches)) == [0, 1, 2, 3] and np.array_equal(branches > 0, line())
    assert sorted(np.bincount(branches.ravel())[1:]) == [20, 20, 21], "the fork belongs to the nearest branch"
    assert len({branches[0, 30, 4], branches[40, 10, 4], branches[40, 50, 4]}) == 3
    assert len(np.unique(branches_of(centre_line(tree())))) == 4


def test_without_an_arm_a_third_of_length_and_of_branches_is_missing():
    guess = tree()
    guess[FORK + 3 :, 31:] = False
    found = tree_found(tree(), guess)
    assert found.branches == pytest.approx(2 / 3) and found.length == pytest.approx(2 / 3, abs=0.05)
    assert found.precision == 1


@pytest.mark.parametrize(("kept", "whole"), [(16, True), (15, False)])
def test_a_branch_is_found_where_four_fifths_of_it_are(kept, whole):
    branches = np.zeros((20, 3), int)
    branches[:, 0], branches[:, 2] = 1, 2
    guess = branches == 2
    guess[:kept, 0] = True
    assert branches_detected(branches, guess) == (1 if whole else 0.5)
    assert tree_length_detected(branches > 0, guess) == (20 + kept) / 40


def test_a_number_without_a_voxel_is_of_no_branch():
    branches = np.array([1, 1, 0, 3, 3])
    assert branches_detected(branches, branches == 3) == 0.5
    assert np.isnan(branches_detected(np.zeros(5, int), branches > 0))


def test_width_does_not_count_and_a_leak_costs_precision_alone():
    thin = tree_found(tree(), ndimage.binary_dilation(line(), np.ones((2, 1, 1))))
    everything = tree_found(tree(), np.ones_like(tree()))
    assert (thin.length, thin.branches, thin.precision) == (1, 1, 1)
    assert (everything.length, everything.branches) == (1, 1)
    assert everything.precision == pytest.approx(tree().mean())


def test_what_is_not_connected_with_the_largest_part_is_not_found():
    guess = tree()
    guess[5:7] = False
    found = tree_found(tree(), guess)
    assert found.parts == 2 and found.precision == 1
    assert found.length == pytest.approx(1 - 7 / 41 / 1.5, abs=0.06) and found.branches == pytest.approx(2 / 3)
    touching = np.zeros((4, 4), bool)
    touching[0, 0] = touching[1, 1:3] = True
    assert largest_part(touching).sum() == 2, "by their corners parts are not connected"


def test_the_centre_line_is_of_the_largest_part_and_knows_no_cavities():
    hollow = tree()
    hollow[5, 30, 4] = hollow[1, 1, 1] = False
    hollow[44:46, 0:2] = True
    assert np.array_equal(centre_line(hollow), centre_line(tree()))
    assert ndimage.label(centre_line(tree()), np.ones((3, 3, 3)))[1] == 1
    assert (tree() >= centre_line(tree())).all()


def test_short_pieces_are_no_branches():
    thorn = line()
    thorn[10, 31:34, 4] = True
    assert np.array_equal(np.unique(branches_of(thorn)), np.arange(5)), "the thorn divides the trunk, and is no branch"
    assert len(np.unique(branches_of(thorn, shortest=2))) > 5
    short = np.zeros((6, 6), bool)
    short[1:4, 2] = True
    assert branches_of(short).max() == 1, "a tree of a single short piece is a branch"


def test_in_two_dimensions_it_is_the_same():
    flat = tree()[:, :, 4]
    assert tree_found(flat, flat) == (1, 1, 1, 1)
    assert len(np.unique(branches_of(centre_line(flat)))) == 4


def test_where_there_is_no_tree_nothing_is_determined():
    none = np.zeros((5, 5, 5))
    found = tree_found(none, none + 1)
    assert math.isnan(found.length) and math.isnan(found.branches) and found.precision == 0


def test_other_shapes_are_refused():
    with pytest.raises(MedcookError, match="the segmentation of"):
        tree_found(tree(), tree()[1:])
