"""Findings drawn into X-rays, and sentences about them, see medcook/recipes/language/_findings.py."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import ndimage

from medcook import language
from medcook.data import Case
from medcook.recipes.language import _findings as findings
from medcook.recipes.language._findings import FINDINGS, Finding, Spoken, box_iou, box_of, matching, value_of
from medcook.recipes.language._settings import FINDINGS_QUICK


def lungs(side: int = 64) -> np.ndarray:
    found = np.zeros((side, side), bool)
    found[10:52, 8:26] = found[10:52, 38:56] = True
    return found


def test_a_value_is_a_combination_and_there_are_thirty_six():
    assert len(FINDINGS) == 36 and [value_of(finding) for finding in FINDINGS] == list(range(1, 37))


def test_what_is_left_open_means_several():
    assert len(matching(kind="cavity")) == 12 and len(matching(kind="cavity", side="left")) == 6
    assert {FINDINGS[value - 1].side for value in matching(side="right", size="small")} == {"right"}
    assert matching(**FINDINGS[7]._asdict()) == (8,)


def test_the_right_lung_is_on_the_left_of_the_image_and_upper_is_above():
    fields = findings.fields_of(lungs())
    assert sum(field.sum() for field in fields.values()) == lungs().sum()
    assert np.argwhere(fields["right", "upper"]).max(0).tolist() == [23, 25]
    assert np.argwhere(fields["left", "lower"]).min(0).tolist() == [38, 38]


def test_findings_lie_in_the_lung_and_field_that_they_are_called_after():
    rng, fields = np.random.default_rng(0), findings.fields_of(lungs())
    counts = []
    for _ in range(40):
        image, label = findings.drawn(np.zeros((64, 64), np.float32), lungs(), rng)
        values = [value for value in np.unique(label) if value]
        counts.append(len(values))
        for value in values:
            finding, mask = FINDINGS[value - 1], label == value
            middle = np.round(np.argwhere(mask).mean(0)).astype(int)
            assert fields[finding.side, finding.field][max(0, middle[0] - 2) : middle[0] + 3].any()
            assert (finding.side == "right") == (middle[1] < 32)
            assert image[mask].max() > 0.4, "it is seen"
            assert ndimage.label(mask)[1] == 1, "no two of an image are called alike"
    assert max(counts) == findings.MOST and min(counts) >= 1


def test_large_ones_are_larger_and_a_cavity_is_dark_inside():
    rng = np.random.default_rng(0)
    area = {size: np.mean([shape("nodule", size, rng)[1].sum() for _ in range(20)]) for size in findings.SIZES}
    assert area["large"] > 2 * area["small"]
    bright, mask = shape("cavity", "large", rng)
    ring = mask & ~np.roll(mask, 2, 0) | mask & ~np.roll(mask, 2, 1)
    assert bright[32, 32] < 0 < bright[ring].mean() and mask[32, 32]


def shape(kind: str, size: str, rng):
    return findings.shape_of(Finding(kind, size, "left", "upper"), (32, 32), (64, 64), rng)


def test_a_case_is_always_drawn_alike_and_its_versions_differ():
    task = replace(FINDINGS_QUICK, versions=2)
    case = next(task.data.cases(task.val_patients[:1]))
    images, labels = task.preparation.both(case)
    again = task.preparation.images(case), task.preparation.labels(case)
    assert torch.equal(images, again[0]) and torch.equal(labels, again[1])
    assert images.shape == (16, 1, 64, 64) and labels.shape == (16, 64, 64)
    assert not torch.equal(labels[0], labels[1])
    plain = images[0] - images[1]
    outside = (labels[0] == 0) & (labels[1] == 0)
    assert plain[0][outside].abs().median() < 1e-6, "beside the findings both are the same image"


def test_questions_mean_what_they_say():
    torch.manual_seed(0)
    spoken, there = Spoken(), (5, 20, 33)
    one = {many: kind for kind, many in findings.MANY.items()}
    sorts = (findings.KINDS, findings.SIZES, findings.SIDES, findings.FIELDS)
    for _ in range(60):
        question = spoken.ask(there, None, absent=False)
        words = {one.get(word, word) for word in language.words_of(question.sentence)}
        told = [(words & set(known)).pop() for known in sorts if words & set(known)]
        expected = {value for value, finding in enumerate(FINDINGS, 1) if set(told) <= set(finding)}
        assert set(question.values) == expected and expected & set(there)


def test_an_absent_one_is_none_of_those_that_are_there():
    torch.manual_seed(0)
    spoken = Spoken(several=0.0)
    asked = [spoken.ask((1, 2), None, absent=True) for _ in range(50)]
    assert all(len(question.values) == 1 and question.values[0] not in (1, 2) for question in asked)
    everything = tuple(range(1, 37))
    assert spoken.ask(everything, None, absent=True).values[0] in everything, "nothing is absent"


def test_boxes():
    mask = np.zeros((8, 8), bool)
    mask[2:5, 1:3] = True
    assert box_of(mask) == (2, 1, 5, 3) and box_of(mask & False) is None
    assert box_iou((0, 0, 2, 2), (0, 0, 2, 2)) == 1 and box_iou(None, (0, 0, 1, 1)) == 0
    assert box_iou((0, 0, 2, 2), (1, 1, 3, 3)) == pytest.approx(1 / 7)
    assert box_iou((0, 0, 2, 2), (2, 2, 3, 3)) == 0


class Oracle:
    """Answers what a sentence means, or the opposite."""

    language = Spoken()

    def __init__(self, labels: torch.Tensor, right: bool):
        self.labels, self.right, self.number = labels, right, -1

    def answer(self, nets, images, sentences):
        self.number += 1
        label = self.labels[self.number]
        known = {self.language.name(value): (value,) for value in range(1, 37)}
        known |= {self.language.some(kind=kind): matching(kind=kind) for kind in findings.KINDS}
        known |= {self.language.some(side=side): matching(side=side) for side in findings.SIDES}
        masks = [torch.isin(label, torch.tensor(known[sentence], dtype=label.dtype)) for sentence in sentences]
        return (torch.stack(masks)[None] == self.right).float() * 0.8 + 0.1


@pytest.mark.parametrize("right", [True, False])
def test_who_knows_is_right_and_who_says_the_opposite_is_wrong(right):
    task = FINDINGS_QUICK
    case: Case = next(task.data.cases(task.val_patients[:1]))
    nets = torch.nn.ModuleDict()
    method = Oracle(task.preparation.labels(case), right)
    fitted = SimpleNamespace(nets=nets, weights={"last": {}}, method=method, task=task)
    rows = {row["structure"]: row for row in findings.grounding_rows(fitted, case)}
    assert set(rows) == {"one", "several", "absent"}
    for sort in ("one", "several"):
        assert [rows[sort][name] for name in ("dice", "iou", "pointed")] == [float(right)] * 3
        assert rows[sort]["rejected"] == 0
    assert rows["absent"]["rejected"] == float(right) and np.isnan(rows["absent"]["dice"])
    assert rows["one"]["hit"] == float(right)
