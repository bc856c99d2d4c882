"""What readers of many data sets share: tables of texts, CTs, files that nobody can fetch, who is held out."""

import nibabel
import numpy as np
import pytest

from medcook.data import open_dataset
from medcook.data.readers.nifti import read_ct
from medcook.data.readers.tables import read_table
from medcook.data.splits import held_out
from medcook.errors import MedcookError


@pytest.mark.parametrize(("name", "separator"), [("a.csv", ","), ("a.txt", "\t")])
def test_a_table_has_the_columns_that_were_asked_for_by_their_new_names(tmp_path, name, separator):
    rows = [("id", "age", "more"), ("007", "", "x"), ("010", "5Y", "y")]
    path = tmp_path / name
    path.write_text("\ufeff" + "\n".join(separator.join(row) for row in rows), encoding="utf-8")
    found = read_table(path, {"age": "years", "id": "id"}, "Get it again.")
    assert found.to_dict("list") == {"years": ["", "5Y"], "id": ["007", "010"]}, "texts stay texts"
    with pytest.raises(MedcookError, match=rf"{name}: no column 'sex'. Get it again."):
        read_table(path, {"sex": "sex"}, "Get it again.")


def test_one_in_so_many_is_held_out_whatever_the_order():
    patients = [f"p{number}" for number in range(43)]
    rest, held = held_out(patients, 10)
    assert len(held) == 4 and sorted(rest + held) == sorted(patients) and [*rest] == [p for p in patients if p in rest]
    assert set(held_out(patients[::-1], 10)[1]) == set(held)


def test_a_ct_has_three_axes_and_a_spacing(tmp_path):
    def write(name: str, shape: tuple[int, ...], affine: np.ndarray):
        nibabel.save(nibabel.Nifti1Image(np.ones(shape, np.int16), affine), tmp_path / name)
        return tmp_path / name

    found = read_ct(write("good.nii.gz", (4, 3, 2), np.diag([2.0, 1.0, 5.0, 1.0])))
    assert found.array.dtype == np.float32 and found.spacing == (2, 1, 5)
    with pytest.raises(MedcookError, match="not of three axes"):
        read_ct(write("four.nii.gz", (4, 3, 2, 2), np.eye(4)))


def test_a_file_that_cannot_be_fetched_says_where_it_is(monkeypatch, tmp_path):
    monkeypatch.setenv("MEDCOOK_CACHE", str(tmp_path))
    monkeypatch.delenv("MEDCOOK_MIRROR", raising=False)
    data = open_dataset("paxray")
    with pytest.raises(MedcookError, match=r"paxray: the file images/a.png is missing. Get it from https://constant"):
        data.stored("images/a.png")
    with pytest.raises(MedcookError, match="Get it from another place; put it into"):
        data.stored("images/a.png", "another place")
