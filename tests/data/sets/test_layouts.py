"""Readers of published layouts, on tiny fixtures in that layout: the decathlon's tasks and KiTS21."""

import json

import nibabel
import numpy as np
import pytest

from medcook.data.datasets import open_dataset
from medcook.errors import MedcookError

SPACING = (0.5, 0.5, 3.0)
SHAPE = (6, 5, 4)


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, np.diag([*SPACING, 1])), path)


def box(value: int, size: int) -> np.ndarray:
    array = np.zeros(SHAPE, np.uint8)
    array[:size, :size] = value
    return array


@pytest.fixture
def mirror_of(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDCOOK_MIRROR", str(tmp_path))
    return tmp_path


@pytest.fixture
def brain_tumour(mirror_of):
    """Task01 in the official layout: four channels on the last axis, several patients, one test image."""
    folder = mirror_of / "msd" / "Task01_BrainTumour"
    names = [f"BRATS_{n:03d}" for n in range(1, 8)]
    for number, name in enumerate(names):
        save(folder / "imagesTr" / f"{name}.nii.gz", np.full((*SHAPE, 4), number, np.float32) + np.arange(4))
        save(folder / "labelsTr" / f"{name}.nii.gz", box(3, 2))
    save(folder / "imagesTs" / "BRATS_900.nii.gz", np.zeros((*SHAPE, 4), np.float32))
    training = [{"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"} for n in names]
    content = {"training": training, "test": ["./imagesTs/BRATS_900.nii.gz"]}
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


def test_decathlon_task_in_the_official_layout(brain_tumour):
    dataset = open_dataset("msd/Task01_BrainTumour")
    assert list(dataset.index()) == [f"BRATS_{n:03d}" for n in range(1, 8)], "images without label are no cases"
    case = dataset.load(dataset.split.train[0])
    assert case.image.shape == (4, *SHAPE) and case.label.shape == SHAPE
    assert np.array_equal(np.diff(case.image[:, 0, 0, 0]), [1, 1, 1]), "channels come first"
    assert case.spacing == SPACING and case.attributes["orientation"] == "RAS"
    with pytest.raises(MedcookError, match="test case"):
        dataset.load(dataset.split.test[0])


def test_decathlon_label_outside_the_manifest(brain_tumour):
    dataset = open_dataset("msd/Task01_BrainTumour")
    name = dataset.split.train[0]
    save(brain_tumour / "labelsTr" / f"{name}.nii.gz", box(9, 2))
    with pytest.raises(MedcookError, match=f"case {name}: label value 9"):
        dataset.load(name)


@pytest.fixture
def kits(mirror_of):
    """One case in the layout of the official repository; the third annotator did not draw the tumour."""
    folder = mirror_of / "kits21" / "data"
    case_id = open_dataset("kits21").split.train[0]
    case = folder / case_id
    save(case / "imaging.nii.gz", np.full(SHAPE, -50, np.int16))
    save(case / "aggregated_MAJ_seg.nii.gz", box(1, 4))
    for annotator, size in [(1, 4), (2, 5), (3, 4)]:
        save(case / "segmentations" / f"kidney_instance-1_annotation-{annotator}.nii.gz", box(1, size))
    for annotator, size in [(1, 2), (2, 3)]:
        save(case / "segmentations" / f"tumor_instance-1_annotation-{annotator}.nii.gz", box(1, size))
    row = {"case_id": case_id, "gender": "female", "age_at_nephrectomy": 61}
    (folder / "kits.json").write_text(json.dumps([row]))
    return case_id


def test_kits21_keeps_all_three_annotators(kits):
    case = open_dataset("kits21").load(kits)
    assert case.raters.shape == (3, *SHAPE) and case.image.dtype == np.float32
    assert [int((rater == 2).sum()) for rater in case.raters] == [16, 36, 16], "the tumour lies upon the kidney"
    assert [int((rater > 0).sum()) for rater in case.raters] == [64, 100, 64]
    assert case.attributes["filled"] == {3: ["tumor_instance-1"]}
    assert (case.attributes["sex"], case.attributes["age"]) == ("F", 61)
    assert case.spacing == SPACING


def test_kits21_annotation_of_another_shape_is_named(kits, mirror_of):
    path = mirror_of / "kits21" / "data" / kits / "segmentations" / "kidney_instance-1_annotation-2.nii.gz"
    save(path, np.zeros((2, 2, 2), np.uint8))
    with pytest.raises(MedcookError, match="kidney_instance-1_annotation-2.nii.gz: its shape"):
        open_dataset("kits21").load(kits)
