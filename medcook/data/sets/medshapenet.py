"""MedShapeNet: shapes of anatomical structures as meshes, one STL file each, turned into volumes."""

import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np

from medcook.data.case import Case
from medcook.data.datasets import Dataset
from medcook.data.fetch import folders
from medcook.data.readers.stl import read_solid
from medcook.errors import MedcookError

NAME = re.compile(r"(?:.*files=)?(?:(s?\d+)_(.+?)(?:\.nii\.g_1)?|(face|ct_skull|vessel_tree)_?\d+)\.stl", re.IGNORECASE)
"""PATIENT_STRUCTURE.stl or STRUCTURE_NUMBER.stl; wget keeps what stands before it in the link."""


class MedShapeNet(Dataset):
    """A case is one structure: image (1, X, Y, Z) its occupancy, 0 or 1, label (X, Y, Z) its number where it is 1.

    Axes are x, y and z of the mesh. Voxels are cubes of 1 mm, or larger where a side would have more than 128.
    attributes: structure, annotated (its number alone), origin (x, y, z of the first voxel's middle in mm)
    """

    def index(self) -> dict[str, str]:
        return {case_id: patient for case_id, (patient, _, _) in self._shapes.items()}

    @cached_property
    def _shapes(self) -> dict[str, tuple[str, int, Path]]:
        """{case_id: (patient_id, number of the structure, file)} of the files on this machine, by name."""
        shapes: dict[str, tuple[str, int, Path]] = {}
        strange: list[Path] = []
        for path in self._files():
            patient, structure = parts_of(path.name)
            if value := self._numbers.get(key_of(structure)):
                shapes.setdefault(case_of(path.name), (patient, value, path))
            else:
                strange.append(path)
        if strange:
            more = f" (and {len(strange) - 1} more)" if len(strange) > 1 else ""
            problem = f"{strange[0]}{more}: the name tells no patient, or no structure of the manifest"
            hint = "Keep names such as s0485_rib_left_2.nii.g_1.stl, and move other files out of the folder."
            raise MedcookError(f"{problem}.", hint)
        if not shapes:
            self.fetch()  # this says where to get them
        return shapes

    def _files(self) -> Iterator[Path]:
        """All STL files of the mirror, then of the cache."""
        for folder in folders(self.manifest.name):
            for path in sorted(folder.rglob("*")):
                if path.suffix.lower() == ".stl" and not path.name.startswith("."):
                    yield path

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {key_of(name): value for value, name in self.manifest.structures.items()}

    def attributes(self, case_id: str) -> dict:
        _, value, _ = self._shapes[case_id]
        return {"structure": self.manifest.classes[value], "annotated": [value]}

    def read(self, case_id: str) -> Case:
        patient, value, path = self._shapes[case_id]
        solid = read_solid(path)
        return Case(
            image=solid.voxels[None].astype(np.float32),
            label=solid.voxels * np.uint8(value),
            case_id=case_id,
            patient_id=patient,
            spacing=(solid.spacing,) * 3,
            attributes=self.attributes(case_id) | {"origin": solid.origin},
        )


def parts_of(name: str) -> tuple[str, str]:
    """(patient, structure) in the name of a file, empty where it tells neither; shapes without a patient are one's."""
    match = NAME.fullmatch(name)
    if match is None:
        return "", ""
    patient, structure, alone = match.groups()
    return (patient, structure) if patient else (alone.lower(), alone)


def case_of(name: str) -> str:
    """The case's id in the name of a file: s0485_rib_left_2 of s0485_rib_left_2.nii.g_1.stl."""
    return re.sub(r"^.*files=|(\.nii\.g_1)?\.stl$", "", name, flags=re.IGNORECASE)


def key_of(structure: str) -> str:
    """What the ways to write a structure have in common: kidney_left, kidneyleft; clavicula_left, clavicleleft."""
    return structure.lower().replace("_", "").replace("clavicle", "clavicula")
