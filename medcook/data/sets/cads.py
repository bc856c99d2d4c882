"""CADS: CT volumes of many sources in one layout, 167 structures in nine groups of label maps."""

import csv
from functools import cached_property
from pathlib import PurePosixPath

import numpy as np

from medcook.data import fetch
from medcook.data.case import Case
from medcook.data.datasets import Dataset, as_labels
from medcook.data.readers.nifti import read_nifti
from medcook.errors import MedcookError

SOURCES = (
    *("0001_visceral_gc", "0002_visceral_sc", "0003_kits21", "0004_lits", "0005_bcv_abdomen", "0006_bcv_cervix"),
    *("0007_chaos", "0008_ctorg", "0009_abdomenct1k", "0010_verse", "0011_exact", "0012_cad_pe", "0013_ribfrac"),
    *("0014_learn2reg", "0015_lndb", "0016_lidc", "0017_lola11", "0018_sliver07", "0019_tcia_ct_lymph_nodes"),
    *("0020_tcia_cptac_ccrcc", "0021_tcia_cptac_luad", "0022_tcia_ct_images_covid19", "0023_tcia_nsclc_radiomics"),
    *("0024_pancreas_ct", "0025_pancreatic_ct_cbct_seg", "0026_rider_lung_ct", "0027_tcia_tcga_kich"),
    *("0028_tcia_tcga_kirc", "0029_tcia_tcga_kirp", "0030_tcia_tcga_lihc", "0032_stoic2021", "0033_tcia_nlst"),
    *("0034_empire", "0037_totalsegmentator", "0038_amos", "0039_han_seg", "0040_saros", "0041_ctrate"),
    *("0042_new_brainct_1mm", "0043_new_ct_tri"),
)
"""Folders of the set; each has a CSV of its own name that lists its images."""
SHARING = frozenset(
    {"0003_kits21", "0004_lits", "0008_ctorg", "0009_abdomenct1k", "0014_learn2reg", "0016_lidc", "0018_sliver07"}
    | {"0024_pancreas_ct", "0025_pancreatic_ct_cbct_seg", "0026_rider_lung_ct", "0040_saros"}
    | {name for name in SOURCES if "_tcia_" in name}
)
"""Sources that hold, or may hold, the same scans; no name says which."""
GROUPS = {551: 17, 552: 24, 553: 18, 554: 21, 555: 24, 556: 15, 557: 9, 558: 29, 559: 10}
"""{group: how many structures}; the manifest's numbers are those of the groups one after the other."""
PAINTED = (559, 556, 553, 557, 558, 551, 552, 554, 555)  # where groups overlap, the later, more special one wins


class Cads(Dataset):
    """A case is one CT: image (1, X, Y, Z) in HU, label 1 to 167.

    attributes: orientation, source, annotated (the label values of the groups that are there)
    extras: `group 551` ... `group 559`, each (X, Y, Z) with its own numbers 1, 2, ... as published
    """

    def index(self) -> dict[str, str]:
        return {case_id: patient_of(source, stem_of(name)) for case_id, (source, name) in self._images.items()}

    @cached_property
    def _images(self) -> dict[str, tuple[str, str]]:
        """{source/id: (source, name of its image)} of all sources that are on this machine."""
        there = [name for name in SOURCES if fetch.local(self.manifest.name, f"{name}/{name}.csv")]
        images: dict[str, tuple[str, str]] = {}
        for source in there or SOURCES[:1]:  # none: this says where to get them
            with self.file(f"{source}/{source}.csv").open(encoding="utf-8-sig", newline="") as lines:
                names = [PurePosixPath(row["Image ID"]).name for row in csv.DictReader(lines)]
            listed = [name for name in names if name.endswith(".nii.gz")]  # the last row holds averages
            images |= {f"{source}/{stem_of(name)}": (source, name) for name in listed}
        return images

    def attributes(self, case_id: str) -> dict:
        source, name = self._images[case_id]
        there = [group for group in GROUPS if fetch.local(self.manifest.name, mask_of(source, stem_of(name), group))]
        values = {group: range(first(group), first(group) + GROUPS[group]) for group in there}
        return {"source": source, "annotated": [value for group in there for value in values[group]]}

    def read(self, case_id: str) -> Case:
        source, name = self._images[case_id]
        image = read_nifti(self.file(f"{source}/images/{name}"))
        known = self.attributes(case_id)
        groups = {group: self._group(case_id, group) for group in GROUPS if first(group) in known["annotated"]}
        label = np.zeros(image.array.shape, np.uint8)
        for group in (group for group in PAINTED if group in groups):
            if groups[group].shape != label.shape:
                problem = f"group {group} has shape {groups[group].shape}, the image {label.shape}"
                raise MedcookError(f"{self.manifest.name}, case {case_id}: {problem}.", "Get it again.")
            np.copyto(label, groups[group] + np.uint8(first(group) - 1), where=groups[group] > 0)
        return Case(
            image=image.array[None].astype(np.float32),
            label=label,
            case_id=case_id,
            patient_id=self.index()[case_id],
            spacing=image.spacing,
            attributes=known | {"orientation": image.orientation},
            extras={f"group {group}": array for group, array in groups.items()},
        )

    def _group(self, case_id: str, group: int) -> np.ndarray:
        """(X, Y, Z) uint8, the label map of one group; a number that the group does not have is an error."""
        source, name = self._images[case_id]
        path = self.file(mask_of(source, stem_of(name), group))
        array = as_labels(read_nifti(path).array, path)
        if array.max() > GROUPS[group]:
            raise MedcookError(f"{path}: label value {array.max()} of {GROUPS[group]}.", "Get it again.")
        return array


def first(group: int) -> int:
    """The number of a group's first structure among all 167."""
    return 1 + sum(count for other, count in GROUPS.items() if other < group)


def mask_of(source: str, stem: str, group: int) -> str:
    """Path of a group's label map."""
    return f"{source}/segmentations/{stem}/{stem}_part_{group}.nii.gz"


def stem_of(name: str) -> str:
    """The id in the name of an image."""
    return name.removesuffix(".nii.gz").removesuffix("_0000")


def patient_of(source: str, stem: str) -> str:
    """Whose scan it is: CT-RATE names its patients, train_10030_a_2; any other source may hold several of a patient."""
    if source == "0041_ctrate":
        return f"{source}/{'_'.join(stem.split('_')[:2])}"
    return "sources that share scans" if source in SHARING else source
