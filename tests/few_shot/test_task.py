"""The protocol: what training may see, which supports there are, which slice answers which."""

import numpy as np
import pytest
import torch

from medcook.data import IGNORE, Case
from medcook.errors import MedcookError
from medcook.few_shot.task import FewShotTask, chunks, extent, holds, renumber
from medcook.tasks import Samples, Task


@pytest.fixture(scope="module")
def plain():
    return Task("embedded", labelled=4).samples("labelled")


def test_in_setting_1_a_novel_structure_is_background(plain):
    task = FewShotTask("embedded", labelled=4, novel=(1,))
    samples = task.samples("labelled")
    assert torch.equal(samples.images, plain.images)
    assert (samples.labels[plain.labels == 1] == 0).all()
    assert (samples.labels[plain.labels == 2] == 1).all() and (samples.labels[plain.labels == 3] == 2).all()
    assert task.classes == 3 and task.structures == {1: "white matter", 2: "ventricles"}
    assert task.novel_structures == {1: "grey matter"}


def test_in_setting_2_slices_with_a_novel_structure_are_left_out(monkeypatch):
    labels = torch.zeros(5, 4, 4, dtype=torch.uint8)
    labels[[0, 2], 0, 0] = 3
    labels[[2, 3], 1, 1] = 2
    shown = Samples(torch.arange(5.0).view(5, 1, 1, 1), labels, torch.arange(5))
    monkeypatch.setattr("medcook.few_shot.task.prepare", lambda *_: shown)
    samples = FewShotTask("embedded", novel=(3,), setting=2).samples("labelled")
    assert samples.images.flatten().tolist() == [1, 3, 4] == samples.case_of.tolist()
    assert samples.labels.unique().tolist() == [0, 2] and samples.labels[1, 1, 1] == 2


def test_validation_hides_it_too():
    assert FewShotTask("embedded", novel=(2,)).samples("val").labels.unique().tolist() == [0, 1, 2]


def test_what_cannot_be_is_said():
    with pytest.raises(MedcookError, match="every slice shows"):
        FewShotTask("embedded", labelled=2, novel=(1,), setting=2).samples("labelled")
    for novel in ((), (1, 2, 3)):
        with pytest.raises(MedcookError, match="no base or no novel"):
            _ = FewShotTask("embedded", novel=novel).base
    with pytest.raises(MedcookError, match="as many patients"):
        FewShotTask("embedded", labelled=2, novel=(3,), shots=3).support(0, 3)


def test_across_domains_training_sees_the_source_alone():
    task = FewShotTask("chest_xray", source="embedded")
    samples = task.samples("labelled")
    assert task.classes == 4 and task.novel_structures == {1: "lungs"}
    assert torch.equal(samples.labels, Task("embedded").samples("labelled").labels)
    assert task.preparation.size == (128, 128)


def test_volumes_are_seen_as_slices():
    assert FewShotTask("hippocampus", novel=(1,)).preparation.dims == 2


class TestSupport:
    def test_each_chunk_has_its_middle_slice(self):
        task = FewShotTask("embedded", novel=(3,))
        [case] = task.support_cases(0, 3)
        masks = task.preparation.labels(case) == 3
        shown = masks.flatten(1).any(1).nonzero()[:, 0].tolist()
        middles = [part[len(part) // 2] for part in np.array_split(shown, 3)]
        supports = task.support(0, 3)
        assert len(supports) == 3
        for middle, (images, mask) in zip(middles, supports, strict=True):
            assert torch.equal(images, task.preparation.images(case)[[middle]])
            assert torch.equal(mask[0] == 1, masks[middle]) and mask.any()

    def test_shots_are_patients(self):
        task = FewShotTask("embedded", novel=(3,), shots=3)
        assert len({case.patient_id for case in task.support_cases(0, 3)}) == 3
        assert all(images.shape == (3, 1, 96, 96) for images, _ in task.support(0, 3))

    def test_supports_and_draws_share_no_patient(self):
        found = []
        for draw in range(3):
            task = FewShotTask("embedded", novel=(3,), draw=draw, supports=2, shots=2)
            found += [case.patient_id for number in range(2) for case in task.support_cases(number, 3)]
        assert len(set(found)) == len(found) == 12
        assert set(found) <= set(task.data.split.train)

    def test_it_is_the_same_every_time(self):
        first, second = (FewShotTask("embedded", novel=(3,), draw=1).support(1, 3) for _ in range(2))
        assert all(torch.equal(a.images, b.images) for a, b in zip(first, second, strict=True))


def test_chunks_cover_every_slice_once():
    assert chunks(list(range(7)), 3) == [[0, 1, 2], [3, 4], [5, 6]]
    assert chunks([4, 5], 3) == [[4], [4], [5]]
    assert chunks([0], 3) == [[0]] * 3


def test_the_extent_is_from_the_first_to_the_last_slice():
    label = np.zeros((6, 4, 4), dtype=np.uint8)
    label[1, 0, 0] = label[4, 2, 2] = 2
    case = Case(np.zeros((1, 6, 4, 4), dtype=np.float32), label, "a", "a")
    assert extent(case, 2) == [1, 2, 3, 4] and extent(case, 1) == []
    assert extent(Case(np.zeros((1, 4, 4), dtype=np.float32), label[1], "a", "a"), 2) == [0]


def test_labels_are_renumbered():
    labels = torch.tensor([[0, 1, 2, 3, IGNORE]], dtype=torch.uint8)
    assert renumber(labels, (3, 1)).tolist() == [[0, 2, 0, 1, IGNORE]]
    assert holds(labels[None], (2, 7)).tolist() == [True] and holds(labels[None], (7,)).tolist() == [False]
