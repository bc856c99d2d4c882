"""KiTS21: kidney, tumour and cyst in CT, every structure drawn by three annotators."""

import json
import re
from functools import cached_property
from pathlib import Path

import numpy as np

from medcook.data.case import Case
from medcook.data.datasets import Dataset, as_labels
from medcook.data.readers.nifti import read_nifti
from medcook.errors import MedcookError

CASES = 300
ANNOTATORS = (1, 2, 3)
PAINTED = {"kidney": 1, "cyst": 3, "tumor": 2}  # in this order, the later wins, as in the challenge
INSTANCE = re.compile(r"(kidney|cyst|tumor)_instance-(\d+)_annotation-(\d+)\.nii\.gz")


class Kits21(Dataset):
    """A case is one CT, in the layout of the official repository (data/case_00000/...): image (1, X, Y, Z) in HU.

    label: the majority of the annotators (aggregated_MAJ_seg); raters (3, X, Y, Z): one label map per annotator
    attributes: orientation, sex and age from kits.json, `filled`: {annotator: structures} that this annotator did not
    draw and another's drawing stands for
    """

    def index(self) -> dict[str, str]:
        return {f"case_{number:05d}": f"case_{number:05d}" for number in range(CASES)}

    @cached_property
    def clinical(self) -> dict[str, dict]:
        """{case_id: row} of data/kits.json."""
        rows = json.loads(self.file("data/kits.json").read_text(encoding="utf-8"))
        return {row["case_id"]: row for row in rows}

    def attributes(self, case_id: str) -> dict:
        row = self.clinical.get(case_id, {})
        return {"sex": {"male": "M", "female": "F"}.get(row.get("gender")), "age": row.get("age_at_nephrectomy")}

    def read(self, case_id: str) -> Case:
        folder = f"data/{case_id}"
        path = self.file(f"{folder}/imaging.nii.gz")
        image = read_nifti(path)
        label_path = self.file(f"{folder}/aggregated_MAJ_seg.nii.gz")
        drawings = drawn(label_path.parent / "segmentations")
        raters = [annotation(drawings, annotator, image.array.shape) for annotator in ANNOTATORS]
        filled = {annotator: missing for annotator, (_, missing) in zip(ANNOTATORS, raters, strict=True) if missing}
        return Case(
            image=image.array[None].astype(np.float32),
            label=as_labels(read_nifti(label_path).array, label_path),
            case_id=case_id,
            patient_id=case_id,
            spacing=image.spacing,
            raters=np.stack([rater for rater, _ in raters]),
            attributes=self.attributes(case_id) | {"orientation": image.orientation, "filled": filled},
        )


def drawn(folder: Path) -> dict[tuple[str, int], dict[int, Path]]:
    """{(structure, instance): {annotator: file}} of a case's segmentations folder."""
    found: dict[tuple[str, int], dict[int, Path]] = {}
    for path in sorted(folder.glob("*.nii.gz")):
        if match := INSTANCE.fullmatch(path.name):
            structure, instance, annotator = match[1], int(match[2]), int(match[3])
            found.setdefault((structure, instance), {})[annotator] = path
    if not found:
        raise MedcookError(f"{folder}: no annotations.", "Take the folder `data` of the official repository as it is.")
    return found


def annotation(drawings: dict, annotator: int, shape: tuple[int, ...]) -> tuple[np.ndarray, list[str]]:
    """One annotator's label map, and the structures for which another's drawing had to stand in."""
    label, missing = np.zeros(shape, np.uint8), []
    for structure, value in PAINTED.items():
        for (name, instance), files in drawings.items():
            if name != structure:
                continue
            if annotator not in files:
                missing.append(f"{structure}_instance-{instance}")
            path = files.get(annotator, files[min(files)])
            mask = read_nifti(path).array
            if mask.shape != shape:
                raise MedcookError(f"{path}: its shape {mask.shape} differs from the image's {shape}.", "Get it again.")
            label[mask > 0] = value
    return label, missing
