"""The reader of AeroPath, on tiny files in the published layout."""

import nibabel
import numpy as np
import pytest

from medcook.data.datasets import open_dataset
from medcook.data.manifests import load_manifest
from medcook.data.splits import open_test
from medcook.errors import MedcookError

SHAPE = (8, 9, 10)
SPACING = (0.7, 0.7, 0.5)
AFFINE = np.diag([-0.7, -0.7, 0.5, 1])  # left, posterior, superior, as stored


def lungs() -> np.ndarray:
    """Two lungs, and between them nothing."""
    mask = np.zeros(SHAPE, np.uint8)
    mask[1:3, 2:7, 1:8] = mask[5:7, 2:7, 1:8] = 1
    return mask


def airways() -> np.ndarray:
    """A trachea between the lungs, and a bronchus that ends in one of them."""
    mask = np.zeros(SHAPE, np.uint8)
    mask[4, 4, 3:] = mask[1:5, 4, 3] = 1
    return mask


def save(path, array, affine=AFFINE):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, affine), path)


@pytest.fixture
def write(tmp_path, monkeypatch):
    """write(patient, top, second=value of the masks): the three files of a patient; their folder."""
    monkeypatch.setenv("MEDCOOK_MIRROR", str(tmp_path))
    monkeypatch.setenv("MEDCOOK_CACHE", str(tmp_path / "cache"))

    def files(patient="3", top="", second=1):
        folder = tmp_path / "aeropath" / top / patient
        save(folder / f"{patient}_CT_HR.nii.gz", np.arange(720, dtype=np.int32).reshape(SHAPE) - 1024)
        save(folder / f"{patient}_CT_HR_label_lungs.nii.gz", lungs() * np.uint8(second))
        save(folder / f"{patient}_CT_HR_label_airways.nii.gz", airways() * np.uint8(second))
        return folder

    return files


def opened(patient: str = "3"):
    """A case, whatever part it is in."""
    with open_test("unit test"):
        return open_dataset("aeropath").load(patient)


@pytest.mark.parametrize("top", ["", "AeroPath", "data"])
@pytest.mark.parametrize("second", [1, 255])
def test_aeropath_reads_ct_lungs_and_airways(write, top, second):
    write(top=top, second=second)
    case = opened()
    assert case.image.shape == (1, *SHAPE) and case.image.dtype == np.float32
    assert (case.image.min(), case.image.max()) == (-1024, -305), "Hounsfield units, as stored"
    assert np.allclose(case.spacing, SPACING) and case.attributes == {"orientation": "LPS"}
    assert np.array_equal(case.extras["lungs"], lungs() > 0) and np.array_equal(case.extras["airways"], airways() > 0)
    assert case.patient_id == "3"


def test_aeropath_airways_within_the_lungs_are_airways(write):
    write()
    case = opened()
    both = (lungs() & airways()) > 0
    assert both.sum() == 2 and (case.label[both] == 2).all()
    assert np.array_equal(case.label == 2, airways() > 0) and np.array_equal(case.label == 1, (lungs() > 0) & ~both)


def test_aeropath_split_is_by_patients(write):
    data = open_dataset("aeropath")
    assert list(data.index()) == [str(number) for number in range(1, 28)] == list(data.patients)
    assert (len(data.split.train), len(data.split.val), len(data.split.test)) == (19, 4, 4)
    write(data.split.test[0])
    with pytest.raises(MedcookError, match="is a test case"):
        data.load(data.split.test[0])


def more(mask: np.ndarray, value: float) -> np.ndarray:
    """The mask with another value in one more voxel."""
    found = mask.astype(np.float32)
    found[0, 0, 0] = value
    return found


@pytest.mark.parametrize(
    ("array", "affine", "message"),
    [
        (lungs()[:-1], AFFINE, r"a mask of \(7, 9, 10\), the CT is of \(8, 9, 10\)"),
        (lungs()[..., None], AFFINE, "a mask of"),
        (lungs(), np.diag([-0.7, -0.7, 0.6, 1]), "mask and CT lie up to 0.9 mm apart"),
        (lungs(), np.diag([0.7, -0.7, 0.5, 1]), "mask and CT lie up to 9.8 mm apart"),
        (more(lungs(), 2), AFFINE, "not a readable mask .it holds more than 0 and 2"),
        (more(lungs(), 0.5), AFFINE, "it holds more than 0 and 1"),
        (more(lungs(), -1), AFFINE, "it holds more than 0 and 1"),
        (more(lungs(), np.nan), AFFINE, "it holds more than 0 and nan"),
        (lungs() * 0, AFFINE, "nothing is drawn"),
    ],
)
@pytest.mark.parametrize("name", ["lungs", "airways"])
def test_aeropath_masks_that_do_not_fit_are_named(write, array, affine, message, name):
    path = write() / f"3_CT_HR_label_{name}.nii.gz"
    save(path, array, affine)
    with pytest.raises(MedcookError, match=message) as caught:
        opened()
    assert caught.value.problem.startswith(f"{path}: ")


def test_aeropath_header_may_differ_by_less_than_half_a_voxel(write):
    path = write() / "3_CT_HR_label_lungs.nii.gz"
    moved = AFFINE.copy()
    moved[2, 3] = 0.2
    save(path, lungs(), moved)
    assert np.array_equal(opened().extras["lungs"], lungs() > 0)
    moved[2, 3] = 0.3
    save(path, lungs(), moved)
    with pytest.raises(MedcookError, match="0.3 mm apart"):
        opened()


@pytest.mark.parametrize("ending", ["", "_label_lungs", "_label_airways"])
def test_aeropath_damaged_or_missing_files_are_named(write, ending):
    path = write() / f"3_CT_HR{ending}.nii.gz"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(MedcookError, match=f"3_CT_HR{ending}.nii.gz: not a readable"):
        opened()
    path.unlink()
    with pytest.raises(MedcookError, match=f"3/3_CT_HR{ending}.nii.gz is missing. Get it from https://zenodo.org"):
        opened()


def test_aeropath_ct_without_three_axes_is_named(write):
    path = write() / "3_CT_HR.nii.gz"
    save(path, np.zeros((*SHAPE, 2), np.int16))
    with pytest.raises(MedcookError, match=r"3_CT_HR.nii.gz: not a readable CT .its shape"):
        opened()


def test_aeropath_has_no_other_patients(write):
    with pytest.raises(MedcookError, match="aeropath has no case '../3'"):
        open_dataset("aeropath").load("../3")


def test_aeropath_that_is_not_here_says_where_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDCOOK_MIRROR", str(tmp_path))
    monkeypatch.setenv("MEDCOOK_CACHE", str(tmp_path / "cache"))
    with pytest.raises(MedcookError, match="zenodo.org/records/10069289"):
        open_dataset("aeropath").fetch()


def test_aeropath_facts_are_those_published():
    manifest = load_manifest("aeropath")
    assert (manifest.facts.patients, manifest.facts.cases) == (27, 27)
    assert manifest.classes == {0: "background", 1: "lungs", 2: "airways"}
