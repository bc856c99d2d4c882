"""NIfTI: the array as stored, its spacing and its orientation."""

from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np

from medcook.data.readers.damage import readable


@dataclass(frozen=True)
class Volume:
    """A NIfTI file: `array` in stored order and scaled units, `affine` (4, 4) from voxel to mm (RAS+)."""

    array: np.ndarray
    affine: np.ndarray

    @property
    def spacing(self) -> tuple[float, ...]:
        """Voxel size in mm per array axis."""
        return tuple(float(size) for size in nibabel.affines.voxel_sizes(self.affine))[: self.array.ndim]

    @property
    def orientation(self) -> str:
        """Where each array axis points, for example RAS: right, anterior, superior."""
        return "".join(nibabel.aff2axcodes(self.affine))


def read_nifti(path: Path) -> Volume:
    """Read one file; MedcookError when it is damaged."""
    with readable(path, "NIfTI file", "Fetch or export it again."):
        image = nibabel.load(path)
        return Volume(np.asanyarray(image.dataobj), image.affine)


def read_ct(path: Path) -> Volume:
    """A CT of three axes with its array in float32; MedcookError where its header has no spacing or directions."""
    volume = read_nifti(path)
    with readable(path, "CT", "Get it again."):
        image = Volume(volume.array.astype(np.float32), volume.affine)
        if image.array.ndim != 3:
            raise ValueError(f"its shape is {image.array.shape}, not of three axes")
        if not np.isfinite(image.affine).all() or not image.orientation or min(image.spacing) <= 0:
            raise ValueError("its header has no spacing or directions")
    return image


def canonical(volume: Volume) -> Volume:
    """The same volume with its axes flipped and swapped to point right, anterior, superior; no resampling."""
    image = nibabel.as_closest_canonical(nibabel.Nifti1Image(volume.array, volume.affine))
    return Volume(np.asanyarray(image.dataobj), image.affine)
