"""Several sets as one, asked by name, see medcook/recipes/language/_settings.py."""

import numpy as np
import pytest
import torch

from medcook.language import words_of
from medcook.recipes.language import _settings as settings
from medcook.recipes.language._settings import BRAIN, NAMED, NAMED_QUICK, NAMES, SETS, ToldOfNames, named_rows
from medcook.tasks import Budget
from medcook.training import fit


def test_every_label_value_is_asked_for_by_its_own_name():
    structures = NAMED.structures
    assert sorted(structures) == list(range(1, len(NAMES) + 1)) and len(SETS) == len(NAMES)
    for value, name in structures.items():
        assert set(words_of(name)) <= set(words_of(NAMES[value - 1])), f"{value}: {name}"


def test_every_name_is_of_the_set_that_its_value_is_from():
    data = NAMED.data
    for number, (name, own) in enumerate(data.sets.items()):
        values = [data.offsets[name] + value for value in own.manifest.structures]
        assert {SETS[value - 1] for value in values} == {number}


def test_a_specialist_trains_on_its_own_set_alone():
    parts = (("hippocampus", 2, 1, 1),)
    both = settings.NamedTask("acdc", counts=(2, 1, 1), parts=parts)
    second = settings.NamedTask("acdc", counts=(2, 1, 1), parts=parts, only=(1,))
    assert len(both.labelled_patients) == 4 and len(second.labelled_patients) == 2
    assert all(patient.startswith("hippocampus:") for patient in second.labelled_patients)


def test_all_structures_of_a_case_are_asked_for_and_scored_on_its_own_grid():
    fitted = fit(ToldOfNames(language=BRAIN, channels=(8, 16)), NAMED_QUICK, Budget(4, 4, "float32", 0), cache=False)
    case = next(NAMED_QUICK.cases("val"))
    rows = named_rows(fitted, case)
    assert [row["structure"] for row in rows] == list(NAMED_QUICK.structures.values())
    masks = settings.asked_for(fitted, case, (1, 2, 3))
    assert all(mask.shape == case.label.shape and mask.dtype == torch.bool for mask in masks.values())
    found = masks[2].numpy()
    expected = 2 * (found & (case.label == 2)).sum() / max(1, found.sum() + (case.label == 2).sum())
    assert rows[1]["dice"] == pytest.approx(expected) and np.isfinite(rows[0]["dice"])
