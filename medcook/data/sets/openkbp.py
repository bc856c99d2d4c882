"""OpenKBP: head-and-neck CT with organs at risk, one sparse CSV per structure."""

import numpy as np

from medcook.data.case import Case
from medcook.data.datasets import Dataset
from medcook.data.readers.sparse_csv import SHAPE, read_sparse, read_voxel_size

FILES = {
    1: "Brainstem",
    2: "SpinalCord",
    3: "RightParotid",
    4: "LeftParotid",
    5: "Esophagus",
    6: "Larynx",
    7: "Mandible",
}
PAINTED = (6, 7, 3, 4, 1, 5, 2)  # where structures overlap, the later wins
TARGETS = (56, 63, 70)  # Gy; where planning targets overlap, the higher dose wins
HU_OFFSET = -1024  # absent voxels are 0 in the file: air


class OpenKbp(Dataset):
    """A case is one patient: image (1, 128, 128, 128) in Hounsfield units.

    attributes: annotated, the label values that were drawn for this patient (the others are unlabelled, not absent)
    extras: target (128, 128, 128), the prescribed dose in Gy where there is a planning target
    """

    def index(self) -> dict[str, str]:
        patients = {path.split("/")[0] for path in self.registry}
        return {patient: patient for patient in sorted(patients, key=lambda name: int(name.removeprefix("pt_")))}

    def has(self, patient: str, name: str) -> bool:
        return f"{patient}/{name}.csv" in self.registry

    def attributes(self, case_id: str) -> dict:
        return {"annotated": [value for value, name in FILES.items() if self.has(case_id, name)]}

    def read(self, case_id: str) -> Case:
        known = self.attributes(case_id)
        label, target = np.zeros(SHAPE, np.uint8), np.zeros(SHAPE, np.uint8)
        for value in (value for value in PAINTED if value in known["annotated"]):
            label[self.sparse(case_id, FILES[value]).astype(bool)] = value
        for dose in (dose for dose in TARGETS if self.has(case_id, f"PTV{dose}")):
            target[self.sparse(case_id, f"PTV{dose}").astype(bool)] = dose
        return Case(
            image=self.sparse(case_id, "ct")[None] + np.float32(HU_OFFSET),
            label=label,
            case_id=case_id,
            patient_id=case_id,
            spacing=read_voxel_size(self.file(f"{case_id}/voxel_dimensions.csv")),
            attributes=known,
            extras={"target": target},
        )

    def sparse(self, patient: str, name: str) -> np.ndarray:
        return read_sparse(self.file(f"{patient}/{name}.csv"))
