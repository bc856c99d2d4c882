"""A malformed HDF5 file is a sentence, not a crash."""

import h5py
import numpy as np
import pytest

from medcook.data import safe
from medcook.data.safe import read_hdf5_safely
from medcook.errors import MedcookError


@pytest.fixture
def stored(tmp_path):
    path = tmp_path / "case.h5"
    with h5py.File(path, "w") as out:
        out["image"] = np.arange(4096, dtype=np.float32)
        out["label"] = np.zeros(4096, np.uint8)
        out["text"] = "not numbers"
    return path


def test_arrays_come_back(stored):
    arrays = read_hdf5_safely(stored, ("image", "label"))
    assert np.array_equal(arrays["image"], np.arange(4096)) and arrays["label"].dtype == np.uint8


def test_truncated_file_is_named(stored):
    stored.write_bytes(stored.read_bytes()[:3000])
    with pytest.raises(MedcookError, match="case.h5: not a readable HDF5 file"):
        read_hdf5_safely(stored, ("image",))


def test_missing_array_and_objects_are_refused(stored):
    for key in ("nothing", "text"):
        with pytest.raises(MedcookError, match="case.h5: not a readable HDF5 file"):
            read_hdf5_safely(stored, (key,))


def test_a_file_that_asks_for_more_memory_than_allowed(tmp_path):
    """A small file may claim a huge array; reading it must fail in the child alone."""
    path = tmp_path / "bomb.h5"
    with h5py.File(path, "w") as out:
        out.create_dataset("image", shape=(1 << 38,), dtype=np.float32, chunks=(1 << 20,))
    assert path.stat().st_size < 100_000
    with pytest.raises(MedcookError, match="bomb.h5: not a readable HDF5 file"):
        read_hdf5_safely(path, ("image",), megabytes=2048)


def test_a_crash_of_the_child_is_survived(stored, monkeypatch):
    monkeypatch.setattr(safe.subprocess, "run", crash(safe.subprocess.run))
    with pytest.raises(MedcookError, match="ended with signal 11"):
        read_hdf5_safely(stored, ("image",))


def crash(run):
    return lambda command, **options: run(["/bin/sh", "-c", "kill -SEGV $$"], **options)


def test_endless_reading_is_ended(stored, monkeypatch):
    run = safe.subprocess.run
    monkeypatch.setattr(safe.subprocess, "run", lambda command, **options: run(["sleep", "60"], **options))
    with pytest.raises(MedcookError, match="case.h5: .*took over 0.2 seconds"):
        read_hdf5_safely(stored, ("image",), seconds=0.1)
