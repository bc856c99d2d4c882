"""The reader of TotalSegmentator, on a tiny subject in the published layout."""

import nibabel
import numpy as np
import pytest

from medcook.data.datasets import open_dataset
from medcook.errors import MedcookError

SHAPE, SPACING = (5, 4, 3), (1.5, 1.5, 1.5)
META = """\ufeffimage_id;age;gender;institute;study_type;split
s0000;60;m;A;ct pelvis;train
s0001;;;;;val
s0002;71;f;B;ct thorax;test
"""


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, np.diag([*SPACING, 1])), path)


def mask(stop: int) -> np.ndarray:
    array = np.zeros(SHAPE, np.uint8)
    array[:stop] = 1
    return array


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """s0000: a liver, and a stomach that overlaps with it; every other mask is empty."""
    monkeypatch.setenv("MEDCOOK_MIRROR", str(tmp_path))
    root = tmp_path / "totalsegmentator"
    save(root / "s0000" / "ct.nii.gz", np.full(SHAPE, 40, np.int16))
    for name in open_dataset("totalsegmentator").manifest.structures.values():
        size = {"liver": 4, "stomach": 2}.get(name, 0)
        save(root / "s0000" / "segmentations" / f"{name}.nii.gz", mask(size))
    (root / "meta.csv").write_text(META, encoding="utf-8")
    return root


def test_totalsegmentator_in_the_published_layout(folder):
    case = open_dataset("totalsegmentator").load("s0000")
    assert case.image.shape == (1, *SHAPE) and case.image.dtype == np.float32 and case.image.max() == 40
    assert case.label[:, 0, 0].tolist() == [6, 6, 5, 5, 0], "the stomach, 6, is painted over the liver, 5"
    assert case.spacing == SPACING and case.attributes["orientation"] == "RAS"
    known = {name: case.attributes[name] for name in ("age", "sex", "institute", "study type")}
    assert known == {"age": 60, "sex": "M", "institute": "A", "study type": "ct pelvis"}


def test_totalsegmentator_has_the_authors_split_and_closes_its_test_cases(folder):
    dataset = open_dataset("totalsegmentator")
    assert (dataset.split.train, dataset.split.val, dataset.split.test) == (("s0000",), ("s0001",), ("s0002",))
    assert list(dataset.index()) == ["s0000", "s0001", "s0002"]
    assert set(dataset.attributes("s0001").values()) == {None} and dataset.attributes("s0002")["sex"] == "F"
    with pytest.raises(MedcookError, match="s0002 of totalsegmentator is a test case"):
        dataset.load("s0002")


def test_totalsegmentator_has_a_hundred_and_four_structures():
    manifest = open_dataset("totalsegmentator").manifest
    assert len(set(manifest.structures.values())) == 104 and manifest.facts.cases == 1204
    assert [manifest.classes[value] for value in (1, 44, 93, 104)] == [
        "spleen",
        "heart_myocardium",
        "face",
        "urinary_bladder",
    ]


def test_totalsegmentator_masks_that_are_missing_or_broken_are_named(folder):
    path = folder / "s0000" / "segmentations" / "heart_atrium_left.nii.gz"
    path.write_bytes(b"")
    with pytest.raises(MedcookError, match="heart_atrium_left.nii.gz"):
        open_dataset("totalsegmentator").load("s0000")
    save(path, np.zeros((2, 2, 2), np.uint8))
    with pytest.raises(MedcookError, match=r"heart_atrium_left.nii.gz: its shape \(2, 2, 2\)"):
        open_dataset("totalsegmentator").load("s0000")
    path.unlink()
    with pytest.raises(MedcookError, match=r"1 masks are missing, heart_atrium_left.nii.gz is the first"):
        open_dataset("totalsegmentator").load("s0000")


def test_totalsegmentator_that_is_not_here_says_where_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDCOOK_MIRROR", str(tmp_path))
    with pytest.raises(MedcookError, match=r"zenodo.org/records/6802614"):
        open_dataset("totalsegmentator").index()
