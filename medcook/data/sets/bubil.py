"""BU-BIL dataset 1: one microscopy image, a gold standard, and ten annotations by five experts with two tools."""

from functools import cached_property
from pathlib import PurePosixPath

import numpy as np

from medcook.data.case import Case
from medcook.data.datasets import Dataset
from medcook.data.readers.png import read_gray, read_mask


class Bubil(Dataset):
    """A case is one image: image (1, H, W) in 0 to 255, raters (R, H, W).

    attributes: raters, their names in the order of `Case.raters`, for example Person1_Amira
    """

    def index(self) -> dict[str, str]:
        return {case_id: case_id for case_id in self._files["RawImages"]}

    @cached_property
    def _files(self) -> dict[str, dict[str, str]]:
        """{folder: {case_id: path}}; file names differ in capitals and prefix (Seg_B01, seg_B01, B01)."""
        found: dict[str, dict[str, str]] = {}
        for path in self.registry:
            parts = PurePosixPath(path)
            found.setdefault(parts.parent.name, {})[parts.stem.upper().removeprefix("SEG_")] = path
        return found

    def attributes(self, case_id: str) -> dict:
        names = sorted(folder for folder in self._files if folder.startswith("Person"))
        return {"raters": [name for name in names if case_id in self._files[name]]}

    def read(self, case_id: str) -> Case:
        known = self.attributes(case_id)
        return Case(
            image=read_gray(self.file(self._files["RawImages"][case_id]))[None],
            label=self.mask("GoldStandard", case_id),
            case_id=case_id,
            patient_id=case_id,
            raters=np.stack([self.mask(name, case_id) for name in known["raters"]]),
            attributes=known,
        )

    def mask(self, folder: str, case_id: str) -> np.ndarray:
        return read_mask(self.file(self._files[folder][case_id]), inverted=True)
