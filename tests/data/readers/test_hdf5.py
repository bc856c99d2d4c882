"""HDF5 of the registry: read directly, damage named."""

import h5py
import numpy as np
import pytest

from medcook.data.readers.hdf5 import read_hdf5
from medcook.errors import MedcookError


@pytest.fixture
def stored(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as out:
        out["image"] = np.arange(1000)
    return tmp_path / "a.h5"


def test_named_arrays_come_back(stored):
    assert np.array_equal(read_hdf5(stored, ("image",))["image"], np.arange(1000))


def test_truncated_file_is_named(stored):
    stored.write_bytes(stored.read_bytes()[:2500])
    with pytest.raises(MedcookError, match="a.h5: not a readable HDF5 file"):
        read_hdf5(stored, ("image",))


def test_missing_array_is_named(stored):
    with pytest.raises(MedcookError, match="a.h5: .*label"):
        read_hdf5(stored, ("image", "label"))
