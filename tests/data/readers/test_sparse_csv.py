"""OpenKBP's sparse CSV: C order, masks and values, bad indices."""

import numpy as np
import pytest

from medcook.data.readers.sparse_csv import read_sparse, read_voxel_size
from medcook.errors import MedcookError


def test_flat_index_is_in_c_order(tmp_path):
    (tmp_path / "ct.csv").write_text(f",data\n{3 * 128 * 128 + 2 * 128 + 1},1025.0\n0,7.0\n")
    dense = read_sparse(tmp_path / "ct.csv")
    assert dense.shape == (128, 128, 128) and dense.dtype == np.float32
    assert dense[3, 2, 1] == 1025 and dense[0, 0, 0] == 7 and np.count_nonzero(dense) == 2


def test_indices_without_values_are_a_mask(tmp_path):
    (tmp_path / "Larynx.csv").write_text(",data\n5,\n130,\n")
    mask = read_sparse(tmp_path / "Larynx.csv")
    assert mask.dtype == bool and mask[0, 0, 5] and mask[0, 1, 2] and mask.sum() == 2


@pytest.mark.parametrize("text", ["", "nothing\n", ",data\nx,1\n", f",data\n{128**3},1\n", ",data\n-1,1\n"])
def test_damaged_file_is_named(tmp_path, text):
    (tmp_path / "bad.csv").write_text(text)
    with pytest.raises(MedcookError, match="bad.csv"):
        read_sparse(tmp_path / "bad.csv")


def test_voxel_size(tmp_path):
    (tmp_path / "v.csv").write_text("4.5\n4.5\n3\n")
    assert read_voxel_size(tmp_path / "v.csv") == (4.5, 4.5, 3.0)
    (tmp_path / "v.csv").write_text("4.5\n")
    with pytest.raises(MedcookError, match="v.csv: not a readable file of three numbers"):
        read_voxel_size(tmp_path / "v.csv")
