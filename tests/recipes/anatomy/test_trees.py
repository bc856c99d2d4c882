"""Drawn trees: how they grow, what a stenosis takes away, and how they are put on a grid and into images."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import ndimage

from medcook.data import Case
from medcook.recipes.anatomy import _planted, _trees
from medcook.recipes.anatomy._trees import Branch, Growth

SIZE = (64, 64)


def straight(length: float = 40.0, radius: float = 4.0, row: float = 30.0, column: float = 10.0, **facts) -> Branch:
    """A horizontal tube."""
    steps = np.arange(0, length + 0.1, _trees.STEP)
    return Branch(np.stack([np.full_like(steps, row), column + steps], 1), np.full_like(steps, radius), **facts)


def grown(seed: int, **changes) -> tuple:
    field = np.zeros((128, 128), bool)
    field[5:-5, 5:-5] = True
    plan = Growth(3.0, 30.0)._replace(**changes)
    return _trees.grow([((10, 64), np.pi / 2)], field, plan, np.random.default_rng(seed)), field, plan


def test_length_and_chord_of_a_half_circle():
    angles = np.linspace(0, np.pi, 400)
    half = Branch(5 * np.stack([np.sin(angles), np.cos(angles)], 1), np.ones(400))
    assert half.length == pytest.approx(5 * np.pi, rel=1e-3) and half.chord == pytest.approx(10)
    assert half.arc[0] == 0 and (np.diff(half.arc) > 0).all()


def test_a_curve_has_even_steps_and_wanders_from_its_angle():
    points = _trees.curve(np.array([3.0, 4.0]), 0.3, 20.0, 0.0, np.random.default_rng(0))
    assert np.allclose(points[0], (3, 4)) and np.allclose(points[-1], (3 + 20 * np.sin(0.3), 4 + 20 * np.cos(0.3)))
    bent = _trees.curve(np.zeros(2), 0.3, 20.0, 20.0, np.random.default_rng(0))
    assert np.allclose(np.linalg.norm(np.diff(bent, axis=0), axis=1), _trees.STEP)
    assert np.linalg.norm(bent[-1]) < 20 - 0.02


@pytest.mark.parametrize("seed", range(4))
def test_a_tree_stays_in_its_field_forks_by_murrays_law_and_does_not_cross_itself(seed):
    tree, field, plan = grown(seed)
    assert len(tree) > 5 and tree[0].parent == -1
    for number, branch in enumerate(tree):
        assert field[tuple(branch.points.round().astype(int).T)].all()
        assert branch.length >= plan.shortest - 1 and branch.generation < plan.generations
        children = [tree[child] for child in _trees.children_of(tree, number)]
        assert all(np.allclose(child.points[0], branch.points[-1]) for child in children)
        assert all(child.generation == branch.generation + 1 for child in children)
        if len(children) == 2:
            cubes = sum(child.radius[0] ** 3 for child in children)
            assert cubes == pytest.approx(branch.radius[-1] ** 3)
        for other in tree[:number]:
            if tree.index(other) != branch.parent and other.parent != branch.parent:
                away = np.linalg.norm(branch.points[:, None] - other.points, axis=-1)
                away -= branch.radius[0] + other.radius
                late = round((4 * branch.radius[0] + 2 * plan.gap) / _trees.STEP)
                assert (away[late:] >= plan.gap - 1e-6).all()


def test_trees_beside_are_not_touched_and_sizes_scale():
    wall = straight(128, 1.0, row=60, column=0)
    tree = _trees.grow(
        [((10, 64), np.pi / 2)], np.ones((128, 128), bool), Growth(3.0, 80.0), np.random.default_rng(0), beside=(wall,)
    )
    assert max(branch.points[:, 0].max() for branch in tree) < 60 - 3
    small = _trees.grow([((5, 32), np.pi / 2)], np.ones(SIZE, bool), Growth(3.0, 30.0), np.random.default_rng(0))
    assert small[0].radius[0] == pytest.approx(1.5) and small[0].length == pytest.approx(15, abs=0.6)
    assert _trees.grow([((5, 32), np.pi / 2)], np.zeros(SIZE, bool), Growth(3.0, 30.0), np.random.default_rng(0)) == ()


def test_a_stenosis_takes_its_share_of_the_diameter_away_and_nothing_far_from_it():
    branch = straight(radius=4.0)
    tight = _trees.narrowed(branch, 40, 0.5, width=3.0)
    assert tight.radius[40] == pytest.approx(2.0) and tight.radius.argmin() == 40
    assert tight.radius[40 + 6] == pytest.approx(4 * (1 - 0.5 * np.exp(-0.5))), "one standard deviation away"
    assert tight.radius[0] == pytest.approx(4, abs=1e-6) and tight.stenoses == ((40, 0.5),)
    twice = _trees.narrowed(tight, 10, 0.3, width=1.0)
    assert [one.at for one in twice.stenoses] == [40, 10]


def test_a_tube_on_a_grid_is_as_wide_and_deep_as_it_is():
    drawn = _trees.rendered((straight(radius=4.0),), SIZE)
    across = drawn.edge[:, 30]
    assert across[25:36] == pytest.approx(np.abs(np.arange(25, 36) - 30) - 4.0)
    assert across[30] == pytest.approx(-4) and across[34] == pytest.approx(0) and across[35] == pytest.approx(1)
    assert across[50] == _trees.REACH and drawn.mask[:, 30].sum() == 9
    rows = np.arange(26, 35)
    assert drawn.thickness[26:35, 30] == pytest.approx(2 * np.sqrt(16 - (rows - 30.0) ** 2))
    assert drawn.thickness[36, 30] == 0 and drawn.owner[30, 30] == 0 and drawn.owner[50, 30] == -1
    area = drawn.mask.sum()
    assert area == pytest.approx(40 * 8 + np.pi * 16, rel=0.12)


def test_where_two_branches_meet_the_one_counts_in_which_a_pixel_lies_deepest():
    thick, thin = straight(radius=5.0), straight(radius=1.0, row=34.0)
    drawn = _trees.rendered((thin, thick), SIZE)
    assert (drawn.owner[28:33, 30] == 1).all() and drawn.owner[34, 30] in (0, 1)
    assert drawn.edge[34, 30] == pytest.approx(-1.0)
    assert _trees.rendered((), SIZE).owner.max() == -1


def test_centre_lines_know_their_branch_and_keep_thin_masks_together():
    tree = (straight(), straight(20, 0.3, row=45))
    line = _trees.lines(tree, SIZE)
    assert set(np.unique(line)) == {0, 1, 2} and line[30, 30] == 1 and line[45, 20] == 2
    shifted = (replace(tree[1], points=tree[1].points + 0.45),)
    drawn = _trees.rendered(shifted, SIZE)
    assert ndimage.label(_trees.solid(shifted, drawn))[1] == 1 and not drawn.mask.all()


class Dotted(_planted.PlantedTrees):
    """Each image gets a tube at a random row."""

    def plant(self, image, organ, rng):
        tree = (straight(10, 2.0, row=rng.uniform(5, 12), column=2),)
        drawn = _trees.rendered(tree, image.shape)
        return _planted.Planted((image + drawn.thickness)[None], drawn.mask.astype(np.uint8), {"tube": tree})


def test_the_case_decides_what_is_planted_and_it_is_kept():
    preparation = Dotted(size=(16, 16), versions=2)
    case = Case(np.random.default_rng(0).random((1, 16, 16), np.float32), np.zeros((16, 16), np.uint8), "a", "a")
    images, labels = preparation.images(case), preparation.labels(case)
    assert images.shape == (2, 1, 16, 16) and labels.shape == (2, 16, 16) and labels.dtype == torch.uint8
    assert not torch.equal(labels[0], labels[1]) and images.dtype == torch.float32
    assert preparation.planted(case) is preparation.planted(case)
    _planted._LAST.clear()
    assert torch.equal(preparation.images(case), images), "the same again"
    turned = replace(case, image=case.image[:, ::-1].copy())
    assert not torch.equal(preparation.images(turned), images), "another image of the same name"
    assert not torch.equal(preparation.labels(replace(case, case_id="b")), labels)


class DottedTask(_planted.TreeTask):
    painter = Dotted
    names = {1: "tube", 4: "wall"}


def test_a_task_has_the_trees_labels_and_says_what_is_real():
    task = DottedTask("embedded", side=48, zoom=2.0, versions=3)
    assert task.classes == 5 and task.structures == {1: "tube", 4: "wall"}
    assert task.preparation.size == (48, 48) and task.preparation.long_side == 96 and task.preparation.versions == 3
    assert task.data_kind == "simulated"
    real = SimpleNamespace(data=SimpleNamespace(manifest=SimpleNamespace(simulated=False)))
    assert _planted.TreeTask.data_kind.fget(real) == "real-anatomy-simulated"
