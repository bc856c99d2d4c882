"""ACDC, pre-processed copy: one HDF5 per frame, two frames per patient."""

import re
from functools import cached_property

import numpy as np

from medcook.data.case import IGNORE, Case
from medcook.data.datasets import Dataset
from medcook.data.localise import heart_centre
from medcook.data.readers.hdf5 import read_hdf5

GROUPS = ("DCM", "HCM", "MINF", "NOR", "RV")  # the challenge numbers its patients in blocks of 20
SCRIBBLE_UNLABELLED = 4


class Acdc(Dataset):
    """A case is one frame, for example patient001_frame01: image (1, slices, H, W) in 0 to 1.

    attributes: group, phase (ED or ES), roi_centre (y, x in pixels, found from motion, without labels)
    extras: scribble (slices, H, W), unlabelled = 255
    """

    def index(self) -> dict[str, str]:
        return {path.removesuffix(".h5"): path.split("_")[0] for path in self.registry}

    def attributes(self, case_id: str) -> dict:
        patient = self.index()[case_id]
        number = int(re.search(r"\d+", patient).group())
        phase = "ED" if case_id == min(self.patients[patient]) else "ES"
        return {"group": GROUPS[(number - 1) // 20], "phase": phase}

    def read(self, case_id: str) -> Case:
        stored = read_hdf5(self.file(f"{case_id}.h5"), ("image", "label", "scribble"))
        patient = self.index()[case_id]
        scribble = np.where(stored["scribble"] == SCRIBBLE_UNLABELLED, IGNORE, stored["scribble"]).astype(np.uint8)
        return Case(
            image=stored["image"][None].astype(np.float32),
            label=stored["label"],
            case_id=case_id,
            patient_id=patient,
            attributes=self.attributes(case_id) | {"roi_centre": self.roi_centre(patient)},
            extras={"scribble": scribble},
        )

    @cached_property
    def _centres(self) -> dict[str, tuple[float, float]]:
        return {}

    def roi_centre(self, patient: str) -> tuple[float, float]:
        """Where the heart is, from both frames of the patient; remembered."""
        if patient not in self._centres:
            frames = [read_hdf5(self.file(f"{case}.h5"), ("image",))["image"] for case in self.patients[patient]]
            self._centres[patient] = heart_centre(*frames)
        return self._centres[patient]
