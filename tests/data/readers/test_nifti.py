"""NIfTI: orientation, spacing and values as stored."""

import nibabel
import numpy as np
import pytest

from medcook.data.readers.nifti import canonical, read_nifti
from medcook.errors import MedcookError


def save(path, array, affine):
    nibabel.save(nibabel.Nifti1Image(array, affine), path)
    return path


def test_array_spacing_and_orientation_are_kept(tmp_path):
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    affine = np.array([[0, -2.0, 0, 5], [0, 0, 3.0, 6], [-1.5, 0, 0, 7], [0, 0, 0, 1]])
    volume = read_nifti(save(tmp_path / "a.nii.gz", array, affine))
    assert np.array_equal(volume.array, array)
    assert volume.spacing == pytest.approx((1.5, 2.0, 3.0))
    assert volume.orientation == "ILA"


def test_canonical_turns_array_and_affine_together(tmp_path):
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    affine = np.array([[0, -2.0, 0, 5], [0, 0, 3.0, 6], [-1.5, 0, 0, 7], [0, 0, 0, 1]])
    stored = read_nifti(save(tmp_path / "a.nii", array, affine))
    turned = canonical(stored)
    assert turned.orientation == "RAS" and turned.spacing == pytest.approx((2.0, 3.0, 1.5))
    for voxel in [(0, 0, 0), (1, 2, 3), (0, 1, 2)]:
        place = stored.affine @ [*voxel, 1]
        there = np.rint(np.linalg.solve(turned.affine, place)[:3]).astype(int)
        assert turned.array[tuple(there)] == stored.array[voxel]


def test_stored_slope_is_applied(tmp_path):
    image = nibabel.Nifti1Image(np.arange(8, dtype=np.int16).reshape(2, 2, 2), np.eye(4))
    image.header.set_slope_inter(2, -1024)
    nibabel.save(image, tmp_path / "a.nii")
    with open(tmp_path / "a.nii", "r+b") as raw:
        header = nibabel.Nifti1Header.from_fileobj(raw)
        header.set_slope_inter(2, -1024)
        raw.seek(0)
        header.write_to(raw)
        raw.seek(352)
        raw.write(np.arange(8, dtype=np.int16).tobytes())
    assert read_nifti(tmp_path / "a.nii").array.ravel(order="F")[3] == 2 * 3 - 1024


@pytest.mark.parametrize("name", ["cut.nii.gz", "noise.nii.gz", "noise.nii"])
def test_damaged_file_is_named(tmp_path, name):
    good = save(tmp_path / "a.nii.gz", np.random.default_rng(0).normal(size=(20, 20, 20)), np.eye(4)).read_bytes()
    (tmp_path / name).write_bytes(good[:2000] if "cut" in name else b"noise" * 200)
    with pytest.raises(MedcookError, match=f"{name}: not a readable NIfTI file"):
        read_nifti(tmp_path / name)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(MedcookError, match="gone.nii"):
        read_nifti(tmp_path / "gone.nii")
