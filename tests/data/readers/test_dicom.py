"""DICOM series, with the files that pydicom itself ships: order, geometry, units, missing slices, privacy."""

import shutil
from pathlib import Path

import numpy as np
import pydicom
import pytest

from medcook.data.readers.dicom import read_series, read_slices
from medcook.errors import MedcookError

SHIPPED = Path(pydicom.__file__).parent / "data" / "test_files" / "dicomdirtests"
CT = SHIPPED / "98892001" / "CT5N"  # five slices, 2.5 mm apart


@pytest.fixture
def series(tmp_path):
    folder = tmp_path / "series"
    shutil.copytree(CT, folder)
    for path in folder.iterdir():
        path.chmod(0o644)
    return folder


def test_slices_are_sorted_by_position_and_in_hounsfield_units(series):
    volume = read_series(series)
    assert volume.array.shape == (5, 16, 16) and volume.array.dtype == np.float32
    assert volume.spacing == pytest.approx((2.5, 0.488281, 0.488281))
    by_height = sorted((pydicom.dcmread(path) for path in series.iterdir()), key=lambda d: d.ImagePositionPatient[2])
    for plane, stored in zip(volume.array, by_height, strict=True):
        assert np.array_equal(plane, stored.pixel_array * stored.RescaleSlope + stored.RescaleIntercept)
    assert volume.array.min() < -500, "air in Hounsfield units"


def test_affine_leads_to_the_stated_places(series):
    volume = read_series(series)
    for path in series.iterdir():
        stored = pydicom.dcmread(path)
        x, y, z = stored.ImagePositionPatient
        number = round((z - (-1.2375)) / 2.5)
        assert volume.affine @ [number, 0, 0, 1] == pytest.approx([-x, -y, z, 1], abs=1e-3)
    assert volume.orientation == "SPL"


def test_missing_slice_is_noticed_between_its_neighbours(series):
    (series / "2693").unlink()
    with pytest.raises(MedcookError, match=r"a slice is missing between 3023 and 2392 \(5.00 mm, usually 2.50 mm\)"):
        read_series(series)


def test_mixed_series_doubled_slices_and_directions_are_refused(series):
    shutil.copy(series / "2693", series / "copy")
    with pytest.raises(MedcookError, match="show the same place"):
        read_series(series)
    shutil.copy(SHIPPED / "77654033" / "CT2" / "17136", series / "copy")
    with pytest.raises(MedcookError, match="mixes 2 series"):
        read_series(series)
    with pytest.raises(MedcookError, match="not parallel"):
        read_series(SHIPPED / "98892003" / "MR700")


def test_other_files_are_passed_over_and_an_empty_folder_is_said(series, tmp_path):
    (series / "notes.txt").write_text("not DICOM")
    assert read_series(series).array.shape == (5, 16, 16)
    (tmp_path / "empty").mkdir()
    with pytest.raises(MedcookError, match="no DICOM slices"):
        read_series(tmp_path / "empty")


def test_patient_names_are_never_read_printed_or_warned_of(series, capsys, recwarn):
    name = str(pydicom.dcmread(series / "2693").PatientName)
    assert name
    assert all("PatientName" not in dataset and "PatientID" not in dataset for dataset in read_slices(series).values())
    (series / "2693").unlink()
    with pytest.raises(MedcookError) as caught:
        read_series(series)
    shown = capsys.readouterr()
    assert name not in shown.out + shown.err + str(caught.value) + "".join(str(w.message) for w in recwarn)


def test_truncated_slice_is_named(series):
    path = series / "2693"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(MedcookError, match="series"):
        read_series(series)
