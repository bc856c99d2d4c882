"""OpenKBP's sparse CSV: flat indices (C order) of a cube of 128 voxels a side, with or without values."""

from pathlib import Path

import numpy as np
import pandas as pd

from medcook.data.readers.damage import readable
from medcook.errors import MedcookError

SHAPE = (128, 128, 128)


def read_sparse(path: Path) -> np.ndarray:
    """The (128, 128, 128) array of one file: float32 values, or a bool mask where the file holds indices only."""
    with readable(path, "sparse CSV", "Fetch it again."):
        table = pd.read_csv(path, index_col=0)
        index = table.index.to_numpy(np.int64)
        values = table["data"].to_numpy(np.float32)
    if index.size and (index.min() < 0 or index.max() >= np.prod(SHAPE)):
        raise MedcookError(f"{path}: an index lies outside 128 x 128 x 128.", "Fetch it again.")
    mask_only = bool(np.isnan(values).all())
    dense = np.zeros(np.prod(SHAPE), bool if mask_only else np.float32)
    dense[index] = True if mask_only else values
    return dense.reshape(SHAPE)


def read_voxel_size(path: Path) -> tuple[float, float, float]:
    """The three voxel sizes in mm of a voxel_dimensions.csv."""
    with readable(path, "file of three numbers", "Fetch it again."):
        x, y, z = np.loadtxt(path, dtype=float, ndmin=1)
    return float(x), float(y), float(z)
