"""The leakage experiment: what is scored stays the same, and only the origin of the training slices differs."""

from dataclasses import replace

import pytest
import torch

from medcook.data import IGNORE
from medcook.recipes.data_loading.leakage import SliceTask, half_of, recipe
from medcook.tasks import Samples, Task

TASK = SliceTask("embedded", patients=4, fold=0)


@pytest.fixture(scope="module")
def arms() -> dict[str, Task]:
    return {name: recipe.run("quick", name, 0)[1] for name in recipe.arms}


def slices(samples: Samples) -> set[bytes]:
    """The images of samples, as something that can be compared."""
    return {image.numpy().tobytes() for image in samples.images}


def scored(task: SliceTask) -> Samples:
    """The validation slices with a label."""
    val = task.samples("val")
    seen = (val.labels != IGNORE).flatten(1).all(1)
    assert ((val.labels == IGNORE).flatten(1).all(1) | seen).all()  # a slice is hidden as a whole
    return Samples(val.images[seen], val.labels[seen], val.case_of[seen])


@pytest.mark.parametrize("count", [1, 8, 9])
def test_the_halves_are_disjoint_and_cover(count):
    one, other = half_of("a", count, 0), half_of("a", count, 1)
    assert sorted(one + other) == list(range(count)) and 0 <= len(one) - len(other) <= 1
    assert half_of("a", 8, 0) == half_of("a", 8, 0)


def test_the_halves_differ_between_cases_and_mix_positions():
    assert len({tuple(half_of(f"case {k}", 8, 0)) for k in range(10)}) > 5
    assert sorted(half_of("brain01", 40, 0)) != list(range(0, 40, 2))


def test_both_arms_score_the_same_slices(arms):
    one, other = (scored(task) for task in arms.values())
    assert torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)
    assert len(one) == len(arms["by slice"].samples("val")) // 2


def test_both_arms_train_on_as_many_slices(arms):
    one, other = (task.samples("labelled") for task in arms.values())
    assert len(one) == len(other) == 4 * 8
    assert not (one.labels == IGNORE).any() and not (other.labels == IGNORE).any()


def test_by_patient_trains_on_no_slice_of_a_held_out_patient(arms):
    task = arms["by patient"]
    assert not slices(task.samples("labelled")) & slices(task.samples("val"))


def test_by_slice_trains_on_held_out_patients_but_on_no_slice_that_is_scored(arms):
    task = arms["by slice"]
    trained, held_out = slices(task.samples("labelled")), slices(task.samples("val"))
    assert len(trained & held_out) >= 8
    assert not trained & slices(scored(task))
    assert trained - held_out  # and on others


def test_the_arms_differ_in_nothing_else(arms):
    assert {name: replace(task, leak=False) for name, task in arms.items()} == dict.fromkeys(arms, TASK)
    assert recipe.arms["by slice"].method == recipe.arms["by patient"].method
