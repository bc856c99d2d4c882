"""HDF5 whose checksum was verified; files that a user brings go through `medcook.data.safe` instead."""

from pathlib import Path

import h5py
import numpy as np

from medcook.data.readers.damage import readable
from medcook.errors import MedcookError


def read_hdf5(path: Path, keys: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The named arrays of one file; MedcookError when it is damaged or lacks one of them."""
    with readable(path, "HDF5 file", "It may be truncated: fetch it again."), h5py.File(path, "r") as stored:
        if missing := [key for key in keys if key not in stored]:
            hint = f"It needs the arrays {', '.join(keys)}."
            raise MedcookError(f"{path}: it holds no {' and no '.join(missing)}.", hint)
        return {key: stored[key][()] for key in keys}
