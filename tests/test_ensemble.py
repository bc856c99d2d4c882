"""The vote of a recipe's runs, and the one reading of the test set."""

import numpy as np
import pytest
import torch

from medcook import ensemble, paths
from medcook.data import Case, splits
from medcook.methods import Supervised
from medcook.recipes.recipe import Arm, Recipe, Scale
from medcook.tasks import Budget, Task

SCALE = Scale(Task("embedded"), Budget(steps=2, batch=4, precision="float32", checks=0), replicates=2)
RECIPE = Recipe(
    "vote", "Vote", "Votes.", {"unet": Arm(Supervised(channels=(4, 8)))}, {"quick": SCALE}, replicate="fold"
)


class Sure:
    """A member that is sure of one class to a degree."""

    def __init__(self, value: int, degree: float):
        self.value, self.degree = value, degree

    def probabilities(self, case: Case) -> torch.Tensor:
        found = torch.full((3, *case.spatial), (1 - self.degree) / 2)
        found[self.value] = self.degree
        return found


def test_the_vote_is_the_highest_mean_probability():
    case = Case(np.zeros((1, 2, 2), np.float32), np.zeros((2, 2), np.uint8), "a", "a")
    two_weak, one_strong = [Sure(1, 0.4), Sure(1, 0.4)], [Sure(2, 0.9)]
    found = ensemble.vote(two_weak + one_strong)(case)
    assert found.shape == (2, 2) and found.dtype == np.uint8 and (found == 2).all()


def test_the_test_set_is_read_once_for_the_same_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "EVIDENCE", tmp_path)
    before = len(splits._reads)
    first = ensemble.read_test_once(RECIPE, "quick")
    test_patients = SCALE.task.data.split.test
    assert first.reads == len(splits._reads) - before == first.patients == len(test_patients)
    assert len(first.single) == 2 and first.low <= first.mean <= first.high
    again = ensemble.read_test_once(RECIPE, "quick")
    assert again.keys == first.keys and again.mean == pytest.approx(first.mean, abs=1e-4)
    assert len(splits._reads) == before + first.reads, "known runs: the door stays shut"
    assert {row for row in first.rows["case_id"]} <= {c for p in test_patients for c in SCALE.task.data.patients[p]}


def test_other_runs_read_again(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "EVIDENCE", tmp_path)
    first = ensemble.read_test_once(RECIPE, "quick")
    longer = Scale(SCALE.task, Budget(steps=3, batch=4, precision="float32", checks=0), replicates=2)
    other = Recipe("vote", "Vote", "Votes.", RECIPE.arms, {"quick": longer}, replicate="fold")
    assert ensemble.read_test_once(other, "quick").keys != first.keys


def test_nothing_read_yet_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "EVIDENCE", tmp_path)
    assert ensemble.load_test_reading("vote", "quick") is None
    with pytest.raises(KeyError):
        ensemble.read_test_once(RECIPE, "full")
