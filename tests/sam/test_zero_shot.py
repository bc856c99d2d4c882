"""The protocol: which targets a case has, and that every method is asked in the same way."""

import numpy as np
import pytest

from medcook.data import Case, open_dataset
from medcook.sam import zero_shot
from medcook.sam.prompts import Prompt


def volume(label: np.ndarray, **attributes) -> Case:
    return Case(label[None].astype(np.float32), label, "c", "p", attributes=attributes)


def test_a_volume_gives_slices_spread_over_the_structure():
    label = np.zeros((12, 20, 20), np.uint8)
    for number in range(2, 11):
        label[number, 5:12, 5:12] = 1
        label[number, 0, 0] = number + 10  # a mark
    found = list(zero_shot.targets("acdc", volume(label), {1: "thing"}))
    assert [int(t.image[0, 0]) - 10 for t in found] == [4, 6, 8]
    assert all(t.mask.sum() == 49 and t.structure == "thing" and t.patient == "p" for t in found)


def test_specks_and_what_nobody_annotated_are_no_targets():
    label = np.zeros((3, 20, 20), np.uint8)
    label[1, :2, :2], label[1, 5:15, 5:15] = 1, 2
    names = {1: "speck", 2: "block"}
    assert {t.structure for t in zero_shot.targets("acdc", volume(label), names)} == {"block"}
    assert not list(zero_shot.targets("acdc", volume(label, annotated=(1,)), names))


def test_both_parts_of_the_hippocampus_are_one_target():
    label = np.zeros((20, 20, 5), np.uint8)
    label[5:10, 5:15, 2], label[10:15, 5:15, 2] = 1, 2
    (found,) = zero_shot.targets("hippocampus", volume(label), {1: "anterior", 2: "posterior"})
    assert found.structure == "hippocampus" and found.mask.sum() == 100


def test_ct_is_windowed():
    label = np.zeros((20, 20, 3), np.uint8)
    label[5:15, 5:15, 1] = 1
    case = volume(label)
    case.image[0, 0, 0] = 3000
    (found,) = zero_shot.targets("openkbp", case, {1: "organ"})
    assert found.image.max() <= zero_shot.HOUNSFIELD[1]


def test_every_method_is_asked_from_the_box_and_by_its_own_clicks():
    mask = np.zeros((30, 40), bool)
    mask[10:20, 5:15] = True
    target = zero_shot.Target("set", "p", "block", mask.astype(np.float32), mask)
    asked = {"right": [], "nothing": []}

    def right(image, prompt):
        asked["right"].append(prompt)
        return mask

    def nothing(image, prompt):
        asked["nothing"].append(prompt)
        return mask & False

    found = zero_shot.score({"right": right, "nothing": nothing}, [target])
    table = found.pivot(index="prompt", columns="method", values="dice")
    assert (table["right"] == 1).all() and (table["nothing"] == 0).all() and len(table) == 4
    assert asked["right"][0] == Prompt(box=(5, 10, 15, 20))
    assert len(asked["right"][-1].foreground) == 1 and len(asked["nothing"][-1].foreground) == 5


@pytest.mark.parametrize("dataset", ["embedded"])
def test_a_real_case_has_targets(dataset):
    data = open_dataset(dataset)
    case = next(iter(data.cases(data.split.train[:1])))
    found = list(zero_shot.targets(dataset, case, data.manifest.structures))
    assert {t.structure for t in found} <= set(data.manifest.structures.values()) and len(found) >= 6
    assert all(t.image.shape == t.mask.shape == case.spatial[1:] for t in found)
