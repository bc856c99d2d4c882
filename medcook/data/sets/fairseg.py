"""Harvard-FairSeg: one .npz a patient, with the fundus image, the mask of rim and cup, and demographic attributes."""

import zipfile
from pathlib import Path

import numpy as np

from medcook.data import fetch
from medcook.data.case import Case
from medcook.data.datasets import Dataset
from medcook.errors import MedcookError

CASES = 10_000
FOLDERS = ("Training", "Test", "All", "")
ATTRIBUTES = {
    "gender": ("sex", {0: "F", 1: "M"}),
    "race": ("race", {0: "Asian", 1: "Black", 2: "White"}),
    "ethnicity": ("ethnicity", {0: "non-Hispanic", 1: "Hispanic"}),
    "language": ("language", {0: "English", 1: "Spanish", 2: "other"}),
    "maritalstatus": ("marital status", dict(enumerate(("married", "single", "divorced", "widowed", "separated")))),
}
"""{stored name: (attribute, {code: value})}; -1 and every other code is unknown."""


class FairSeg(Dataset):
    """A case is one eye: image (1, H, W) in 0 to 255, label 1 rim, 2 cup.

    attributes: age, sex, race, ethnicity, language, marital status; None where unknown
    """

    def index(self) -> dict[str, str]:
        return {f"data_{number:05d}": f"data_{number:05d}" for number in range(1, CASES + 1)}

    def path(self, case_id: str) -> Path:
        """The file of a case, in any of the folders that the set comes in."""
        there = (fetch.local(self.manifest.name, f"{folder}/{case_id}.npz".lstrip("/")) for folder in FOLDERS)
        return next((path for path in there if path), None) or self.file(f"{FOLDERS[0]}/{case_id}.npz")

    def attributes(self, case_id: str) -> dict:
        stored = read_npz(self.path(case_id), ("age", *ATTRIBUTES))
        coded = {name: values.get(int(stored[key].item())) for key, (name, values) in ATTRIBUTES.items()}
        return {"age": float(stored["age"].item())} | coded

    def read(self, case_id: str) -> Case:
        path = self.path(case_id)
        stored = read_npz(path, ("slo_fundus", "disc_cup_mask"))
        mask = np.abs(stored["disc_cup_mask"])
        label = mask.astype(np.uint8)
        if not np.array_equal(label, mask):
            raise MedcookError(f"{path}: the mask holds other values than 0, -1 and -2.", "Get it again.")
        return Case(
            image=stored["slo_fundus"].astype(np.float32)[None],
            label=label,
            case_id=case_id,
            patient_id=case_id,
            attributes=self.attributes(case_id),
        )


def read_npz(path: Path, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The named arrays of a file, no other is unpacked; stored Python objects are refused, for they can run code."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in names}
    except KeyError as error:
        raise MedcookError(f"{path}: {error.args[0]}.", f"It needs {', '.join(names)}.") from error
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise MedcookError(f"{path}: not a readable .npz file ({error}).", "Get it again.") from error
