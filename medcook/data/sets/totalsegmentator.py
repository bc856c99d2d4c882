"""TotalSegmentator, version 1: one CT and 104 masks a subject, a table of all subjects and the authors' split."""

import csv
from functools import cached_property

import numpy as np

from medcook.data.case import Case
from medcook.data.datasets import Dataset
from medcook.data.readers.nifti import read_nifti
from medcook.data.splits import Split
from medcook.errors import MedcookError

PARTS = ("train", "val", "test")


class TotalSegmentator(Dataset):
    """A case is one CT: image (1, X, Y, Z) in HU, label 1 to 104.

    attributes: orientation, age and sex (None where unknown), institute, study type
    """

    @cached_property
    def subjects(self) -> dict[str, dict]:
        """{subject: row} of meta.csv."""
        with self.file("meta.csv").open(encoding="utf-8-sig", newline="") as lines:
            return {row["image_id"]: row for row in csv.DictReader(lines, delimiter=";")}

    def index(self) -> dict[str, str]:
        return {subject: subject for subject in self.subjects}

    @cached_property
    def split(self) -> Split:
        """The authors' split, from meta.csv."""
        parts = {part: tuple(name for name, row in self.subjects.items() if row["split"] == part) for part in PARTS}
        return Split(**parts, source="the column `split` of meta.csv")

    def attributes(self, case_id: str) -> dict:
        row = self.subjects[case_id]
        return {
            "age": int(float(row["age"])) if row["age"] else None,
            "sex": {"m": "M", "f": "F"}.get(row["gender"]),
            "institute": row["institute"] or None,
            "study type": row["study_type"] or None,
        }

    def read(self, case_id: str) -> Case:
        path = self.file(f"{case_id}/ct.nii.gz")
        image, folder = read_nifti(path), path.parent / "segmentations"
        masks = {value: folder / f"{name}.nii.gz" for value, name in self.manifest.structures.items()}
        if missing := [mask.name for mask in masks.values() if not mask.is_file()]:
            raise MedcookError(
                f"{folder}: {len(missing)} masks are missing, {missing[0]} is the first.", "Unpack again."
            )
        label = np.zeros(image.array.shape, np.uint8)
        for value, mask in masks.items():
            drawn = read_nifti(mask).array
            if drawn.shape != label.shape:
                raise MedcookError(f"{mask}: its shape {drawn.shape} differs from the image's.", "Unpack again.")
            label[drawn > 0] = value
        return Case(
            image=image.array[None].astype(np.float32),
            label=label,
            case_id=case_id,
            patient_id=case_id,
            spacing=image.spacing,
            attributes=self.attributes(case_id) | {"orientation": image.orientation},
        )
