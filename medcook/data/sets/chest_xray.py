"""Montgomery and Shenzhen chest X-rays: PNG pairs and a clinical table shared with other cohorts."""

import csv
from functools import cached_property
from pathlib import PurePosixPath

from medcook.data.case import Case
from medcook.data.datasets import Dataset
from medcook.data.readers.png import read_gray, read_mask

SITES = ("Montgomery", "Shenzhen")


class ChestXray(Dataset):
    """A case is one X-ray: image (1, 256, 256) in 0 to 255.

    attributes: site, sex, age (None where unknown), tuberculosis
    """

    def index(self) -> dict[str, str]:
        return {stem: stem for stem in self._images}

    @cached_property
    def _images(self) -> dict[str, str]:
        """{case_id: path of its image}."""
        return {PurePosixPath(path).stem: path for path in self.registry if "/images/" in path}

    @cached_property
    def clinical(self) -> dict[str, dict]:
        """{case_id: row of clinical.csv}, without the rows of other cohorts."""
        with self.file("clinical.csv").open(encoding="utf-8", newline="") as lines:
            rows = [row for row in csv.DictReader(lines) if row["Dataset"] in SITES]
        known = {PurePosixPath(row["File"]).stem: row for row in rows}
        return {case_id: known[case_id] for case_id in self._images if case_id in known}

    def attributes(self, case_id: str) -> dict:
        row = self.clinical.get(case_id, {})
        return {
            "site": self._images[case_id].split("/")[1],
            "sex": row.get("Sex") or None,
            "age": int(row["Age"]) if row.get("Age") else None,
            "tuberculosis": case_id.endswith("_1"),
        }

    def read(self, case_id: str) -> Case:
        image = self._images[case_id]
        mask = image.replace("/images/", "/labels/")
        if mask not in self.registry:
            mask = mask.replace(".png", "_mask.png")
        return Case(
            image=read_gray(self.file(image))[None],
            label=read_mask(self.file(mask)),
            case_id=case_id,
            patient_id=case_id,
            attributes=self.attributes(case_id),
        )
