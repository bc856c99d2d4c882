"""The reader of Harvard-FairSeg, on tiny files in the published layout."""

import numpy as np
import pytest

from medcook.data.datasets import open_dataset
from medcook.errors import MedcookError

KNOWN = {"age": 61.39, "gender": 0, "race": 1, "ethnicity": 0, "language": 2, "maritalstatus": 3}


def eye() -> dict:
    """A disc of 4 x 4 with a cup of 2 x 2, as published: -1 and -2."""
    mask = np.zeros((8, 6))
    mask[2:6, 1:5] = -1
    mask[3:5, 2:4] = -2
    return {"slo_fundus": np.arange(48, dtype=np.uint8).reshape(8, 6), "disc_cup_mask": mask} | KNOWN


@pytest.fixture
def write(tmp_path, monkeypatch):
    """write(folder, **changes): the file of a training patient, whose id it gives."""
    monkeypatch.setenv("MEDCOOK_MIRROR", str(tmp_path))
    case_id = open_dataset("fairseg").split.train[0]

    def save(folder: str = "Training", **changes) -> str:
        path = tmp_path / "fairseg" / folder / f"{case_id}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {name: value for name, value in (eye() | changes).items() if value is not None}
        np.savez(path, **content)
        return case_id

    return save


@pytest.mark.parametrize("folder", ["Training", "Test", "All", ""])
def test_fairseg_in_the_published_layout(write, folder):
    case = open_dataset("fairseg").load(write(folder))
    assert case.image.shape == (1, 8, 6) and case.image.dtype == np.float32 and case.image.max() == 47
    assert [int((case.label == value).sum()) for value in (1, 2)] == [12, 4], "rim, cup"
    assert case.attributes == {
        "age": pytest.approx(61.39),
        "sex": "F",
        "race": "Black",
        "ethnicity": "non-Hispanic",
        "language": "other",
        "marital status": "widowed",
    }


def test_fairseg_unknown_attributes_are_none(write):
    case_id = write(ethnicity=-1, maritalstatus=-1)
    attributes = open_dataset("fairseg").attributes(case_id)
    assert attributes["ethnicity"] is attributes["marital status"] is None and attributes["race"] == "Black"


def test_fairseg_has_ten_thousand_patients_in_a_fixed_split():
    dataset = open_dataset("fairseg")
    index = dataset.index()
    assert len(index) == dataset.manifest.facts.patients == 10_000
    assert (next(iter(index)), list(index)[-1]) == ("data_00001", "data_10000")
    assert [len(part) for part in (dataset.split.train, dataset.split.val, dataset.split.test)] == [7000, 1500, 1500]


def test_fairseg_files_with_objects_or_without_a_mask_are_refused(write):
    with pytest.raises(MedcookError, match="not a readable .npz"):
        open_dataset("fairseg").load(write(slo_fundus=np.array([print], dtype=object)))
    with pytest.raises(MedcookError, match="disc_cup_mask"):
        open_dataset("fairseg").load(write(disc_cup_mask=None))
    with pytest.raises(MedcookError, match="other values than 0, -1 and -2"):
        open_dataset("fairseg").load(write(disc_cup_mask=np.full((8, 6), 0.5)))
    with pytest.raises(MedcookError, match="label value 3"):
        open_dataset("fairseg").load(write(disc_cup_mask=np.full((8, 6), -3.0)))


def test_fairseg_that_is_not_here_says_where_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDCOOK_MIRROR", str(tmp_path))
    dataset = open_dataset("fairseg")
    with pytest.raises(MedcookError, match="ophai.hms.harvard.edu"):
        dataset.load(dataset.split.train[0])
