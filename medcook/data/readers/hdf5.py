"""HDF5 whose checksum was verified; files that a user brings go through `medcook.data.safe` instead."""

from pathlib import Path

import h5py
import numpy as np

from medcook.errors import MedcookError


def read_hdf5(path: Path, keys: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The named arrays of one file; MedcookError when it is damaged or lacks one of them."""
    try:
        with h5py.File(path, "r") as stored:
            return {key: stored[key][()] for key in keys}
    except KeyError as error:
        raise MedcookError(f"{path}: {error.args[0]}.", f"It needs the arrays {', '.join(keys)}.") from error
    except (OSError, RuntimeError) as error:
        raise MedcookError(
            f"{path}: not a readable HDF5 file ({error}).", "It may be truncated: fetch it again."
        ) from error
