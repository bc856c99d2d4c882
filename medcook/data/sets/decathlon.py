"""Medical Segmentation Decathlon: one reader for all ten tasks."""

import json
from functools import cached_property
from pathlib import PurePosixPath

import numpy as np

from medcook.data.case import Case
from medcook.data.datasets import Dataset, as_labels
from medcook.data.readers.damage import readable
from medcook.data.readers.nifti import read_nifti


class Decathlon(Dataset):
    """A case is one volume: image (C, X, Y, Z) as stored, channels first; attributes: orientation, affine.

    The official layout has imagesTr, labelsTr and dataset.json; copies with other folder names say so in the
    manifest's `options` (`images`, `labels`) and list their files in a registry.
    """

    @property
    def folders(self) -> tuple[str, str]:
        options = self.manifest.options
        return options.get("images", "imagesTr"), options.get("labels", "labelsTr")

    @cached_property
    def _cases(self) -> list[str]:
        images, _ = self.folders
        if self.registry:
            return [PurePosixPath(path).name for path in self.registry if path.startswith(f"{images}/")]
        path = self.file("dataset.json")
        with readable(path, "list of training images", "Unpack the task's archive again."):
            pairs = json.loads(path.read_text(encoding="utf-8"))["training"]
            return sorted(PurePosixPath(pair["image"]).name for pair in pairs)

    def index(self) -> dict[str, str]:
        stems = [name.removesuffix(".nii.gz") for name in self._cases]
        return {stem: stem for stem in stems}

    def read(self, case_id: str) -> Case:
        images, labels = self.folders
        image = read_nifti(self.file(f"{images}/{case_id}.nii.gz"))
        label_path = self.file(f"{labels}/{case_id}.nii.gz")
        channels = np.moveaxis(image.array, -1, 0) if image.array.ndim == 4 else image.array[None]
        return Case(
            image=np.ascontiguousarray(channels, dtype=np.float32),
            label=as_labels(read_nifti(label_path).array, label_path),
            case_id=case_id,
            patient_id=case_id,
            spacing=image.spacing[:3],
            attributes={"orientation": image.orientation, "affine": image.affine.tolist()},
        )
