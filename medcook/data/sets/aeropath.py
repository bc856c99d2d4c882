"""AeroPath: chest CT of 27 patients with diseases that bend and block airways, with masks of airways and lungs."""

from itertools import product
from pathlib import Path

import numpy as np

from medcook.data import fetch
from medcook.data.case import Case
from medcook.data.datasets import Dataset
from medcook.data.readers.damage import readable
from medcook.data.readers.nifti import Volume, read_ct, read_nifti
from medcook.errors import MedcookError

PATIENTS = tuple(str(number) for number in range(1, 28))
TOPS = ("", "AeroPath/", "data/")  # the archive's folder, and that of the copy on Hugging Face
LUNGS, AIRWAYS = 1, 2


class AeroPath(Dataset):
    """A case is one CT: image (1, X, Y, Z) in HU, as stored; label (X, Y, Z), 1 lungs, 2 airways, also within lungs.

    attributes: orientation
    extras: lungs and airways, each (X, Y, Z) bool, which overlap
    """

    def index(self) -> dict[str, str]:
        return {patient: patient for patient in PATIENTS}

    def _file(self, case_id: str, ending: str = "") -> Path:
        name = f"{case_id}/{case_id}_CT_HR{ending}.nii.gz"
        places = (fetch.local(self.manifest.name, top + name) for top in TOPS)
        return next(filter(None, places), None) or self.stored(name)

    def read(self, case_id: str) -> Case:
        image = read_ct(self._file(case_id))
        masks = {name: read_mask(self._file(case_id, f"_label_{name}"), image) for name in ("lungs", "airways")}
        label = np.where(masks["lungs"], np.uint8(LUNGS), np.uint8(0))
        label[masks["airways"]] = AIRWAYS
        return Case(
            image=image.array[None],
            label=label,
            case_id=case_id,
            patient_id=case_id,
            spacing=image.spacing,
            attributes={"orientation": image.orientation},
            extras=masks,
        )


def read_mask(path: Path, image: Volume) -> np.ndarray:
    """A mask (X, Y, Z) bool on the voxels of its CT; it holds 0 and one other number, and is not empty."""
    hint = "Get CT and masks of the patient again."
    volume = read_nifti(path)
    stored = volume.array
    if stored.shape != image.array.shape:
        raise MedcookError(f"{path}: a mask of {stored.shape}, the CT is of {image.array.shape}.", hint)
    if (off := apart(volume, image)) > min(image.spacing) / 2:
        raise MedcookError(f"{path}: by their headers mask and CT lie up to {off:.1f} mm apart.", hint)
    with readable(path, "mask", hint):
        mask, value = stored > 0, stored.max()
        if not np.array_equal(stored, mask * value):
            raise ValueError(f"it holds more than 0 and {value}")
        if not value:
            raise ValueError("nothing is drawn")
    return mask


def apart(one: Volume, other: Volume) -> float:
    """How far the corners of two volumes of one shape lie apart, in mm: the largest of the eight distances; infinite
    where a header is broken."""
    corners = np.array([(*corner, 1) for corner in product(*((0, size - 1) for size in other.array.shape))])
    off = np.linalg.norm((corners @ (one.affine - other.affine).T)[:, :3], axis=1).max()
    return float(off) if np.isfinite(off) else np.inf
