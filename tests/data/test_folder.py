"""Bring your own: pairs are found, every problem is told, and what is good can be trained on."""

import re

import h5py
import nibabel
import numpy as np
import pytest
from PIL import Image

from medcook.data.datasets import open_dataset
from medcook.data.folder import find_pairs, inspect_folder, open_folder
from medcook.errors import MedcookError

RNG = np.random.default_rng(0)


def nifti(path, array, spacing=(1, 1, 2)):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, np.diag([*spacing, 1])), path)


def volume():
    return RNG.normal(size=(5, 6, 4)).astype(np.float32)


def disc(value=1):
    label = np.zeros((5, 6, 4), np.uint8)
    label[1:3, 1:3] = value
    return label


@pytest.fixture
def folder(tmp_path):
    """Ten good NIfTI pairs in the decathlon's layout."""
    for number in range(10):
        nifti(tmp_path / "imagesTr" / f"case{number}.nii.gz", volume())
        nifti(tmp_path / "labelsTr" / f"case{number}.nii.gz", disc(number % 2 + 1))
    return tmp_path


def test_good_folder_is_described(folder):
    inspection = inspect_folder(folder)
    assert not inspection.fatal and not inspection.warnings
    assert inspection.label_values == [0, 1, 2]
    assert inspection.balance[0] == pytest.approx(1 - 16 / 120)
    assert inspection.cases[0].shape == (5, 6, 4) and inspection.cases[0].spacing == (1, 1, 2)


def test_good_folder_is_opened_with_a_fixed_split_and_a_door(folder):
    dataset = open_dataset(f"folder:{folder}")
    assert dataset.split == open_folder(folder).split
    assert (len(dataset.split.train), len(dataset.split.val), len(dataset.split.test)) == (6, 2, 2)
    case = dataset.load(dataset.split.train[0])
    assert case.image.shape == (1, 4, 5, 6) and case.spacing == (2, 1, 1)  # slices first
    assert dataset.manifest.facts.label_values == [0, 1, 2]
    with pytest.raises(MedcookError, match="test case"):
        dataset.load(dataset.split.test[0])


def test_hash_follows_the_contents(folder):
    before = open_folder(folder).hash
    assert before == open_folder(folder).hash
    nifti(folder / "imagesTr" / "case3.nii.gz", volume())
    assert open_folder(folder).hash != before


def spoil_nan(folder):
    image = volume()
    image[0, 0, 0] = np.nan
    nifti(folder / "imagesTr" / "case3.nii.gz", image)


FATAL = {
    "case3: the image holds NaN": spoil_nan,
    "case3: image .* and label .* differ in shape": lambda f: nifti(f / "labelsTr" / "case3.nii.gz", disc()[:4]),
    "case3: .*not whole numbers": lambda f: nifti(f / "labelsTr" / "case3.nii.gz", disc() * np.float32(0.5)),
    "case3: .*not a readable NIfTI": lambda f: (f / "imagesTr" / "case3.nii.gz").write_bytes(b"broken"),
}
WARNINGS = {
    "case3: the image is constant": lambda f: nifti(f / "imagesTr" / "case3.nii.gz", volume() * 0),
    "case3: the label is empty": lambda f: nifti(f / "labelsTr" / "case3.nii.gz", disc(0)),
    "case3: .*different affines": lambda f: nifti(f / "labelsTr" / "case3.nii.gz", disc(), (1, 1, 3)),
    "case3.nii.gz: it has no partner": lambda f: (f / "labelsTr" / "case3.nii.gz").unlink(),
    "mixed spacing": lambda f: nifti(f / "imagesTr" / "case3.nii.gz", volume(), (2, 1, 2)),
}


@pytest.mark.parametrize("complaint", FATAL)
def test_problem_that_spoils_training(folder, complaint):
    FATAL[complaint](folder)
    inspection = inspect_folder(folder)
    assert len(inspection.fatal) == 1
    with pytest.raises(MedcookError, match=complaint):
        open_folder(folder)


@pytest.mark.parametrize("complaint", WARNINGS)
def test_problem_that_is_told(folder, complaint):
    WARNINGS[complaint](folder)
    inspection = inspect_folder(folder)
    assert any(re.search(complaint, warning) for warning in inspection.warnings)
    assert not inspection.fatal and open_folder(folder).index()


def test_png_with_suffixes_and_black_and_white_masks(tmp_path):
    for name in ("a", "b", "c"):
        Image.fromarray(RNG.integers(0, 255, (8, 9), dtype=np.uint8)).save(tmp_path / f"{name}.png")
        mask = np.zeros((8, 9), np.uint8)
        mask[2:4] = 255
        Image.fromarray(mask).save(tmp_path / f"{name}_mask.png")
    dataset = open_folder(tmp_path)
    case = dataset.load(dataset.split.train[0])
    assert dataset.manifest.dimensions == 2 and dataset.manifest.facts.label_values == [0, 1]
    assert case.image.shape == (1, 8, 9) and case.spacing is None and set(np.unique(case.label)) == {0, 1}


def test_255_beside_other_classes_is_unlabelled(tmp_path):
    label = disc(2)
    label[0] = 255
    for name in ("a", "b", "c"):
        nifti(tmp_path / "images" / f"{name}.nii.gz", volume())
        nifti(tmp_path / "labels" / f"{name}.nii.gz", label)
    dataset = open_folder(tmp_path)
    case = dataset.load(dataset.split.train[0])
    assert dataset.manifest.classes == {0: "background", 1: "label 2"}
    assert set(np.unique(case.label)) == {0, 1, 255}


def test_hdf5_and_a_truncated_one(tmp_path):
    for name in ("a", "b", "c"):
        with h5py.File(tmp_path / f"{name}.h5", "w") as out:
            out["image"], out["label"] = volume(), disc()
    dataset = open_folder(tmp_path)
    assert dataset.load(dataset.split.train[0]).image.shape == (1, 5, 6, 4)
    (tmp_path / "c.h5").write_bytes((tmp_path / "c.h5").read_bytes()[:1500])
    with pytest.raises(MedcookError, match="c.h5: not a readable HDF5 file"):
        open_folder(tmp_path)


def test_suffixes_of_nnunet_and_hyphens_are_understood(tmp_path):
    for name in ("x_0000.nii.gz", "y-image.nii", "x_seg.nii.gz", "y-label.nii", "z.nii"):
        (tmp_path / name).write_bytes(b"")
    pairs, unpaired = find_pairs(tmp_path)
    assert list(pairs) == ["x", "y"] and [path.name for path in unpaired] == ["z.nii"]


def test_nothing_to_pair_and_no_folder(tmp_path):
    with pytest.raises(MedcookError, match="no image/label pairs"):
        inspect_folder(tmp_path)
    with pytest.raises(MedcookError, match="gone: there is no such folder"):
        open_dataset(f"folder:{tmp_path / 'gone'}")
